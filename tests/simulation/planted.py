"""Planted bugs of handoffs, blocks, the router and roles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SampledToken, Sequence
from kvferry.decode import known_kv
from kvferry.decode.sequence_blocks import SequenceBlocks
from kvferry.kvcache import contents
from kvferry.kvcache.blocks import BlockPool
from kvferry.prefill import role as prefill_role
from kvferry.prefill.role import PrefillRole
from kvferry.prefill.shipments import Shipments
from kvferry.router.dispatch import dispatcher
from kvferry.router.dispatch.deadlines import Deadlines, DeadlineVerdict
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.losses import Losses
from kvferry.router.dispatch.readers import Readers
from kvferry.router.dispatch.relay import Relay
from kvferry.router.dispatch.verdicts import Verdicts
from kvferry.router.dispatch.worker_messages import WorkerMessages
from kvferry.router.state.choice_state import ChoiceState, Drops
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.tracked_request import TrackedRequest
from kvferry.router.state.worker import RouterWorker
from kvferry.transfer.receive import reservations
from kvferry.transfer.receive.opens import Opens
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import Reservation, ReservationState
from kvferry.transfer.receive.rotation import Rotation
from kvferry.transfer.send.outgoing_agent import OutgoingAgent
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.send.shipment import Shipment, ShipmentState
from kvferry.wire.grants import GrantInfo
from kvferry.wire.handoff import KVOpen
from kvferry.wire.results import Grant, NoCapacity, PromptLogprobs
from kvferry.worker import core, parts
from kvferry.worker.roles import RoleName, RolePair

from . import routers, workers
from .planting import Planted

# --- handoff ------------------------------------------------------------------------------------------------


class _LeaseFrees(KVReceiver):
    """A lease that has run out frees the blocks: no fence."""

    def tick(self) -> None:
        super().tick()
        for reservation in self.reservations.in_state(ReservationState.DOOMED):
            self.endings.end_doomed(reservation)


class _NoQuarantinePool(BlockPool):
    """What is to go into quarantine is free at once."""

    def quarantine(self, blocks: Any) -> None:
        self.free(list(blocks))

    def release_quarantine(self, blocks: Any) -> None:
        """They are free."""


class _NoLease(KVReceiver):
    """An open is waited for whatever happens."""

    def tick(self) -> None:
        forever = self._clock.now() + 1e9
        deadlines = {}
        for reservation in self.reservations.in_state(ReservationState.OPEN):
            deadlines[reservation] = reservation.deadline
            reservation.deadline = forever
        super().tick()
        for reservation, deadline in deadlines.items():
            reservation.deadline = deadline


def _step_and_free(self: Rotation) -> None:
    """The blocks are free when a rotation is due, not when it has ended."""
    _step(self)
    if not self.timer.is_idle:
        for reservation in self._reservations.in_state(ReservationState.DOOMED):
            self._endings.end_doomed(reservation)
        self._condemned = []


_step = Rotation.step


def _accept_second(self: Opens, session: str, message: KVOpen, reservation: Reservation, writer: object) -> None:
    """Whoever has the grant may open it, also after another."""
    return None


class _TellsEarly(KVSender):
    """Says that everything has arrived when everything is posted."""

    def _settle(self, shipment: Shipment) -> None:
        if shipment.state is ShipmentState.SHIPPING and shipment.finished and shipment.is_posted:
            num_writes, shipment.num_writes = shipment.num_writes, 0
            super()._settle(shipment)
            shipment.num_writes = num_writes
        else:
            super()._settle(shipment)


def _due_for_others_alone(self: OutgoingAgent, now: float) -> bool:
    """An agent that could not be made is made when somebody needs the end of the one that is gone."""
    return self._closings.wants_new_agent(now) or (self._reader is not None and self._reader.wants_new_agent(now))


class _UnheldHits(KVReceiver):
    """The hit blocks of a grant are not held until it is adopted."""

    def reserve(self, spec: RequestSpec, router_id: str, **kwargs: Any) -> Grant | NoCapacity:
        answer = super().reserve(spec, router_id, **kwargs)
        reservation = self.reservations.of_request(spec.request_id)
        if isinstance(answer, Grant) and reservation is not None:
            self._pool.free([block for block in reservation.hit_blocks if self._pool.ref_count(block) == 1])
        return answer


class _PublishesEarly(KVReceiver):
    """A granted block can be found before its content has come."""

    def reserve(self, spec: RequestSpec, router_id: str, **kwargs: Any) -> Grant | NoCapacity:
        answer = super().reserve(spec, router_id, **kwargs)
        reservation = self.reservations.of_request(spec.request_id)
        if reservation is not None:
            blocks = reservation.hit_blocks + reservation.block_ids
            for block, block_hash in zip(blocks, reservation.block_hashes, strict=False):
                self._pool.publish(block, block_hash)
        return answer


class _NeverFences(KVReceiver):
    """Nothing stops a writer that does not say that it has ended."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "rotate": None})


# --- blocks -------------------------------------------------------------------------------------------------


class _LeakyPool(BlockPool):
    """Forgets a block now and then."""

    _frees = 0

    def free(self, blocks: Any) -> None:
        self._frees += 1
        super().free(blocks[1:] if self._frees % 50 == 0 else blocks)


class _LosingPool(BlockPool):
    """A block that comes out of quarantine is put nowhere."""

    def release_quarantine(self, blocks: Any) -> None:
        for block in blocks:
            self._quarantined.remove(block)


class _DoubleFreePool(BlockPool):
    """Frees the blocks of some sequence twice, if the first time left somebody else's reference."""

    _frees = 0

    def free(self, blocks: Any) -> None:
        super().free(blocks)
        self._frees += 1
        shared = [block for block in blocks if self.ref_count(block) > 0]
        if shared and self._frees % 10 == 0:
            super().free(shared[:1])


# --- router -------------------------------------------------------------------------------------------------


class _Repeating(ChoiceState):
    """Takes every token that comes, known or not."""

    __slots__ = ()

    def _accept_one(self, index: int, token: SampledToken, drops: Drops) -> None:
        if index < len(self.tokens) and self.finish is None:
            self.tokens.append(token)
        else:
            super()._accept_one(index, token, drops)


class _NoDedupe(Dispatcher):
    def submit(self, request: RouterRequest) -> TokenStream:
        request.choices = [_Repeating(request.sampling.max_tokens) for _ in range(request.n)]
        return super().submit(request)


def _current_of_any_attempt(self: WorkerMessages, worker: Any, request_id: str, attempt: int) -> Any:
    """Whoever speaks of a request that lives is believed."""
    return self._in_flight.get(request_id)


class _EndsTwice(Readers):
    """Tells the end of a request that a client leaves behind once more."""

    def _leave(self, tracked: TrackedRequest) -> None:
        super()._leave(tracked)
        self._in_flight._observer.on_finished(tracked.request)


class _IgnoresDrain(Dispatcher):
    """Tells the worker to drain and goes on to place requests there."""

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool:
        is_there = super().drain_worker(worker_id, deadline_s)
        worker = self._pools.named(worker_id)
        if worker is not None:
            worker.is_draining = False
        return is_there


def _counts_one_more(request: RouterRequest) -> int:
    return sum(len(choice.tokens) for choice in request.choices) + request.is_finished


def _judge_without_deadline(self: Deadlines, live: Any, now_s: float) -> Any:
    deadline_s, live.deadline_s = live.deadline_s, None
    try:
        return _judge_deadline(self, live, now_s)
    finally:
        live.deadline_s = deadline_s


_judge_deadline = Deadlines.judge_deadline


def _give_up_early(self: Deadlines, live: Any, now_s: float) -> Any:
    """A request ends when every pair has failed it once, whatever attempts it has left."""
    found = _judge_deadline(self, live, now_s)
    return StreamError("no other pair", "handoff_failed", 500) if found is DeadlineVerdict.TRY_AGAIN else found


def _forget_the_lost(self: Losses, worker: Any, reason: str, now_s: float) -> None:
    """Nobody goes on with what a lost worker had."""


def _has_always_one(self: Verdicts, tracked: TrackedRequest) -> bool:
    return False


def _share_all(self: SequenceBlocks, parent: Sequence, child: Sequence) -> bool:
    """Choices share also the partial last block of their prompt."""
    self._pool.pin(parent.block_table)
    child.block_table = list(parent.block_table)
    child.num_computed_tokens = parent.num_computed_tokens
    child.num_published_blocks = parent.num_computed_tokens // self._pool.block_size
    return True


def _keep_source(self: Shipments, open_id: int) -> None:
    """The source blocks of a shipment are never given back."""


# --- roles --------------------------------------------------------------------------------------------------


class _ForgetsReservations(RolePair):
    """A role change forgets who is to write here."""

    def set_role(self, role: RoleName) -> None:
        super().set_role(role)
        books = self.decode.receiver.reservations
        for reservation in books.in_state(ReservationState.GRANTED):
            books.end_attempt(reservation, arrived=False)
            books.remove(reservation)


class _DropsStarted(RolePair):
    """A role change ends the prompts that were begun."""

    def set_role(self, role: RoleName) -> None:
        super().set_role(role)
        for task in list(self.prefill._tasks):
            self.prefill._tasks.end(task, "another role")


class _TakesAnyPrompt(PrefillRole):
    """Prompts are taken whatever the role is."""

    def _refusal(self, spec: RequestSpec, grant: GrantInfo) -> tuple[str, str] | None:
        is_active, self.is_active = self.is_active, True
        try:
            return super()._refusal(spec, grant)
        finally:
            self.is_active = is_active


class _GrantsAlways(KVReceiver):
    """Blocks are granted whatever the role is."""

    def reserve(self, spec: RequestSpec, router_id: str, **kwargs: Any) -> Grant | NoCapacity:
        is_active, self.is_active = self.is_active, True
        try:
            return super().reserve(spec, router_id, **kwargs)
        finally:
            self.is_active = is_active


class _UndoesDrain(RolePair):
    """A worker that gets a role takes work, whether it drains or not."""

    def set_role(self, role: RoleName) -> None:
        super().set_role(role)
        self.draining = False


def _keep_first_role(self: RouterWorker, role: str) -> None:
    """The router goes by the role of the worker's hello."""


def _take_pieces_as_they_come(self: Relay, tracked: Any, message: PromptLogprobs) -> None:
    """Log-probabilities of the prompt are added in the order in which they come."""
    tracked.request.prompt_logprobs.extend(message.tokens)
    if len(tracked.request.prompt_logprobs) >= tracked.request.num_prompt_tokens - 1:
        self.release(tracked)


def _salt_of_all(spec: KVCacheSpec, cache_salt: bytes, adapter: str) -> bytes:
    """Every tenant finds every other's blocks."""
    return b"all"


def _made_of(kind: type[BlockPool]) -> Callable[[KVCacheSpec, int], BlockPool]:
    """Have all pools be of this kind."""
    return lambda spec, num_blocks: kind(num_blocks, spec.block_size)


BUGS = (
    Planted("a lease that runs out frees", frozenset({"H1"}), patches=((parts, "KVReceiver", _LeaseFrees),)),
    Planted("no quarantine", frozenset({"H3"}), patches=((workers, "block_pool", _made_of(_NoQuarantinePool)),)),
    Planted("no lease", frozenset({"I5"}), patches=((parts, "KVReceiver", _NoLease),)),
    Planted(
        "free before the rotation",
        frozenset({"H1"}),
        patches=((Rotation, "step", _step_and_free),),
        within_seeds=120,
    ),
    Planted(
        "a grant opened twice",
        frozenset({"H4"}),
        patches=((Opens, "_refuse_second", _accept_second),),
        within_seeds=400,
    ),
    Planted("told before it is written", frozenset({"H1", "H2"}), patches=((workers, "KVSender", _TellsEarly),)),
    Planted(
        "an agent that could not be made is not made later",
        frozenset({"I15", "I16"}),
        patches=((OutgoingAgent, "is_due", _due_for_others_alone),),
        within_seeds=400,
    ),
    Planted("hits are not held", frozenset({"H5"}), patches=((parts, "KVReceiver", _UnheldHits),)),
    Planted("published before it came", frozenset({"H3", "H6"}), patches=((parts, "KVReceiver", _PublishesEarly),)),
    Planted("never fenced", frozenset({"H8"}), patches=((parts, "KVReceiver", _NeverFences),)),
    Planted("a block leaks", frozenset({"I2"}), patches=((workers, "block_pool", _made_of(_LeakyPool)),)),
    Planted("a block is lost", frozenset({"I1"}), patches=((workers, "block_pool", _made_of(_LosingPool)),)),
    Planted("a block is freed twice", frozenset({"I2"}), patches=((workers, "block_pool", _made_of(_DoubleFreePool)),)),
    Planted("repeated tokens are taken", frozenset({"I6"}), patches=((routers, "Dispatcher", _NoDedupe),)),
    Planted(
        "any attempt may speak",
        frozenset({"I7"}),
        patches=((WorkerMessages, "_current", _current_of_any_attempt),),
        within_seeds=200,
    ),
    Planted("a request ends twice", frozenset({"I8"}), patches=((dispatcher, "Readers", _EndsTwice),)),
    Planted("draining is ignored", frozenset({"I12"}), patches=((routers, "Dispatcher", _IgnoresDrain),)),
    Planted(
        "usage is one too high",
        frozenset({"I9"}),
        patches=((RouterRequest, "num_output_tokens", property(_counts_one_more)),),
    ),
    Planted(
        "deadlines do not matter", frozenset({"I10"}), patches=((Deadlines, "judge_deadline", _judge_without_deadline),)
    ),
    Planted(
        "given up early",
        frozenset({"I8"}),
        patches=((Deadlines, "judge_deadline", _give_up_early),),
        within_seeds=200,
    ),
    Planted("attempts without end", frozenset({"I11"}), patches=((Verdicts, "has_no_attempt_left", _has_always_one),)),
    Planted("lost workers do not matter", frozenset({"I16"}), patches=((Losses, "on_left", _forget_the_lost),)),
    Planted("choices share a partial block", frozenset({"I3"}), patches=((SequenceBlocks, "share", _share_all),)),
    Planted("source blocks are kept", frozenset({"I15", "I16"}), patches=((Shipments, "source_free", _keep_source),)),
    Planted(
        "tenants share a cache",
        frozenset({"F2", "H2"}),
        patches=tuple((module, "prefix_salt", _salt_of_all) for module in (known_kv, contents, prefill_role)),
    ),
    Planted(
        "a role change forgets reservations", frozenset({"I19"}), patches=((core, "RolePair", _ForgetsReservations),)
    ),
    Planted("a role change drops started prompts", frozenset({"I19"}), patches=((core, "RolePair", _DropsStarted),)),
    Planted("prompts are taken in any role", frozenset({"I18"}), patches=((parts, "PrefillRole", _TakesAnyPrompt),)),
    Planted("blocks are granted in any role", frozenset({"I18"}), patches=((parts, "KVReceiver", _GrantsAlways),)),
    Planted("a role change undoes a drain", frozenset({"I12"}), patches=((core, "RolePair", _UndoesDrain),)),
    Planted("roles are not noted", frozenset({"I16", "I20"}), patches=((RouterWorker, "set_role", _keep_first_role),)),
    Planted(
        "prompt logprobs are taken twice",
        frozenset({"I21"}),
        patches=((Relay, "accept_prompt_logprobs", _take_pieces_as_they_come),),
    ),
    Planted("promises without bound", frozenset({"I13"}), patches=((reservations, "MAX_PROMISED_SHARE", 1.0),)),
)
