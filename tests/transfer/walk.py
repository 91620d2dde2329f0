"""A decode worker and two prefill workers whose messages, writes, processes and agents go wrong in any order.

The receiver, the pool and the senders are real; the transport is `LocalNetwork`, whose writes may come late, also after
their writer's death. Pages are filled with the open they are shipped under, so that whose bytes stand in a block is
seen at every landing and every adoption. Prefill worker 0 is on the decode worker's host and copies by itself; worker 1
is reached through the network alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from kvferry.common.config import TransferConfig
from kvferry.common.errors import TransferError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.base import TransferHandle, TransferState
from kvferry.transfer.backends.local import LocalBackend, LocalFault, LocalHandle, LocalNetwork
from kvferry.transfer.protocol.checksums import ArrivalCheck, PageSums
from kvferry.transfer.receive import invariants
from kvferry.transfer.receive.processes import ProcessWatch
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import ReservationState
from kvferry.transfer.send.sender import KVSender
from kvferry.wire.codec import Decoder
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantInfo, ProcessMark
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.results import Grant, HandoffDone, HandoffFailed

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=2, block_size=4, dtype="float32")
R = "r-0"
NUM_BLOCKS, NUM_SOURCE_BLOCKS = 16, 256
NUM_PEERS = 2
_arrived: Decoder[KVArrived] = Decoder(KVArrived)


def _pages(num_blocks: int) -> torch.Tensor:
    return torch.zeros(SPEC.num_layers, num_blocks, 2, 1, SPEC.block_size, SPEC.head_dim)


def prompt(request_id: str, attempt: int, num_tokens: int, first: int, num_choices: int) -> RequestSpec:
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        prompt=pack_ids(list(range(first, first + num_tokens))),
        sampling=SamplingParams(),
        choices=tuple(range(num_choices)),
    )


class StoppableBackend(LocalBackend):
    """What a stopped process was about to post, after its look at the clock, is posted when the process goes on."""

    is_stopping = False

    def __init__(self, agent: str, network: LocalNetwork, *, copies_itself: bool) -> None:
        super().__init__(agent, network, copies_itself=copies_itself)
        self.delayed: list[LocalHandle] = []

    def write(
        self, agent: str, local_pages: Sequence[int], remote_pages: Sequence[int], notify: bytes = b""
    ) -> LocalHandle:
        if not self.is_stopping:
            return super().write(agent, local_pages, remote_pages, notify)
        handle = LocalHandle(
            self, self._peer(agent), self._pieces[agent], list(local_pages), list(remote_pages), b"",
            SPEC.page_bytes() * len(local_pages), 0.0, agent, is_copy=self.copies_itself,
        )  # fmt: skip
        self.delayed.append(handle)
        return handle

    def poll(self, handle: TransferHandle) -> TransferState:
        assert isinstance(handle, LocalHandle)
        return handle.state if handle in self.delayed else super().poll(handle)

    def go_on(self) -> None:
        delayed, self.delayed = self.delayed, []
        for handle in delayed:
            fault = self.network.fault(handle.agent)
            if handle.is_copy and handle.target.agent in self.network.agents:
                handle.land()  # no agent takes part: the target's process lives, and that is enough
            elif fault is LocalFault.GONE:
                handle.state = TransferState.FAILED
            elif fault in (LocalFault.HOLD, LocalFault.FAIL, LocalFault.STALL):
                self.network.late.append(handle)


class Prefill:
    """One prefill worker's process."""

    def __init__(self, walk: Walk, number: int, incarnation: int) -> None:
        self.number = number
        self.incarnation = incarnation
        self.is_here = number == 0
        self.is_stopped = False
        self.backend = StoppableBackend(f"p-{number}.{incarnation}.0.0", walk.network, copies_itself=self.is_here)
        self.pages = _pages(NUM_SOURCE_BLOCKS)
        self.backend.register(self.pages, rank=0, tp_size=1, generation=0)
        self.session = 1
        self.to_decode: list[tuple[str, Message]] = []
        self.to_prefill: list[Message] = []
        self.tasks: dict[int, Task] = {}
        self.open_of_block: dict[int, int] = {}  # the last that it was shipped under
        self.next_block = 0
        self.freed: list[int] = []
        mark = ProcessMark("here", incarnation, 1)
        self.sender = KVSender(
            rank=0,
            tp_size=1,
            worker_id=f"p-{number}",
            incarnation=incarnation,
            version="0.1.0",
            backend=self.backend,
            spec=SPEC,
            num_blocks=NUM_SOURCE_BLOCKS,
            clock=walk.clock,
            config=TransferConfig(),
            to_peer=lambda address, message: self.to_decode.append((address, message)),
            report=lambda open_id, report: None,
            source_free=self.freed.append,
            sums=PageSums(self.pages),
            processes=(mark,) if self.is_here else (),
            max_write_bytes=3 * SPEC.page_bytes(),
        )

    @property
    def session_name(self) -> str:
        return f"p-{self.incarnation}#{self.session}"


@dataclass(slots=True, eq=False)
class Task:
    """A shipment as its prefill worker sees it."""

    open_id: int
    grant: GrantInfo
    local_blocks: tuple[int, ...]
    num_layers: int = 0  # computed
    finished: bool = False


@dataclass(slots=True)
class ProcessEnd:
    """Implements `ProcessWatch` for a prefill worker of the walk."""

    prefill: Prefill
    ended: set[int]

    @property
    def has_ended(self) -> bool:
        return self.prefill.incarnation in self.ended

    def close(self) -> None:
        pass


class Walk:
    """Everything that can happen, as methods. A test plants a bug by changing the class's attributes."""

    receiver_type: type[KVReceiver] = KVReceiver
    rotates = True  # False: a rotation is reported that has not been made
    watches = True  # False: writers of this host are taken for ones of other hosts
    checks_bytes = True  # False: nobody looks at what has arrived

    def __init__(self) -> None:
        self.clock = FakeClock(10.0)
        self.network = LocalNetwork()
        self.network.on_land = self._on_land
        self.incarnations = itertools.count(100)
        self.open_ids = itertools.count(1)
        self.attempts: dict[str, int] = {}
        self.grants: list[tuple[GrantInfo, str, int]] = []
        self.ended: set[int] = set()  # incarnations of prefill workers whose process has ended
        self.history = invariants.OpenHistory()
        self.link_fault: LocalFault | None = None
        self.outcomes: list[Message] = []
        self.num_adopted = self.num_rotations = 0
        self.dead: list[Prefill] = []
        self.peers = [Prefill(self, number, next(self.incarnations)) for number in range(NUM_PEERS)]
        self._start_decode()

    def _start_decode(self) -> None:
        incarnation = next(self.incarnations)
        self.pool = BlockPool(NUM_BLOCKS, SPEC.block_size)
        self.pages = _pages(NUM_BLOCKS)
        self.backend = LocalBackend(f"d-0.{incarnation}.0.0", self.network)
        region = self.backend.register(self.pages, rank=0, tp_size=1, generation=0)
        self.check = ArrivalCheck(PageSums(self.pages), SPEC, rank=0, tp_size=1, num_blocks=NUM_BLOCKS)
        self.kv_address = f"127.0.0.1:{incarnation}"
        self.rotation: int | None = None  # the generation that was asked for
        self.notifications: list[KVArrived] = []
        self.sequences: list[list[int]] = []
        self.to_peer: list[tuple[str, Message]] = []
        self.receiver = self.receiver_type(
            worker_id="d-0",
            incarnation=incarnation,
            spec=SPEC,
            tp_size=1,
            pool=self.pool,
            regions=(region,),
            kv_address=self.kv_address,
            config=TransferConfig(),
            clock=self.clock,
            version="0.1.0",
            transport="local",
            to_router=lambda router, message: self.outcomes.append(message),
            to_peer=lambda session, message: self.to_peer.append((session, message)),
            rotate=self._ask_for_rotation,
            watch=self._watch,
            checks_bytes=self.checks_bytes,
        )
        if self.link_fault is not None:
            self.network.set_fault(self.backend.agent, self.link_fault)
        self.plant()

    def plant(self) -> None:
        """Where a test puts its bug into the decode worker."""

    def _watch(self, marks: Sequence[ProcessMark]) -> ProcessWatch | None:
        if not marks or not self.watches:
            return None
        found = [peer for peer in self.peers if peer.incarnation == marks[0].pid]
        if not found:
            raise ProcessLookupError(f"process {marks[0].pid} has ended")
        return ProcessEnd(found[0], self.ended)

    # --- what is checked --------------------------------------------------------------------------------

    def _on_land(self, handle: LocalHandle) -> None:
        """H1, with the open that the bytes were shipped under."""
        if handle.target is not self.backend:
            return  # the memory of a process that has ended
        source = next(peer for peer in self.peers + self.dead if peer.backend is handle.source)
        [open_id] = {source.open_of_block[page % NUM_SOURCE_BLOCKS] for page in handle.local_pages}
        invariants.check_landing(self.receiver, {page % NUM_BLOCKS for page in handle.remote_pages}, open_id)

    def check_invariants(self) -> None:
        invariants.check_all(self.receiver, self.pool, self.sequences)
        self.history.check(self.receiver)

    # --- the router -------------------------------------------------------------------------------------

    def request(self, name: str, num_tokens: int, num_choices: int, peers: Sequence[int]) -> None:
        """A new attempt. Its task may reach nobody, two workers, or one of them twice."""
        self.attempts[name] = attempt = self.attempts.get(name, -1) + 1
        first = 0 if name == "a" else 100 * (attempt + 1)  # one of them repeats its prompt: hits
        answer = self.receiver.reserve(prompt(name, attempt, num_tokens, first, num_choices), R)
        if isinstance(answer, Grant):
            self.grants.append((answer.grant, name, attempt))
            for peer in peers:
                self._deliver_task(answer.grant, name, attempt, peer)

    def deliver_late(self, back: int, peer: int) -> None:
        """A task that was delivered before or never, whatever became of its grant and of who gave it."""
        if self.grants:
            self._deliver_task(*self.grants[-min(back, len(self.grants))], peer)

    def _deliver_task(self, grant: GrantInfo, name: str, attempt: int, number: int) -> None:
        peer = self.peers[number]
        if peer.is_stopped:
            return
        start = peer.next_block
        peer.next_block = (start + len(grant.block_ids)) % 200
        task = Task(next(self.open_ids), grant, tuple(range(start, start + len(grant.block_ids))))
        peer.tasks[task.open_id] = task
        peer.pages[:, list(task.local_blocks)] = float(task.open_id)
        peer.open_of_block.update(dict.fromkeys(task.local_blocks, task.open_id))
        peer.sender.open(task.open_id, name, attempt, grant)
        self._collect(peer)

    def abort(self, name: str, unless_arrived: bool) -> None:
        self.receiver.abort(name, self.attempts.get(name, 0), unless_arrived=unless_arrived)
        self._sort_answers()

    # --- prefill workers --------------------------------------------------------------------------------

    def cancel(self, number: int) -> None:
        """The prefill worker's side of an abort: its oldest task."""
        peer = self.peers[number]
        if not peer.is_stopped:
            for task in list(peer.tasks.values())[:1]:
                peer.sender.cancel(task.open_id, "aborted")
            self._collect(peer)

    def progress(self, number: int, rounds: int, hears: int, answers: int, arrives: bool) -> None:
        """A layer of each task, the transfer thread's turn, messages both ways: all of them, one or none."""
        peer = self.peers[number]
        for _ in range(rounds):
            if not peer.is_stopped:
                for task in list(peer.tasks.values()):
                    self._compute(peer, task)
                self._step(peer)
            for _ in range(min(hears, len(peer.to_decode))):
                self._hear(peer)
            if not peer.is_stopped:
                for _ in range(min(answers, len(peer.to_prefill))):
                    self._answer(peer, peer.to_prefill.pop(0))
                self._step(peer)
        if arrives:
            self.deliver_all()

    def _compute(self, peer: Prefill, task: Task) -> None:
        if task.num_layers < SPEC.num_layers:
            peer.sender.pages_ready(task.open_id, task.num_layers, task.local_blocks, task.grant.block_ids)
            task.num_layers += 1
        elif not task.finished:
            task.finished = True
            peer.sender.finish(task.open_id, ())

    def _step(self, peer: Prefill) -> None:
        peer.sender.step()
        self._collect(peer)

    def _hear(self, peer: Prefill) -> None:
        address, message = peer.to_decode.pop(0)
        assert isinstance(message, KVOpen | KVRenew | KVClosed)
        if address == self.kv_address:
            self.receiver.on_message(peer.session_name, message)
            self._sort_answers()

    def _answer(self, peer: Prefill, message: Message) -> None:
        assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
        peer.sender.on_message(message)
        self._collect(peer)

    def _collect(self, peer: Prefill) -> None:
        """Source blocks that are free are overwritten at once."""
        for open_id in peer.freed:
            task = peer.tasks.pop(open_id)
            peer.pages[:, list(task.local_blocks)] = -1.0
        peer.freed.clear()
        self.notifications += [_arrived.decode(payload) for _, payload in self.backend.notifications()]

    def stop(self, number: int, posts: bool) -> None:
        """SIGSTOP; `posts`: in the middle of a turn, between the look at the clock and a post."""
        peer = self.peers[number]
        if peer.is_stopped:
            return
        if posts:
            peer.backend.is_stopping = True
            self._step(peer)
            peer.backend.is_stopping = False
        peer.is_stopped = True

    def resume(self, number: int) -> None:
        """SIGCONT: first of all, what was about to be posted is."""
        peer = self.peers[number]
        peer.is_stopped = False
        peer.backend.go_on()

    def crash(self, number: int, is_noticed: bool) -> None:
        """The process ends and another takes its place; what it gave to the network is on its way still."""
        peer = self.peers[number]
        self.network.end_process(peer.backend)
        peer.backend.delayed.clear()
        self.ended.add(peer.incarnation)
        if is_noticed:
            self.receiver.on_session_lost(peer.session_name)
        self.dead.append(peer)
        self.peers[number] = Prefill(self, number, next(self.incarnations))
        self._sort_answers()

    def lose_connection(self, number: int) -> None:
        peer = self.peers[number]
        peer.to_decode.clear()
        peer.to_prefill.clear()
        old = peer.session_name
        peer.session += 1
        if not peer.is_stopped:
            peer.sender.on_peer_lost(self.kv_address)
            self._collect(peer)
        self.receiver.on_session_lost(old)
        self._sort_answers()

    # --- deliveries, late, lost and doubled -------------------------------------------------------------

    def _sort_answers(self) -> None:
        for session, message in self.to_peer:
            for peer in self.peers:
                if peer.session_name == session:  # a session that has ended gets nothing
                    peer.to_prefill.append(message)
        self.to_peer.clear()

    def _arrive(self, message: KVArrived) -> None:
        self.receiver.on_arrived(0, message, self.check.verdict(message))

    def deliver_all(self) -> None:
        while self.notifications:
            self._arrive(self.notifications.pop(0))
        self._sort_answers()

    def deliver_notification(self, index: int, fate: str) -> None:
        if self.notifications:
            index %= len(self.notifications)
            message = self.notifications[index] if fate == "double" else self.notifications.pop(index)
            if fate != "lose":
                self._arrive(message)
            self._sort_answers()

    def spoil(self) -> None:
        """Bytes that have arrived in a block, and were not looked at, are others now."""
        for reservation in self.receiver.reservations.in_state(ReservationState.OPEN):
            assert reservation.writer is not None
            page = self.pages[0, reservation.block_ids[0]]
            page[page == float(reservation.writer.open_id)] = -7.0

    # --- the decode worker ------------------------------------------------------------------------------

    def _ask_for_rotation(self, generation: int) -> None:
        self.rotation = generation

    def finish_rotation(self, succeeds: bool) -> None:
        """The transfer thread has come to it: arrivals first, then the agent."""
        if self.rotation is None:
            return
        self.deliver_all()
        generation, self.rotation = self.rotation, None
        if not self.rotates:
            region = msgspec.structs.replace(self.receiver.rotation.regions[0], generation=generation)
            self.receiver.rotated((region,))
            return
        self.network.can_make_agents = succeeds
        try:
            region = self.backend.rotate(generation)
        except TransferError:
            self.receiver.rotation_failed()
        else:
            self.num_rotations += 1
            if self.link_fault is not None:
                self.network.set_fault(self.backend.agent, self.link_fault)
            self.receiver.rotated((region,))
        self.network.can_make_agents = True
        self._sort_answers()

    def restart_decode(self) -> None:
        """It dies with all of its memory, and another life of it begins."""
        self.backend.close()
        address = self.kv_address
        self._start_decode()
        for peer in self.peers:
            peer.session += 1
            peer.to_prefill.clear()
            if not peer.is_stopped:
                peer.sender.on_peer_lost(address)
                self._collect(peer)

    def schedule(self, adopts: bool, finishes: bool) -> None:
        if adopts and self.receiver.arrived:
            self._adopt()
        if finishes and self.sequences:
            self.pool.free(self.sequences.pop(0))

    def _adopt(self) -> None:
        """H2: all pairs have told, and all bytes are those of the bound open."""
        reservation = self.receiver.arrived[0]
        invariants.check_complete(reservation)
        assert reservation.writer is not None
        for block in reservation.block_ids:
            assert (self.pages[:, block] == float(reservation.writer.open_id)).all(), f"block {block} holds other bytes"
        blocks, copies = self.receiver.adopt(reservation)
        assert len(set(blocks + copies)) == len(blocks + copies)
        self.sequences.append(blocks + copies)
        self.num_adopted += 1

    # --- the network and time ---------------------------------------------------------------------------

    def set_link(self, fault: LocalFault | None) -> None:
        self.link_fault = fault
        if fault is None:
            for agent in {handle.agent for handle in self.network.late} | {self.backend.agent}:
                self.network.clear_fault(agent)
        else:
            self.network.set_fault(self.backend.agent, fault)

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.receiver.tick()
        self._sort_answers()

    # --- the end ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """H8: once faults have stopped, everything ends within 30 s, and every block comes back."""
        self.set_link(None)
        for number, peer in enumerate(self.peers):
            if peer.is_stopped:
                self.resume(number)
        for _ in range(120):
            for number in range(NUM_PEERS):
                self.progress(number, 1, 99, 99, True)
            while self.receiver.arrived:
                self._adopt()
            self.finish_rotation(succeeds=True)
            self.wait(0.25)
            self.check_invariants()
        for blocks in self.sequences:
            self.pool.free(blocks)
        self.sequences.clear()
        live = {epoch: found.state.value for epoch, found in self.receiver.reservations.live.items()}
        assert not live, f"after 30 quiet seconds: {live}"
        for peer in self.peers:
            assert peer.sender.num_unfinished == 0 and not peer.tasks
        self.pool.check()
        assert self.pool.num_free_blocks == NUM_BLOCKS
        assert all(isinstance(message, HandoffDone | HandoffFailed) for message in self.outcomes)
