"""A router records what it saw of its load since it was last asked: the autoscaler's food.

dispatcher ─> on_submitted, on_finished, on_outcome ─> LoadRecord ─(take, once per interval)─> SeenLoad
several routers: those that do not decide send theirs, a sample of it, to the one that does
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prometheus_client.metrics_core import Metric

from ..metrics.metrics import RouterMetrics
from ..metrics.workers import gauge
from ..state.objectives import DEFAULT_CLASS, Objectives
from ..state.outcome import ServiceOutcome
from ..state.request import RouterRequest
from .scale_types import POOLS, AnswerLengths, Counts, Kept

_T = TypeVar("_T")
_MOST = 100_000  # requests in one interval: a bound on memory
_MOST_SENT = 256  # of each kind, to another router: fewer say less about lengths, more make events long


@dataclass(slots=True, frozen=True)
class SeenLoad:
    """The load that was seen in one interval."""

    prompts: tuple[int, ...] = ()
    answers: tuple[AnswerLengths, ...] = ()
    ttft: Kept = Kept()
    tpot: Kept = Kept()
    num_queued: int = 0

    def joined(self, others: Iterable[SeenLoad]) -> SeenLoad:
        """Return this together with what other routers saw."""
        seen = [self, *others]
        return SeenLoad(
            tuple(prompt for one in seen for prompt in one.prompts),
            tuple(answer for one in seen for answer in one.answers),
            _sum(one.ttft for one in seen),
            _sum(one.tpot for one in seen),
            sum(one.num_queued for one in seen),
        )

    def as_event(self) -> dict[str, object]:
        """Return it for the launcher, who passes it on: an even choice of the lengths, and how many there were."""
        return {
            "event": "load",
            "num_prompts": len(self.prompts),
            "prompts": list(_even_choice(self.prompts, _MOST_SENT)),
            "answers": [_as_list(answer) for answer in _even_choice(self.answers, _MOST_SENT)],
            "ttft": [self.ttft.num_met, self.ttft.num_seen],
            "tpot": [self.tpot.num_met, self.tpot.num_seen],
            "num_queued": self.num_queued,
        }

    @classmethod
    def from_event(cls, event: Mapping[str, object]) -> SeenLoad:
        prompts = _ints(event.get("prompts"))
        count = event.get("num_prompts")
        if prompts and isinstance(count, int):
            prompts = [prompts[index % len(prompts)] for index in range(min(count, _MOST))]
        answers = event.get("answers")
        kept = [_ints(event.get(name)) for name in ("ttft", "tpot")]
        queued = event.get("num_queued")
        return cls(
            tuple(prompts),
            tuple(map(_as_answer, answers)) if isinstance(answers, list) else (),
            Kept(*kept[0]),
            Kept(*kept[1]),
            queued if isinstance(queued, int) else 0,
        )


def _sum(parts: Iterable[Kept]) -> Kept:
    kept = list(parts)
    return Kept(sum(part.num_met for part in kept), sum(part.num_seen for part in kept))


def _even_choice(items: Sequence[_T], count: int) -> Sequence[_T]:
    return items if len(items) <= count else [items[index * len(items) // count] for index in range(count)]


def _as_list(answer: AnswerLengths) -> list[object]:
    own = answer.objectives
    sized_by = None if own is None else [own.ttft_s, own.ttft_stretch, own.tpot_s]
    return [answer.num_prompt_tokens, answer.num_cached_tokens, answer.num_output_tokens, answer.num_choices, sized_by]


def _as_answer(value: Sequence[Any]) -> AnswerLengths:
    prompt, cached, output, choices, own = value
    return AnswerLengths(prompt, cached, output, None if own is None else _sized_by(*own), choices)


def _sized_by(ttft_s: float | None, ttft_stretch: float, tpot_s: float | None) -> Objectives:
    """Return what of objectives sizes pools: classes that differ in nothing else are one."""
    return Objectives(ttft_s=ttft_s, ttft_stretch=ttft_stretch, tpot_s=tpot_s)


def _ints(value: object) -> list[int]:
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


@dataclass(slots=True)
class LoadRecord:
    """Filled by the dispatcher's observer; `take` empties it."""

    _prompts: list[int] = field(default_factory=list)
    _answers: list[AnswerLengths] = field(default_factory=list)
    _ttft: list[bool] = field(default_factory=list)  # met?
    _tpot: list[bool] = field(default_factory=list)

    def on_submitted(self, request: RouterRequest) -> None:
        if len(self._prompts) < _MOST:
            self._prompts.append(request.num_prompt_tokens)

    def on_finished(self, request: RouterRequest) -> None:
        has_answer = request.num_output_tokens or request.embedding  # which is a prompt's work, and no token's
        if has_answer and len(self._answers) < _MOST:
            own = request.objectives
            is_default = request.request_class == DEFAULT_CLASS
            self._answers.append(
                AnswerLengths(
                    request.num_prompt_tokens,
                    request.num_cached_tokens,
                    request.num_output_tokens,
                    None if is_default else _sized_by(own.ttft_s, own.ttft_stretch, own.tpot_s),
                    request.n,
                )
            )

    def on_outcome(self, outcome: ServiceOutcome) -> None:
        if outcome.ttft_s is not None and outcome.ttft_limit_s is not None:
            self._ttft.append(outcome.ttft_s <= outcome.ttft_limit_s)
        if outcome.tpot_s is not None and outcome.tpot_limit_s is not None:
            self._tpot.append(outcome.tpot_s <= outcome.tpot_limit_s)

    def take(self, num_queued: int) -> SeenLoad:
        seen = SeenLoad(
            tuple(self._prompts),
            tuple(self._answers),
            Kept(sum(self._ttft), len(self._ttft)),
            Kept(sum(self._tpot), len(self._tpot)),
            num_queued,
        )
        for part in (self._prompts, self._answers, self._ttft, self._tpot):
            part.clear()
        return seen


@dataclass(slots=True, frozen=True)
class Replicas:
    """The numbers that others may scale by. None: nothing is decided here."""

    desired: Counts | None = None
    current: Counts | None = None


class RecordingMetrics(RouterMetrics):
    """The router's metrics, which hand on what the autoscaler needs."""

    def __init__(self, model_name: str, record: LoadRecord, classes: Sequence[str] = ()) -> None:
        super().__init__(model_name, classes)
        self._record = record
        self.replicas: Callable[[], Replicas] = Replicas

    def _counts_now(self) -> list[Metric]:
        replicas = self.replicas()
        return [
            gauge(
                f"kvferry_{name}_replicas",
                text,
                ["pool"],
                [((pool,), float(counts.in_pool(pool))) for pool in POOLS],
            )
            for name, text, counts in (
                ("desired", "Workers that a pool should have", replicas.desired),
                ("current", "Workers that a pool has, with those that start", replicas.current),
            )
            if counts is not None
        ]

    def on_submitted(self, request: object) -> None:
        assert isinstance(request, RouterRequest)
        self._record.on_submitted(request)

    def on_finished(self, request: RouterRequest) -> None:  # type: ignore[override]  # it sees more of a request
        super().on_finished(request)
        self._record.on_finished(request)

    def on_outcome(self, outcome: ServiceOutcome) -> None:  # type: ignore[override]
        super().on_outcome(outcome)
        self._record.on_outcome(outcome)
