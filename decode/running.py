"""The requests that a decode worker runs, and a bounded memory of those that it no longer does."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from ..common.adapter import HeldAdapter
from ..common.grammar import CompiledGrammar
from ..common.request import RequestSpec, Sequence

_MAX_REMEMBERED = 8192


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request that decodes (or computes its prompt) here."""

    router_id: str
    spec: RequestSpec
    expires_s: float | None = None  # on our clock: nothing of it is begun from then on
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by choice; unfinished ones
    dropped: set[int] = field(default_factory=set)  # choices that ended before their prompt was computed
    num_cached_tokens: int = 0
    grammar: CompiledGrammar | None = None
    held_adapter: HeldAdapter | None = None

    @property
    def is_equipped(self) -> bool:
        """Tell whether nothing of it can fail to be made ready any more: an adapter may, as it can lose its slot."""
        return (self.grammar is None or self.grammar.is_ready) and self.held_adapter is None

    @property
    def is_finished(self) -> bool:
        """Every choice has ended or is not wanted any more."""
        return not self.sequences or self.dropped >= set(self.spec.choices)


def expiry_s(spec: RequestSpec, now_s: float) -> float | None:
    """Return the request's deadline on our clock; None: it has none."""
    return None if spec.remaining_s is None else now_s + spec.remaining_s


class EndedAttempts:
    """The last attempt of each request that has ended here. A message that is late or doubled starts nothing again."""

    def __init__(self) -> None:
        self._attempts: OrderedDict[str, int] = OrderedDict()  # by request id, the latest news last

    def add(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = max(attempt, self._attempts.pop(request_id, attempt))
        if len(self._attempts) > _MAX_REMEMBERED:
            self._attempts.popitem(last=False)

    def has(self, spec: RequestSpec) -> bool:
        """The attempt, or a later one, has ended here."""
        return spec.attempt <= self._attempts.get(spec.request_id, -1)
