"""One answer that is kept while it is told, so that a client may ask for it again and miss nothing of it.

    take ─> new:   begin ──────────────────> add, add ... ─> close      ─┐ the file stays for whoever asks next
            known: settle, restore, told ──> add, add ... ─> close      ─┘
    somebody else asks for it: `on_wanted`, whoever tells it ends and closes it

An answer that cannot be kept any more, as the disk is full, is told to its end all the same; nobody finds it later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import structlog

from ...common.clock import wall_time_s
from ...common.request import SampledToken, SamplingParams
from ..state.request import RouterRequest
from .answer_log import AnswerLog, Head, Told

log = structlog.get_logger(__name__)


@dataclass(slots=True, frozen=True)
class AnswerKey:
    """A client's name for an answer, with what it asks: `Idempotency-Key`, and `Last-Event-ID` after a break."""

    name: str  # of its file: a digest of key and caller
    asked: bytes  # a digest of the request
    after: int = 0  # events that the client has


class KeptAnswer:
    """`KeptAnswer` has its file to itself until `close`."""

    def __init__(
        self, key: AnswerKey, served: str, path: Path, log: AnswerLog, on_close: Callable[[KeptAnswer], None]
    ) -> None:
        """`served`: the version that tells it. What another one has told is forgotten."""
        if log.head is not None and log.head.asked == key.asked and log.head.served != served:
            log.empty()
        self.key = key
        self._served = served
        self._path = path
        self._log = log
        self._on_close = on_close
        self._is_open = True
        self.told: Sequence[Told] = log.told  # before; told again first
        self.num_told_tokens = sum(len(portion.tokens) for portion in log.told)
        self.is_kept = True  # what is told now can be found later
        self.on_wanted: Callable[[], None] = _ignore  # somebody else waits for it; may be called again

    @property
    def head(self) -> Head | None:
        return self._log.head

    @property
    def begun(self) -> Head:
        """The head of an answer that is settled."""
        assert self._log.head is not None
        return self._log.head

    @property
    def is_repeated(self) -> bool:
        """Something of it has been told before."""
        return bool(self.told)

    def num_open_tokens(self, num_choices: int) -> int:
        """Count the tokens that may still come, of all choices that have not ended: so many for each prompt."""
        left = [limit for limit in self.begun.limits for _ in range(num_choices)]
        for portion in self.told:
            left[portion.index] = max(0, left[portion.index] - len(portion.tokens)) if portion.finish is None else 0
        return sum(left)

    def settle(self, drawn: list[SamplingParams], answer_id: str) -> list[SamplingParams]:
        """Return how the answer is sampled: as it was begun, or as drawn now, which is noted with the answer's name."""
        head = self._log.head
        if head is None:
            seeds, limits = tuple(params.seed for params in drawn), tuple(params.max_tokens for params in drawn)
            head = Head(self.key.asked, self._served, answer_id, wall_time_s(), seeds, limits)
            self._write(partial(self._log.begin, head))
            return drawn
        return [
            msgspec.structs.replace(params, seed=seed, max_tokens=limit)
            for params, seed, limit in zip(drawn, head.seeds, head.limits, strict=True)
        ]

    def restore(self, requests: Iterable[RouterRequest]) -> Iterator[RouterRequest]:
        """Give the call's requests, in order, the tokens that were told: they go on from there."""
        told = defaultdict[int, list[Told]](list)
        for portion in self.told:
            told[portion.index].append(portion)
        for position, request in enumerate(requests):
            for number, choice in enumerate(request.choices):
                for portion in told[position * request.n + number]:
                    choice.restore(portion.tokens, portion.finish)
            yield request

    def add(self, index: int, tokens: Sequence[SampledToken], finish: str | None) -> None:
        """Keep what is about to be told."""
        if self.is_kept:
            self._write(partial(self._log.add, Told(index, tuple(tokens), finish)))

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.is_kept = False
            with suppress(OSError):  # where that fails, too, who comes back goes on behind what was kept
                self._path.unlink(missing_ok=True)
            log.warning("answer_not_kept", reason=error.strerror or str(error), num_bytes=self._log.num_bytes)

    def close(self) -> None:
        """Nobody tells it here any more. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._log.close()
            self._on_close(self)


@contextmanager
def given_back(kept: KeptAnswer | None) -> Iterator[None]:
    """Let go of an answer if it does not come to be told."""
    try:
        yield
    except BaseException:
        if kept is not None:
            kept.close()
        raise


def _ignore() -> None:
    """Nobody can hand it over yet."""
