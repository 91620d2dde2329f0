"""Reservations that wait for blocks on a full decode worker: one for each router, the oldest of a class first.

    ReserveKV(queue_if_full) ──(no room)──> waiting ──(blocks came free)──> Grant
                                               └──(two seconds, its deadline, draining, another role)──> NoCapacity

While one waits, blocks that come free are kept for it, and of what may be promised at a time its part: others get only
what it does not need. Without this a large prompt would wait until no smaller one came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

from ..common.clock import Clock
from ..common.kv_spec import KVCacheSpec
from ..common.request import RequestSpec
from ..kvcache.blocks import BlockPool
from ..kvcache.contents import Contents
from ..transfer.receive.receiver import KVReceiver
from ..transfer.receive.reservations import Kept
from ..wire.results import Grant, NoCapacity
from ..wire.tasks import ReserveKV

MAX_WAIT_S = 2.0
_WORTH_WAITING = ("blocks", "growth")

_Hashes = Callable[[], list[bytes]]
_Key = tuple[int, int, str]


@dataclass(slots=True, eq=False)
class _Waiting:
    router_id: str
    message: ReserveKV
    hashes: _Hashes  # of its prompt's blocks: they are computed once, as a long one takes longer than a step
    num_blocks: int
    until_s: float
    waits_behind: frozenset[int]  # promises that were there before it: while they leave it no room, others take theirs
    tried_with: tuple[int, ...]  # what there was at the last try

    @property
    def key(self) -> _Key:
        return _key(self.message.spec)


def _key(spec: RequestSpec) -> _Key:
    return (spec.priority, spec.arrival, spec.request_id)


class WaitingReservations:
    """Stands before the receiver. `growth_reserve` tells what running sequences need."""

    def __init__(
        self,
        receiver: KVReceiver,
        pool: BlockPool,
        spec: KVCacheSpec,
        clock: Clock,
        contents: Contents,
        growth_reserve: Callable[[], int],
    ) -> None:
        self._receiver = receiver
        self._pool = pool
        self._spec = spec
        self._clock = clock
        self._contents = contents
        self._growth_reserve = growth_reserve
        self._waiting: list[_Waiting] = []  # oldest first

    def __len__(self) -> int:
        return len(self._waiting)

    def holds(self, request_id: str) -> bool:
        return any(waiting.message.spec.request_id == request_id for waiting in self._waiting)

    @property
    def specs(self) -> list[RequestSpec]:
        return [waiting.message.spec for waiting in self._waiting]

    @property
    def routers(self) -> set[str]:
        return {waiting.router_id for waiting in self._waiting}

    def reserve(self, router_id: str, message: ReserveKV) -> list[tuple[str, Grant | NoCapacity]]:
        """Answers, by router: to this one, unless it waits, and to the one whose place it takes."""
        self.drop(message.spec.request_id, message.spec.attempt)
        hashes = cache(partial(self._contents.prompt_hashes, message.spec))
        answer = self._try(router_id, message, hashes)
        if not (message.queue_if_full and isinstance(answer, NoCapacity) and answer.reason in _WORTH_WAITING):
            return [(router_id, answer)]
        other = next((waiting for waiting in self._waiting if waiting.router_id == router_id), None)
        if other is not None and other.key < _key(message.spec):
            return [(router_id, answer)]
        self._wait(router_id, message, hashes)
        return [] if other is None else [(router_id, self._give_up(other, answer.reason))]

    def _try(self, router_id: str, message: ReserveKV, hashes: _Hashes) -> Grant | NoCapacity:
        older = [waiting for waiting in self._waiting if waiting.key < _key(message.spec)]
        has_turn = self._receiver.reservations.has_turn
        kept = Kept(
            sum(waiting.num_blocks for waiting in older),
            sum(waiting.num_blocks for waiting in older if has_turn(waiting.num_blocks, waiting.waits_behind)),
        )
        return self._receiver.reserve(
            message.spec,
            router_id,
            max_local_tokens=message.max_local_tokens,
            growth_reserve=self._growth_reserve(),
            kept=kept,
            retains_prefix=message.retains_prefix,
            hashes=hashes,
        )

    def _wait(self, router_id: str, message: ReserveKV, hashes: _Hashes) -> None:
        spec = message.spec
        wait_s = MAX_WAIT_S if spec.remaining_s is None else min(MAX_WAIT_S, spec.remaining_s)
        num_copies = len(spec.choices) - 1 if spec.num_prompt_tokens % self._spec.block_size else 0
        num_blocks = self._pool.num_frames(
            self._spec.num_blocks_for(spec.num_prompt_tokens) + num_copies,
            self._spec.num_left_out(spec.num_prompt_tokens),
        )
        until_s = self._clock.now() + wait_s
        promises = self._receiver.reservations.promises
        self._waiting.append(_Waiting(router_id, message, hashes, num_blocks, until_s, promises, self._room()))
        self._waiting.sort(key=lambda waiting: waiting.key)

    def _room(self) -> tuple[int, ...]:
        """Changes whenever a try may have another result."""
        receiver = self._receiver
        promised = receiver.reservations.num_granted_blocks + receiver.reservations.num_quarantined_blocks
        return (self._pool.num_free_blocks, self._growth_reserve(), promised, len(self._waiting))

    def _give_up(self, waiting: _Waiting, reason: str) -> NoCapacity:
        self._waiting.remove(waiting)
        spec = waiting.message.spec
        return NoCapacity(request_id=spec.request_id, attempt=spec.attempt, reason=reason)

    def retry(self) -> list[tuple[str, Grant | NoCapacity]]:
        """Answers to those that need not wait any longer, or may not."""
        answers: list[tuple[str, Grant | NoCapacity]] = []
        now = self._clock.now()
        for waiting in list(self._waiting):
            reason = "draining" if self._receiver.draining else "" if self._receiver.is_active else "wrong_role"
            if reason or now >= waiting.until_s:
                answers.append((waiting.router_id, self._give_up(waiting, reason or "blocks")))
                continue
            if self._room() == waiting.tried_with:
                continue
            answer = self._try(waiting.router_id, waiting.message, waiting.hashes)
            waiting.tried_with = self._room()
            if isinstance(answer, Grant) or answer.reason not in _WORTH_WAITING:
                self._waiting.remove(waiting)
                answers.append((waiting.router_id, answer))
        return answers

    def drop(self, request_id: str, attempt: int) -> None:
        """Drop the request that its router gave up, or sent again. Idempotent."""
        self._waiting = [
            waiting
            for waiting in self._waiting
            if waiting.message.spec.request_id != request_id or waiting.message.spec.attempt > attempt
        ]

    def keep_only(self, router_id: str, live: frozenset[tuple[str, int]]) -> None:
        """Drop the router's but those of the (request id, attempt) pairs in `live`."""
        self._waiting = [
            waiting
            for waiting in self._waiting
            if waiting.router_id != router_id or (waiting.message.spec.request_id, waiting.message.spec.attempt) in live
        ]
