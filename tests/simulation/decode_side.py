"""A worker's decode side: reservations and arrivals, adoption, and the rotation of the agent that is written to."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

from kvferry.common.errors import TransferError
from kvferry.common.messages import KVArrived, KVOpened, Message
from kvferry.decode.role import DecodeRole
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import Reservation, ReservationState

from .breach import Breach
from .fabric import Flight
from .invariants import check_reservations
from .network import End
from .oracle import EOS
from .sessions import VERSION

if TYPE_CHECKING:
    from .workers import Worker
    from .world import World


class DecodeSide:
    """The receiver's end of handoffs: what `worker/decode_side.py` is in a process."""

    def __init__(self, world: World, worker: Worker) -> None:
        scenario, parts = world.scenario, world.parts
        place, incarnation = worker.place, worker.incarnation
        self._world = world
        self._worker = worker
        self.kv_address = f"{place}:{incarnation % 50000 + 1}"
        self.receiver: KVReceiver = parts.receiver(
            worker_id=place,
            incarnation=incarnation,
            spec=scenario.spec,
            tp_size=1,
            pool=worker.pool,
            regions=(worker.incoming.region(),),
            kv_address=self.kv_address,
            config=scenario.transfer,
            clock=worker.clock,
            version=VERSION,
            transport=worker.incoming.name,
            to_router=worker.to_router,
            to_peer=self._to_peer,
            rotate=self._rotate,
            watch=world.watch,
        )
        self._adopt = self.receiver.adopt
        self.receiver.adopt = self._check_adopted  # type: ignore[method-assign]
        self.role: DecodeRole = parts.decode_role(
            pool=worker.pool,
            spec=scenario.spec,
            receiver=self.receiver,
            clock=worker.clock,
            to_router=worker.to_router,
            eos_token_ids=frozenset({EOS}),
            max_model_len=scenario.max_model_len,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            max_num_seqs=scenario.max_num_seqs,
            num_swap_blocks=scenario.num_swap_blocks,
            cache=worker.cache,
        )
        worker.incoming.right = self
        worker.incoming.on_arrived = self._on_arrived
        self._ends: dict[str, End] = {}  # sessions of prefill workers
        self._numbers = count(1)
        self._opened: dict[int, int] = {}  # epoch -> the open id that was answered with KVOpened
        world.addresses[self.kv_address] = worker

    # --- handoffs -------------------------------------------------------------------------------------------

    def accept(self, end: End, peer: str) -> None:
        session = f"{peer}#{next(self._numbers)}"
        self._ends[session] = end
        end.on_message = lambda message: self._on_message(session, message)
        end.on_closed = lambda: self._on_prefill_lost(session)

    def _on_message(self, session: str, message: Message) -> None:
        self.receiver.on_message(session, message)  # type: ignore[arg-type]
        self._worker.after_change()

    def _on_prefill_lost(self, session: str) -> None:
        del self._ends[session]
        self.receiver.on_session_lost(session)
        self._worker.after_change()

    def _on_arrived(self, message: KVArrived) -> None:
        self.receiver.on_arrived(0, message)
        self._worker.after_change()

    def _rotate(self, generation: int) -> None:
        """On the transfer thread, which tells the receiver when it is done."""
        self._worker.process.after(self._world.scenario.rotation_s, self._on_rotated, generation)

    def _on_rotated(self, generation: int) -> None:
        try:
            region = self._worker.incoming.rotate(generation)
        except TransferError:
            self.receiver.rotation_failed()
        else:
            self.receiver.rotated((region,))
        self._worker.after_change()

    def _to_peer(self, session: str, message: Message) -> None:
        if isinstance(message, KVOpened):
            epoch = message.grant_id.epoch
            if self._opened.setdefault(epoch, message.open_id) != message.open_id:
                raise Breach("H4", f"{self._worker.place} opens {message.grant_id} for a second open_id")
        end = self._ends.get(session)
        if end is not None:
            end.send(message)

    def check_leases(self) -> None:
        """I5, after the receiver has looked at its clock."""
        now = self._worker.clock.now()
        for reservation in self.receiver.reservations.live.values():
            if reservation.is_promise and now >= reservation.deadline:
                text = f"{reservation.grant.grant_id} is {reservation.state.value}"
                raise Breach("I5", f"{self._worker.place}: {text} {now - reservation.deadline:.1f} s after its lease")

    # --- invariants -----------------------------------------------------------------------------------------

    def check_landing(self, flight: Flight, blocks: set[int]) -> None:
        """H1: these blocks are about to be written."""
        grant_id = flight.grant_id
        reservation = None
        if (grant_id.worker_id, grant_id.incarnation) == (self._worker.place, self._worker.incarnation):
            reservation = self.receiver.reservations.live.get(grant_id.epoch)
        state = reservation.state if reservation is not None else None
        text = f"{flight.source.place} writes blocks {sorted(blocks)} of {self._worker.place} under {grant_id}"
        if state not in (ReservationState.OPEN, ReservationState.DOOMED):
            raise Breach("H1", f"{text}, which is {state.value if state is not None else 'over'}")
        assert reservation is not None and reservation.writer is not None
        if reservation.writer.open_id != flight.open_id or not blocks <= set(reservation.block_ids):
            raise Breach("H1", f"{text}: another open, or blocks that are not the grant's")
        self._world.tally.seen["landings in quarantine"] += state is ReservationState.DOOMED
        if state is ReservationState.DOOMED and not self._worker.pool._quarantined.issuperset(blocks):
            raise Breach("H3", f"{text}, some of which are not in quarantine")
        if any(block in self._worker.pool._hash_of for block in blocks):
            raise Breach("H6", f"{text}, one of which is published")

    def _check_adopted(self, reservation: Reservation) -> tuple[list[int], list[int]]:
        """H2: all of the prompt's KV is here."""
        self._world.pass_point("adopt", self._worker)
        spec = reservation.spec
        answer = self._world.oracles[spec.request_id].answers[spec.choices[0]]
        blocks = reservation.hit_blocks + reservation.block_ids
        self._worker.memory.check(
            blocks, answer, spec.num_prompt_tokens, f"{self._worker.place}, adopting {spec.request_id},"
        )
        return self._adopt(reservation)

    def check_books(self) -> None:
        """H3, H5, I13, and what the role's own predicates say."""
        check_reservations(self._worker.place, self._worker.pool, self.receiver)
        try:
            self.role.check()
        except AssertionError as error:
            raise Breach("I1", f"{self._worker.place}: {error!r}") from error

    @property
    def has_handoffs(self) -> bool:
        """Reservations that have not ended."""
        return self.receiver.num_live > 0
