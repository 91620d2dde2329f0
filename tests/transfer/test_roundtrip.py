"""Sender and receiver together: heads for unequal ranks byte by byte, and a random walk over what can go wrong."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.blocks import BlockPool, KVCacheSpec
from kvferry.common.clock import FakeClock
from kvferry.common.config import TransferConfig
from kvferry.common.messages import (
    CancelKV,
    Decoder,
    Grant,
    GrantInfo,
    HandoffDone,
    HandoffFailed,
    KVArrived,
    KVClosed,
    KVDone,
    KVOpen,
    KVOpened,
    KVRefused,
    KVRenew,
    KVRenewed,
    Message,
)
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.transfer.local import LocalBackend, LocalFault, LocalHandle, LocalNetwork
from kvferry.transfer.receiver import KVReceiver, ReservationState
from kvferry.transfer.sender import KVSender

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=2, block_size=4, dtype="float32")
R, KV = "r-0", "127.0.0.1:1"
_arrived: Decoder[KVArrived] = Decoder(KVArrived)


def _pages(num_blocks: int, tp_size: int) -> torch.Tensor:
    return torch.zeros(SPEC.num_layers, num_blocks, 2, SPEC.num_kv_heads // tp_size, SPEC.block_size, SPEC.head_dim)


def _prompt(request_id: str, attempt: int, num_tokens: int, first: int, choices: tuple[int, ...] = (0,)) -> RequestSpec:
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        prompt=pack_ids(list(range(first, first + num_tokens))),
        sampling=SamplingParams(),
        choices=choices,
    )


class DecodeSide:
    """A decode worker of `tp_size` ranks."""

    def __init__(self, clock: FakeClock, network: LocalNetwork, num_blocks: int, tp_size: int = 1) -> None:
        self.pool = BlockPool(num_blocks, SPEC.block_size)
        self.pages = [_pages(num_blocks, tp_size) for _ in range(tp_size)]
        self.backends = [LocalBackend(f"d-0.1.0.{rank}", network) for rank in range(tp_size)]
        regions = [
            backend.register(pages, rank=rank, tp_size=tp_size, generation=0)
            for rank, (backend, pages) in enumerate(zip(self.backends, self.pages, strict=True))
        ]
        self.to_router: list[Message] = []
        self.to_peer: list[tuple[str, Message]] = []
        self.receiver = KVReceiver(
            worker_id="d-0",
            incarnation=1,
            spec=SPEC,
            tp_size=tp_size,
            pool=self.pool,
            regions=tuple(regions),
            kv_address=KV,
            config=TransferConfig(),
            clock=clock,
            version="0.1.0",
            transport="local",
            to_router=lambda router, message: self.to_router.append(message),
            to_peer=lambda session, message: self.to_peer.append((session, message)),
        )

    def notifications(self) -> list[tuple[int, KVArrived]]:
        return [
            (rank, _arrived.decode(payload))
            for rank, backend in enumerate(self.backends)
            for _, payload in backend.notifications()
        ]


class PrefillSide:
    """One rank of a prefill worker."""

    def __init__(
        self, clock: FakeClock, network: LocalNetwork, number: int, num_blocks: int, rank: int = 0, tp_size: int = 1
    ) -> None:
        self.incarnation = 100 + number
        self.agent = f"p-{number}.{self.incarnation}.0.{rank}"
        self.backend = LocalBackend(self.agent, network)
        self.pages = _pages(num_blocks, tp_size)
        self.backend.register(self.pages, rank=rank, tp_size=tp_size, generation=0)
        self.outbox: list[Message] = []
        self.freed: list[int] = []
        self.sender = KVSender(
            rank=rank,
            tp_size=tp_size,
            worker_id=f"p-{number}",
            incarnation=self.incarnation,
            version="0.1.0",
            backend=self.backend,
            spec=SPEC,
            num_blocks=num_blocks,
            clock=clock,
            config=TransferConfig(),
            to_peer=lambda address, message: self.outbox.append(message),
            report=lambda report: None,
            source_free=self.freed.append,
        )


def _to_receiver(receiver: KVReceiver, session: str, message: Message) -> None:
    assert isinstance(message, KVOpen | KVRenew | KVClosed)
    receiver.on_message(session, message)


def _to_sender(sender: KVSender, message: Message) -> None:
    assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
    sender.on_message(message)


@pytest.mark.parametrize(("source", "decode"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_head_arrives_where_it_belongs_whatever_the_rank_counts(source: int, decode: int) -> None:
    clock, network = FakeClock(), LocalNetwork()
    there = DecodeSide(clock, network, 16, decode)
    here = [PrefillSide(clock, network, 0, 8, rank, source) for rank in range(source)]
    whole = torch.rand(
        SPEC.num_layers, 8, 2, SPEC.num_kv_heads, SPEC.block_size, SPEC.head_dim, generator=torch.manual_seed(3)
    )
    for rank, side in enumerate(here):
        side.pages.copy_(whole.chunk(source, dim=3)[rank])
    answer = there.receiver.reserve(_prompt("a", 0, 11, 0), R)
    assert isinstance(answer, Grant)
    local = (6, 1, 3)
    for side in here:
        side.sender.open(1, "a", 0, answer.grant)
    _to_receiver(there.receiver, "p-0#1", here[0].outbox.pop())
    for side in here:
        _to_sender(side.sender, there.to_peer[-1][1])
        for layer in range(SPEC.num_layers):
            side.sender.pages_ready(1, layer, local, answer.grant.block_ids)
        side.sender.finish(1, ())
    for side in here:
        assert not there.receiver.arrived
        side.sender.step()
        for rank, message in there.notifications():
            there.receiver.on_arrived(rank, message)
    blocks, _ = there.receiver.adopt(there.receiver.arrived[0])
    got = torch.cat([pages[:, blocks] for pages in there.pages], dim=3)
    assert torch.equal(got, whole[:, list(local)])
    assert sum(side.backend.telemetry_bytes for side in here) == 3 * SPEC.block_bytes()


# --- the random walk -----------------------------------------------------------------------------------------------

NUM_PEERS = 2


@dataclass(slots=True, eq=False)
class Task:
    """A shipment as its prefill worker sees it."""

    open_id: int
    grant: GrantInfo
    peer: int
    local_blocks: tuple[int, ...]
    num_layers: int = 0  # computed
    finished: bool = False


@dataclass(slots=True, eq=False)
class Peer:
    """A prefill worker and its connection."""

    side: PrefillSide
    number: int
    session: int = 1
    to_decode: list[Message] = field(default_factory=list)
    to_prefill: list[Message] = field(default_factory=list)
    tasks: dict[int, Task] = field(default_factory=dict)
    next_block: int = 0

    @property
    def session_name(self) -> str:
        return f"p-{self.number}#{self.session}"


class HandoffWalk(RuleBasedStateMachine):
    """Requests, deliveries and faults in any order. Every landing write and every adoption is checked."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(10.0)
        self.network = LocalNetwork()
        self.network.on_post = self._note_owner
        self.network.on_land = self._check_landing
        self.decode = DecodeSide(self.clock, self.network, 16)
        self.receiver, self.pool = self.decode.receiver, self.decode.pool
        self.incarnations = itertools.count()
        self.peers = [self._new_peer() for _ in range(NUM_PEERS)]
        self.open_ids = itertools.count(1)
        self.attempts: dict[str, int] = {}
        self.grants: list[GrantInfo] = []
        self.notifications: list[tuple[int, KVArrived]] = []
        self.sequences: list[list[int]] = []  # blocks of running sequences
        self.bound: dict[int, int] = {}  # epoch -> the only open id that was ever bound
        self.wrote_under: dict[int, int] = {}  # id of a write -> open id that it was posted under

    def _new_peer(self) -> Peer:
        number = next(self.incarnations)
        return Peer(PrefillSide(self.clock, self.network, number, 256), number)

    # H1: a write lands only in blocks that its own open holds.
    def _owner(self, handle: LocalHandle) -> int:
        num_blocks = self.decode.pages[0].shape[1]
        blocks = {page % num_blocks for page in handle.remote_pages}
        owners = [r for r in self.receiver.ledger.live.values() if blocks & set(r.block_ids)]
        assert len(owners) == 1 and blocks <= set(owners[0].block_ids), "a write into blocks of nobody, or of two"
        writer = owners[0].writer
        assert writer is not None
        assert owners[0].state in (ReservationState.OPEN, ReservationState.DOOMED), owners[0].state
        return writer.open_id

    def _note_owner(self, handle: LocalHandle) -> None:
        self.wrote_under[id(handle)] = self._owner(handle)

    def _check_landing(self, handle: LocalHandle) -> None:
        assert self._owner(handle) == self.wrote_under[id(handle)]

    # --- the router's part ------------------------------------------------------------------------

    # Few rules with many arguments: the walk draws a rule first, and a way of many rules is seldom walked to its end.

    @rule(
        name=st.sampled_from("abc"),
        num_tokens=st.integers(1, 20),
        choices=st.integers(1, 2),
        peers=st.lists(st.integers(0, NUM_PEERS - 1), max_size=2),
    )
    def request(self, name: str, num_tokens: int, choices: int, peers: list[int]) -> None:
        """A new attempt. Its task may reach nobody, two workers, or one of them twice."""
        self.attempts[name] = self.attempts.get(name, -1) + 1
        first = 0 if name == "a" else 100 * (self.attempts[name] + 1)  # one of them repeats its prompt: hits
        spec = _prompt(name, self.attempts[name], num_tokens, first, tuple(range(choices)))
        answer = self.receiver.reserve(spec, R)
        if isinstance(answer, Grant):
            self.grants.append(answer.grant)
            for peer in peers:
                self._deliver_task(answer.grant, peer)

    @precondition(lambda self: self.grants)
    @rule(back=st.integers(1, 4), peer=st.integers(0, NUM_PEERS - 1))
    def deliver_late(self, back: int, peer: int) -> None:
        """A task that was delivered before or never, whatever became of its grant."""
        self._deliver_task(self.grants[-min(back, len(self.grants))], peer)

    def _deliver_task(self, grant: GrantInfo, peer: int) -> None:
        worker = self.peers[peer]
        start = worker.next_block
        worker.next_block = (start + len(grant.block_ids)) % 200
        local = tuple(range(start, start + len(grant.block_ids)))
        task = Task(next(self.open_ids), grant, peer, local)
        worker.tasks[task.open_id] = task
        worker.side.pages[:, list(local)] = float(task.open_id)
        worker.side.sender.open(task.open_id, "x", 0, grant)
        self._collect(worker)

    @rule(name=st.sampled_from("abc"), unless_arrived=st.booleans())
    def abort(self, name: str, unless_arrived: bool) -> None:
        self.receiver.abort(name, self.attempts.get(name, 0), unless_arrived=unless_arrived)

    # --- the prefill workers' part ------------------------------------------------------------------------

    def _compute(self, task: Task) -> None:
        sender = self.peers[task.peer].side.sender
        if task.num_layers < SPEC.num_layers:
            sender.pages_ready(task.open_id, task.num_layers, task.local_blocks, task.grant.block_ids)
            task.num_layers += 1
        elif not task.finished:
            task.finished = True
            sender.finish(task.open_id, ())

    @rule(peer=st.integers(0, NUM_PEERS - 1))
    def cancel(self, peer: int) -> None:
        """The prefill worker's side of an abort: its oldest task."""
        worker = self.peers[peer]
        for task in list(worker.tasks.values())[:1]:
            worker.side.sender.cancel(task.open_id, "aborted")
        self._collect(worker)

    @rule(
        peer=st.integers(0, NUM_PEERS - 1),
        rounds=st.integers(1, 4),
        hears=st.sampled_from([99, 99, 1, 0]),
        answers=st.sampled_from([99, 99, 1, 0]),
        arrives=st.booleans(),
    )
    def progress(self, peer: int, rounds: int, hears: int, answers: int, arrives: bool) -> None:
        """A layer of each task, the transfer thread's turn, messages both ways: all of them, one or none."""
        worker = self.peers[peer]
        for _ in range(rounds):
            for task in list(worker.tasks.values()):
                self._compute(task)
            self._step(worker)
            for _ in range(min(hears, len(worker.to_decode))):
                _to_receiver(self.receiver, worker.session_name, worker.to_decode.pop(0))
                self._sort_answers()
            for _ in range(min(answers, len(worker.to_prefill))):
                _to_sender(worker.side.sender, worker.to_prefill.pop(0))
                self._collect(worker)
            self._step(worker)
        if arrives:
            self._deliver_all()

    def _step(self, worker: Peer) -> None:
        worker.side.sender.step()
        self._collect(worker)

    def _deliver_all(self) -> None:
        for rank, message in self.notifications:
            self.receiver.on_arrived(rank, message)
        self.notifications.clear()
        self._sort_answers()

    def _collect(self, worker: Peer) -> None:
        """Messages into their channels; source blocks that are free are overwritten at once."""
        worker.to_decode += worker.side.outbox
        worker.side.outbox.clear()
        for open_id in worker.side.freed:
            task = worker.tasks.pop(open_id)
            worker.side.pages[:, list(task.local_blocks)] = -1.0
        worker.side.freed.clear()
        self.notifications += self.decode.notifications()

    # --- deliveries, late, lost and doubled ------------------------------------------------------------------------

    def _sort_answers(self) -> None:
        for session, message in self.decode.to_peer:
            for worker in self.peers:
                if worker.session_name == session:  # a session that has ended gets nothing
                    worker.to_prefill.append(message)
        self.decode.to_peer.clear()

    @precondition(lambda self: self.notifications)
    @rule(index=st.integers(0, 5), fate=st.sampled_from(["deliver", "deliver", "double", "lose"]))
    def deliver_notification(self, index: int, fate: str) -> None:
        index %= len(self.notifications)
        rank, message = self.notifications[index] if fate == "double" else self.notifications.pop(index)
        if fate != "lose":
            self.receiver.on_arrived(rank, message)
        self._sort_answers()

    @rule(peer=st.integers(0, NUM_PEERS - 1))
    def lose_connection(self, peer: int) -> None:
        worker = self.peers[peer]
        worker.to_decode.clear()
        worker.to_prefill.clear()
        worker.side.sender.on_peer_lost(KV)
        old, worker.session = worker.session_name, worker.session + 1
        self.receiver.on_session_lost(old)
        self._collect(worker)

    # --- faults and time ------------------------------------------------------------------------

    @rule(fault=st.sampled_from([None, LocalFault.HOLD, LocalFault.FAIL, LocalFault.DROP]))
    def set_link(self, fault: LocalFault | None) -> None:
        if fault is None:
            self.network.clear_fault("d-0.1.0.0")
        else:
            self.network.set_fault("d-0.1.0.0", fault)

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.receiver.tick()
        self._sort_answers()

    @rule(peer=st.integers(0, NUM_PEERS - 1))
    def kill_and_fence(self, peer: int) -> None:
        """The process dies; only when nothing of it can land any more are its blocks given free."""
        self.lose_connection(peer)
        dead = self.peers[peer]
        self.network.late = [write for write in self.network.late if write.source is not dead.side.backend]
        self.notifications = [n for n in self.notifications if n[1].open_id not in dead.tasks]
        dead.side.backend.close()
        self.receiver.fence(dead.side.incarnation)
        self.peers[peer] = self._new_peer()
        self._sort_answers()

    # --- the decode worker's scheduler ------------------------------------------------------------------------

    @precondition(lambda self: self.receiver.arrived or self.sequences)
    @rule(adopts=st.booleans(), finishes=st.booleans())
    def schedule(self, adopts: bool, finishes: bool) -> None:
        if adopts and self.receiver.arrived:
            self._adopt()
        if finishes and self.sequences:
            self.pool.free(self.sequences.pop(0))

    def _adopt(self) -> None:
        reservation = self.receiver.arrived[0]
        assert reservation.writer is not None
        for block in reservation.block_ids:  # H2: all bytes are those of the bound open
            assert (self.decode.pages[0][:, block] == float(reservation.writer.open_id)).all()
        blocks, copies = self.receiver.adopt(reservation)
        assert len(set(blocks + copies)) == len(blocks + copies)
        self.sequences.append(blocks + copies)

    # --- what always holds ------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        self.receiver.check()  # H3, H5
        for epoch, reservation in self.receiver.ledger.live.items():
            if reservation.writer is not None:  # H4
                assert self.bound.setdefault(epoch, reservation.writer.open_id) == reservation.writer.open_id
            held = set(reservation.block_ids)
            assert not any(held & set(blocks) for blocks in self.sequences)

    def teardown(self) -> None:
        """H8: when faults have stopped, everything ends; quarantine that no clean end reached, by the fence."""
        self.set_link(None)
        for _ in range(40):
            for number in range(NUM_PEERS):
                self.progress(number, 1, 99, 99, True)
            while self.receiver.arrived:
                self._adopt()
            self.wait(0.25)
        assert not self.receiver.ledger.in_state(
            ReservationState.GRANTED, ReservationState.OPEN, ReservationState.ARRIVED
        )
        for worker in self.peers:
            assert worker.side.sender.num_unfinished == 0 and not worker.tasks
            self.receiver.fence(worker.side.incarnation)
        for blocks in self.sequences:
            self.pool.free(blocks)
        assert self.receiver.num_live == 0
        self.pool.check()
        assert self.pool.num_free_blocks == self.pool.num_blocks
        outcomes = [m for m in self.decode.to_router if isinstance(m, HandoffDone | HandoffFailed)]
        assert len(outcomes) == len(self.decode.to_router)


HandoffWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestHandoffWalk = HandoffWalk.TestCase


def _random_step(walk: HandoffWalk, draw: random.Random) -> None:
    """One rule, the ones that lead somewhere more often."""
    peer = draw.randrange(NUM_PEERS)
    some = draw.choice([99, 99, 99, 1, 0])
    match draw.choices(range(10), weights=[6, 20, 5, 3, 3, 1, 1, 1, 1, 3])[0]:
        case 0:
            peers = draw.choice([[], [peer], [peer], [peer], [peer, peer], [0, 1]])
            walk.request(draw.choice("abc"), draw.randint(1, 20), draw.randint(1, 2), peers)
        case 1:
            walk.progress(peer, draw.randint(1, 4), some, draw.choice([99, some]), draw.random() < 0.5)
        case 2 if walk.receiver.arrived or walk.sequences:
            walk.schedule(draw.random() < 0.7, draw.random() < 0.5)
        case 3:
            walk.set_link(draw.choice([None, None, LocalFault.HOLD, LocalFault.FAIL, LocalFault.DROP]))
        case 4:
            walk.wait(draw.choice([0.1, 0.5, 1.0, 2.0, 3.0]))
        case 5:
            walk.abort(draw.choice("abc"), draw.random() < 0.5)
        case 6:
            walk.cancel(peer)
        case 7:
            draw.choice([walk.lose_connection, walk.kill_and_fence])(peer)
        case 8 if walk.grants:
            walk.deliver_late(draw.randint(1, 4), peer)
        case 9 if walk.notifications:
            walk.deliver_notification(draw.randrange(6), draw.choice(["deliver", "double", "lose"]))


@pytest.mark.parametrize("seed", range(40))
def test_long_walks_keep_every_invariant(seed: int) -> None:
    walk, draw = HandoffWalk(), random.Random(seed)
    for _ in range(200):
        _random_step(walk, draw)
        walk.books_agree()
    walk.teardown()
