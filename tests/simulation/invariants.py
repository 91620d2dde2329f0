"""The predicates: cheap ones after every event, whole books every now and then, all of them at the end.

Names are in `breach.py`. What is checked elsewhere: H1, H3, H6, H10 at each landing and H11 at each adoption
(`landings.py`), H2 at each adoption and each read (`memory.py`, `heads.py`), I18, I19 and a part of I12 at each message
(`role_rules.py`), I6, I8, I9 at each client (`clients.py`), I15, I16, H8 when all is over (`world.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from kvferry.common.request import BlockId
from kvferry.common.router_config import RouterConfig
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.frame_pool import FramePool
from kvferry.kvcache.thin import twin
from kvferry.router.dispatch.verdicts import MAX_EXTRA
from kvferry.router.state.choice_state import MAX_EARLY_TOKENS
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import ReservationState
from kvferry.transfer.receive.reservations import MAX_PROMISED_SHARE
from kvferry.wire.fields import Message
from kvferry.wire.results import StepTokens
from kvferry.wire.tasks import EmbedTask, LocalTask, PrefillTask, ReserveKV

from .breach import Breach

if TYPE_CHECKING:
    from .clients import Call
    from .routers import Router
    from .sessions import WorkerSession

_LATE_TASK_S = 0.25  # a tick, and what its round of placing takes
# Ends that are not a failure of attempts: there was nobody, no room for ever, or no time.
_OUTRIGHT = frozenset(
    {
        "no_decode_capacity",
        "no_prefill_capacity",
        "retry_budget_exhausted",
        "poison_request",
    }
)


# --- router -------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    status: RequestStatus
    attempt: int
    num_failures: int
    num_tokens: int
    finishes: tuple[str | None, ...]


def _state(request: RouterRequest) -> _State:
    finishes = tuple(choice.finish for choice in request.choices)
    return _State(request.status, request.attempt_number, request.num_failures, request.num_output_tokens, finishes)


class _Stale(NamedTuple):
    """Requests about whose ended attempts a message speaks, as they were before it."""

    message: Message
    before: list[tuple[RouterRequest, _State]]

    def check(self) -> None:
        for request, before in self.before:
            after = _state(request)
            if before.status is RequestStatus.QUEUED:  # to be placed at any event is its right
                after = after._replace(status=before.status)
            if after != before:
                raise Breach("I7", f"{self.message} changed {request.request_id} from {before} to {after}")


class RouterRules:
    """What holds at one router's border."""

    def __init__(self, router: Router, config: RouterConfig) -> None:
        self._router = router
        self._config = config
        self._draining: set[int] = set()  # sessions
        self._roles: dict[int, str] = {}  # by session: what its worker told last

    def stale_of(self, message: Message) -> _Stale | None:
        calls, before = self._router.calls, []
        parts: Iterable[object] = message.updates if isinstance(message, StepTokens) else (message,)
        for part in parts:
            attempt = getattr(part, "attempt", None)
            if attempt is not None:
                call = calls.get(part.request_id)  # type: ignore[attr-defined]
                if call is not None and (call.request.attempt_number != attempt or call.request.is_finished):
                    before.append((call.request, _state(call.request)))
        return _Stale(message, before) if before else None

    def check_bounds(self, message: StepTokens) -> None:
        for update in message.updates:
            call = self._router.calls.get(update.request_id)
            if call is not None:
                for choice in call.request.choices:
                    if len(choice.early) > MAX_EARLY_TOKENS:
                        raise Breach("I13", f"{update.request_id} keeps {len(choice.early)} early tokens")

    def note_drain(self, session: WorkerSession) -> None:
        self._draining.add(session.number)

    def note_role(self, session: WorkerSession, role: str) -> None:
        self._roles[session.number] = role

    def check_sent(self, session: WorkerSession, message: Message) -> None:
        if not isinstance(message, ReserveKV | LocalTask | PrefillTask | EmbedTask):
            return
        call = self._router.calls[message.spec.request_id]
        request, now = call.request, self._router.clock.now()
        if request.timeout_s is not None and now > request.timestamps["queued"] + request.timeout_s + _LATE_TASK_S:
            raise Breach("I10", f"{type(message).__name__} of {request.request_id} after its {request.timeout_s} s")
        tracked = self._router.dispatcher._in_flight.get(request.request_id)
        assert tracked is not None, request.request_id
        if request.num_failures >= self._config.max_attempts + tracked.num_extra or tracked.num_extra > MAX_EXTRA:
            raise Breach("I11", f"{request.request_id} is tried again after {request.num_failures} failures")
        if isinstance(message, ReserveKV | EmbedTask) and session.number in self._draining:
            raise Breach("I12", f"{session.worker_id} drains and gets {request.request_id}")
        if isinstance(message, ReserveKV) and self._roles[session.number] != "decode":
            raise Breach("I20", f"{session.worker_id} has told that it prefills and is asked for {request.request_id}")

    def check_books(self) -> None:
        """What the dispatcher's own predicates say."""
        for text in self._router.dispatcher.breaches():
            is_about_attempts = any(word in text for word in ("attempts failed", "strikes", "runs alone"))
            raise Breach("I11" if is_about_attempts else "I8", f"{self._router.place}: {text}")

    def on_mismatch(self) -> None:
        raise Breach("I6", f"{self._router.place} got two different tokens for one index")

    def check_failure(self, call: Call) -> None:
        """Nobody gives up before it must; an answer that has begun least of all."""
        request, code = call.request, call.error_code
        if code == "deadline_exceeded":
            has_begun = request.num_output_tokens > 0
            is_late = request.timeout_s is not None and request.timestamps["finished"] >= _deadline(request)
            has_limit = request.timeout_s is not None or request.objectives.ttft_s is not None
            is_fair = is_late or (has_limit and not has_begun)
        elif code in ("rate_limit_exceeded", "context_length_exceeded"):  # displaced by a more urgent one, or too large
            is_fair = not request.num_output_tokens
        else:
            is_fair = code in _OUTRIGHT or request.num_failures >= self._config.max_attempts
        if not is_fair:
            raise Breach("I8", f"{request.request_id} fails with {code} after {request.num_failures} failed attempts")


def _deadline(request: RouterRequest) -> float:
    assert request.timeout_s is not None
    return request.timestamps["queued"] + request.timeout_s


# --- workers ------------------------------------------------------------------------------------------------


def check_counts(name: str, pool: BlockPool) -> None:
    """I1, in constant time but for one count in C."""
    if isinstance(pool, FramePool):
        held = pool.num_blocks - pool._num_held.count(0)
        if held + pool.num_free_blocks != pool.num_blocks:
            raise Breach("I1", f"{name}: {held} and {pool.num_free_blocks} of {pool.num_blocks} frames")
        return
    owned = pool.num_blocks - pool._ref_counts.count(0)
    idle = len(pool._free) + len(pool._cached) + len(pool._resting) + pool.num_leaving_blocks
    total = idle + len(pool._quarantined) + owned
    if total != pool.num_blocks:
        raise Breach("I1", f"{name}: {total} of {pool.num_blocks} blocks")


def check_displaced(name: str, pool: BlockPool, receiver: KVReceiver) -> None:
    """F5."""
    if not pool.displaced:
        return
    written = {block for reservation in receiver.reservations.live.values() for block in reservation.block_ids}
    for block in pool.displaced:
        if not pool.ref_count(block) or block in written:
            raise Breach("F5", f"{name}: block {block} is {'a remote writer' if block in written else 'nobody'}'s")


def check_holders(name: str, pool: BlockPool, holders: Iterable[Iterable[BlockId]]) -> None:
    """I1 and I2: every reference has a holder that names it, and the pool's books agree."""
    try:
        pool.check()
    except AssertionError as error:
        raise Breach("I1", f"{name}: {error!r}") from error
    held = Counter(block for blocks in holders for block in blocks)
    for block in range(pool.num_ids):
        if held[block] != pool.ref_count(block):
            raise Breach("I2", f"{name}: block {block} has {pool.ref_count(block)} references, {held[block]} holders")


def check_reservations(name: str, pool: BlockPool, receiver: KVReceiver) -> None:
    """H3, H5, I13."""
    promised = []
    for reservation in receiver.reservations.live.values():
        if reservation.state is ReservationState.DOOMED:
            if not pool._quarantined.issuperset(reservation.block_ids):
                raise Breach("H3", f"{name}: {reservation.grant.grant_id} is doomed, its blocks are not in quarantine")
            continue
        if reservation.is_promise:
            promised.append(pool.num_frames(reservation.num_new_blocks, reservation.num_new_thin))
        for block in reservation.block_ids:
            if pool.ref_count(block) != 1 or block in pool._hash_of:
                raise Breach("H3", f"{name}: block {block} of {reservation.grant.grant_id} is not its own")
        for place, block in enumerate(reservation.hit_blocks):
            block_hash = reservation.block_hashes[place]
            forms = (block_hash, twin(block_hash)) if place < reservation.num_thin else (block_hash,)
            if pool.ref_count(block) < 1 or pool._hash_of.get(block) not in forms:
                raise Breach("H5", f"{name}: hit block {block} of {reservation.grant.grant_id} is not held")
    if promised and sum(promised) > max(MAX_PROMISED_SHARE * pool.num_blocks, max(promised)):
        raise Breach("I13", f"{name}: {promised} of {pool.num_blocks} blocks are promised")
