"""Every row of the prefill side's table, over agents of this process."""

from __future__ import annotations

import itertools
from typing import TypeVar

import msgspec
import pytest
import torch
from structlog.testing import capture_logs

from kvferry.common.config import TransferConfig
from kvferry.common.errors import InvalidTransition
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import SampledToken
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalFault, LocalNetwork
from kvferry.transfer.backends.reach import REPAIR_S
from kvferry.transfer.fetch.reader import MIN_INTERVAL_S
from kvferry.transfer.protocol.checksums import PageSums
from kvferry.transfer.protocol.handoff import open_mac
from kvferry.transfer.protocol.rank_messages import ReadOutcome
from kvferry.transfer.send import sender as sender_module
from kvferry.transfer.send.closings import FAILED_AFTER_S, GIVE_UP_S
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.send.shipment import _NEXT, Shipment, ShipmentState
from kvferry.wire.codec import Decoder
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo, ProcessMark
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.results import ChoiceTokens
from kvferry.wire.workers import TransferReport

SPEC = KVCacheSpec(model="m", num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
NUM_BLOCKS = 16
KV, AGENT = "127.0.0.1:1", "d-0.1.0.0"
FIRST = (ChoiceTokens(0, 0, (SampledToken(7),)),)
M = TypeVar("M", bound=Message)
_arrived: Decoder[KVArrived] = Decoder(KVArrived)


def _pages(fill: float) -> torch.Tensor:
    return torch.full((SPEC.num_layers, NUM_BLOCKS, 2, SPEC.num_kv_heads, SPEC.block_size, SPEC.head_dim), fill)


class Prefill:
    """A sender of one rank and the memory of the decode worker that it writes to."""

    def __init__(
        self,
        rank: int = 0,
        *,
        clock: FakeClock | None = None,
        write_timeout_s: float = 2.0,
        copies_itself: bool = False,
        max_write_bytes: int = 1 << 20,
        max_in_flight_bytes: int = 1 << 20,
        bytes_per_s: float | None = None,
    ) -> None:
        self.clock = clock or FakeClock(100.0)
        self.network = LocalNetwork(self.clock, bytes_per_s)
        self.decode = LocalBackend(AGENT, self.network)
        self.remote = _pages(0.0)
        self.region = self.decode.register(self.remote, rank=0, tp_size=1, generation=4)
        backend = LocalBackend("p-0.1.0.0", self.network, copies_itself=copies_itself)
        self.local = _pages(1.0)
        backend.register(self.local, rank=0, tp_size=1, generation=0)
        self.said: list[Message] = []
        self.reports: list[TransferReport] = []
        self.freed: list[int] = []
        self.reads: list[ReadOutcome] = []
        self.epochs = itertools.count(1)
        self.sender = KVSender(
            rank=rank,
            tp_size=1 if rank == 0 else 2,
            worker_id="p-0",
            incarnation=7,
            version="0.1.0",
            backend=backend,
            spec=SPEC,
            num_blocks=NUM_BLOCKS,
            clock=self.clock,
            config=TransferConfig(write_timeout_s=write_timeout_s),
            to_peer=lambda address, message: self.said.append(message),
            report=lambda open_id, report: self.reports.append(report),
            source_free=self.freed.append,
            on_read=lambda fetch_id, outcome, sums: self.reads.append(outcome),
            sums=PageSums(self.local),
            processes=(ProcessMark("here", 1, 1),) if copies_itself else (),
            max_in_flight_bytes=max_in_flight_bytes,
            max_write_bytes=max_write_bytes,
        )

    def grant(self, block_ids: tuple[int, ...] = (9, 3)) -> GrantInfo:
        return GrantInfo(
            grant_id=GrantId("d-0", 1, next(self.epochs)),
            spec=SPEC,
            kv_address=KV,
            block_ids=block_ids,
            num_tokens=SPEC.block_size * len(block_ids),
            num_computed_tokens=0,
            ranks=(self.region,),
            open_within_s=2.0,
            mac=b"mac",
        )

    def open(self, open_id: int = 1) -> GrantInfo:
        grant = self.grant()
        self.sender.open(open_id, "a", 0, grant)
        return grant

    def opened(self, open_id: int = 1) -> GrantInfo:
        grant = self.open(open_id)
        self.answer_open(grant, open_id)
        return grant

    def answer_open(self, grant: GrantInfo, open_id: int = 1, *, generation: int = 4) -> None:
        self.sender.on_message(KVOpened(grant_id=grant.grant_id, open_id=open_id, lease_s=3.0, generation=generation))

    def ready(self, grant: GrantInfo, layers: range = range(3), open_id: int = 1) -> None:
        for layer in layers:
            self.sender.pages_ready(open_id, layer, (5, 6), grant.block_ids)

    def told(self, open_id: int = 1) -> GrantInfo:
        """A shipment whose arrival was told once."""
        grant = self.opened(open_id)
        self.ready(grant, open_id=open_id)
        self.sender.finish(open_id, FIRST)
        self.sender.step()
        assert len(self.arrivals()) == 1
        return grant

    def arrivals(self) -> list[KVArrived]:
        return [_arrived.decode(payload) for _, payload in self.decode.notifications()]

    def closed(self) -> KVClosed:
        return only(self.said, KVClosed)

    @property
    def num_written(self) -> int:
        """Remote pages that hold our bytes."""
        return int((self.remote.flatten(2) == 1.0).all(-1).sum())


def only(messages: list[Message], kind: type[M]) -> M:
    found = [message for message in messages if isinstance(message, kind)]
    assert len(found) == 1, messages
    return found[0]


@pytest.fixture
def prefill() -> Prefill:
    return Prefill()


# --- OPENING ----------------------------------------------------------------------------------------------------


def test_nothing_is_posted_before_the_open_is_answered(prefill: Prefill) -> None:
    grant = prefill.open()
    message = only(prefill.said, KVOpen)
    assert (message.open_id, message.tp_size, message.incarnation) == (1, 1, 7)
    assert message.mac == open_mac(grant, "a", 0)
    prefill.ready(grant)
    prefill.sender.finish(1, FIRST)
    prefill.sender.step()
    assert prefill.num_written == 0 and prefill.freed == []
    prefill.answer_open(grant)
    prefill.sender.step()
    assert prefill.num_written == 6 and len(prefill.arrivals()) == 1


def test_the_answer_to_another_open_is_ignored(prefill: Prefill) -> None:
    grant = prefill.open()
    prefill.ready(grant)
    prefill.answer_open(grant, open_id=2)
    prefill.answer_open(msgspec.structs.replace(grant, grant_id=GrantId("d-0", 1, 99)))
    prefill.sender.step()
    assert prefill.num_written == 0


def test_what_is_said_once_more_or_of_another_grant_changes_nothing(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.answer_open(grant)
    _refuse(prefill, grant)
    _be_gone(prefill, msgspec.structs.replace(grant, grant_id=GrantId("d-0", 1, 99)))
    prefill.ready(grant)
    prefill.sender.step()
    assert prefill.num_written == 6 and prefill.freed == []


def _refuse(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.sender.on_message(KVRefused(grant_id=grant.grant_id, open_id=1, reason="no"))


def _cancel(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.sender.on_message(CancelKV(grant_id=grant.grant_id, open_id=1))


def _abort(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.sender.cancel(1, "aborted")


def _lose_connection(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.sender.on_peer_lost("127.0.0.1:2")
    assert prefill.freed == []
    prefill.sender.on_peer_lost(KV)


def _let_the_lease_end(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.clock.advance(2.9)
    prefill.sender.step()


def _be_gone(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 0.0),)))


def _answer_late(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.clock.advance(2.9)
    prefill.answer_open(grant)


def _answer_from_another_generation(prefill: Prefill, grant: GrantInfo) -> None:
    prefill.answer_open(grant, generation=5)


@pytest.mark.parametrize(
    "event",
    [
        _refuse,
        _cancel,
        _abort,
        _lose_connection,
        _let_the_lease_end,
        _answer_late,
        _answer_from_another_generation,
        _be_gone,
    ],
)
def test_an_open_that_comes_to_nothing_ends_cleanly(prefill: Prefill, event: object) -> None:
    grant = prefill.open()
    prefill.ready(grant)
    assert callable(event)
    event(prefill, grant)
    assert prefill.closed().clean
    assert prefill.freed == [1] and prefill.sender.num_unfinished == 0
    prefill.answer_open(grant)
    prefill.ready(grant)
    prefill.sender.finish(1, FIRST)
    prefill.sender.layers_done(1)
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    prefill.sender.cancel(1, "aborted")
    assert prefill.sender.step() is None
    assert prefill.num_written == 0 and prefill.arrivals() == []


def test_a_peer_that_cannot_be_connected_ends_cleanly_once_it_has_answered(prefill: Prefill) -> None:
    prefill.network.set_fault(AGENT, LocalFault.GONE)
    grant = prefill.open()
    assert prefill.freed == []  # the answer may name other agents
    prefill.answer_open(grant)
    assert prefill.closed().clean and prefill.freed == [1]


def _is_connected(prefill: Prefill) -> bool:
    backend = prefill.sender._backend
    assert isinstance(backend, LocalBackend)
    return AGENT in backend._pieces


def test_the_agents_of_a_decode_worker_that_is_gone_are_forgotten(prefill: Prefill) -> None:
    prefill.opened()
    prefill.sender.step()
    assert _is_connected(prefill)
    prefill.sender.on_peer_lost(KV)
    prefill.sender.step()  # the shipment closes
    prefill.sender.step()
    assert not _is_connected(prefill) and prefill.sender.num_unfinished == 0


def test_an_agent_is_not_forgotten_before_the_last_write_to_it_has_ended(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.ready(grant)
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.sender.step()
    prefill.sender.on_peer_lost(KV)
    prefill.clock.advance(2.1)  # the shipment gives up; its write may still land
    prefill.sender.step()
    prefill.sender.step()
    assert prefill.sender.num_unfinished == 0 and _is_connected(prefill)
    prefill.network.clear_fault(AGENT)
    prefill.sender.step()
    assert not _is_connected(prefill)


def test_an_arrival_is_told_again_over_an_agent_whose_control_connection_broke(prefill: Prefill) -> None:
    prefill.told()
    for _ in range(2):  # the renewal that the connection took with it is asked for again
        prefill.clock.advance(1.0)
        prefill.sender.step()
        prefill.sender.on_peer_lost(KV)
        assert _is_connected(prefill) and len(prefill.arrivals()) == 1
    assert [isinstance(message, KVRenew) for message in prefill.said] == [False, True, True]


def test_a_decode_worker_that_comes_back_is_written_to_again(prefill: Prefill) -> None:
    prefill.opened()
    prefill.sender.on_peer_lost(KV)
    prefill.sender.step()
    prefill.sender.step()
    prefill.sender.on_peer_lost(KV)
    grant = prefill.opened(2)
    prefill.ready(grant, open_id=2)
    prefill.sender.step()
    assert _is_connected(prefill) and prefill.num_written == 6


def test_a_step_that_ended_a_write_wants_the_next_at_once(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.ready(grant)
    prefill.sender.step()
    assert prefill.sender.made_progress
    prefill.sender.step()
    assert not prefill.sender.made_progress


# --- SHIPPING ---------------------------------------------------------------------------------------------------


def test_pages_go_out_as_they_are_ready_and_each_once(prefill: Prefill) -> None:
    grant = prefill.opened()
    for layer in range(3):
        prefill.ready(grant, range(layer, layer + 1))
        prefill.sender.step()
        assert prefill.num_written == 2 * (layer + 1)
    assert prefill.arrivals() == []  # the last token is not sampled yet
    with pytest.raises(AssertionError, match="shipped before"):
        prefill.ready(grant, range(1, 2))
    prefill.clock.advance(0.5)
    prefill.sender.layers_done(1)  # everything was written before
    prefill.sender.finish(1, FIRST)
    assert prefill.sender.step() == 0.0
    arrived = prefill.arrivals()[0]
    assert (arrived.num_tokens, arrived.first_tokens, arrived.source_rank) == (8, FIRST, 0)
    assert prefill.freed == [1]
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.sender.num_unfinished == 0 and prefill.sender.step() is None
    assert not any(isinstance(message, KVClosed) for message in prefill.said)
    report = prefill.reports[0]
    assert report.clean and report.exposed_s == 0.0
    assert report.num_bytes == prefill.sender.num_bytes == 2 * SPEC.block_bytes()
    assert prefill.sender._backend.telemetry_bytes == 2 * SPEC.block_bytes()


def test_finishing_with_pages_missing_is_our_bug(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.ready(grant, range(2))
    with pytest.raises(AssertionError, match="4 pages of 6"):
        prefill.sender.finish(1, FIRST)


def test_what_is_exposed_counts_from_the_last_layer(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.ready(grant)
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.sender.step()
    assert prefill.sender.num_bytes == 0 and not prefill.sender.made_progress
    prefill.clock.advance(0.25)
    prefill.sender.layers_done(1)
    prefill.sender.finish(1, FIRST)
    prefill.sender.step()
    assert prefill.arrivals() == [] and prefill.freed == [], "not everything is written"
    prefill.clock.advance(0.5)
    prefill.network.clear_fault(AGENT)
    prefill.sender.step()
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert (prefill.reports[0].transfer_s, prefill.reports[0].exposed_s) == (0.75, 0.5)


def test_the_deadline_counts_from_the_renewal_that_was_answered(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.clock.advance(1.0)
    prefill.sender.step()
    assert only(prefill.said, KVRenew).opens == ((grant.grant_id, 1),)
    prefill.clock.advance(1.5)  # the answer is slow: nothing is asked meanwhile
    prefill.sender.step()
    prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))
    prefill.clock.advance(1.3)  # 3.8 s after the open, 2.8 s after the renewal was sent
    prefill.ready(grant, range(1))
    prefill.sender.step()
    assert prefill.num_written == 2
    prefill.clock.advance(0.1)
    prefill.ready(grant, range(1, 2))
    prefill.sender.step()
    assert prefill.num_written == 2 and prefill.closed().clean


def test_a_renewal_is_one_message_for_all_shipments_of_a_pair(prefill: Prefill) -> None:
    first, second = prefill.opened(1), prefill.opened(2)
    prefill.clock.advance(1.0)
    prefill.sender.step()
    assert only(prefill.said, KVRenew).opens == ((first.grant_id, 1), (second.grant_id, 2))
    prefill.sender.cancel(1, "aborted")
    prefill.sender.step()
    prefill.sender.on_message(KVRenewed(opens=((first.grant_id, 1, 3.0),)))  # only of one that has ended
    prefill.clock.advance(1.0)
    prefill.sender.step()
    assert isinstance(prefill.said[-1], KVRenew)  # the peer answered all the same


def test_more_opens_than_a_message_has_room_for_are_renewed_by_several(
    prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them from the time at which it was asked for; and nothing is asked for anew before all are answered."""
    monkeypatch.setattr("kvferry.transfer.send.leases.MAX_OPENS", 2)
    grants = {number: prefill.opened(number) for number in (1, 2, 3)}
    prefill.clock.advance(1.0)
    prefill.sender.step()

    def asked() -> list[list[int]]:
        return [[number for _, number in said.opens] for said in prefill.said if isinstance(said, KVRenew)]

    def answer(*numbers: int) -> None:
        prefill.sender.on_message(KVRenewed(opens=tuple((grants[number].grant_id, number, 3.0) for number in numbers)))

    assert asked() == [[1, 2], [3]]
    answer(1, 2)
    prefill.clock.advance(1.5)
    prefill.sender.step()
    assert asked() == [[1, 2], [3]]
    answer(3)
    prefill.sender.step()
    assert asked() == [[1, 2], [3]] * 2
    prefill.clock.advance(1.3)  # 3.8 s after the opens, 2.8 s after the renewals were sent that have been answered
    for number, grant in grants.items():
        assert prefill.sender._shipments[number].deadline > prefill.clock.now(), f"{grant} was extended"


class PausingClock(FakeClock):
    """Loses half a second before each look once it is told to: a pause anywhere between two looks."""

    pauses = False

    def now(self) -> float:
        if self.pauses:
            self.advance(0.5)
        return super().now()


def test_the_clock_is_read_before_each_post() -> None:
    clock = PausingClock(100.0)
    prefill = Prefill(clock=clock, max_write_bytes=SPEC.page_bytes())
    prefill.ready(prefill.opened())
    clock.pauses = True
    for _ in range(8):
        prefill.sender.step()
    assert 0 < prefill.num_written < 6
    assert all(message.clean for message in prefill.said if isinstance(message, KVClosed))


@pytest.mark.parametrize("event", [_cancel, _abort, _lose_connection, _let_the_lease_end, _be_gone])
def test_a_stopped_shipment_waits_for_what_was_posted_and_ends_cleanly(event: object) -> None:
    prefill = Prefill(write_timeout_s=5.0)
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant, range(1))
    prefill.sender.step()
    assert callable(event)
    event(prefill, grant)
    assert prefill.freed == [1]
    assert not any(isinstance(message, KVClosed) for message in prefill.said)
    prefill.ready(grant, range(1, 3))
    prefill.sender.finish(1, FIRST)
    prefill.sender.step()
    prefill.network.clear_fault(AGENT)
    prefill.sender.step()
    assert prefill.closed().clean and prefill.num_written == 2
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.arrivals() == [] and prefill.sender.step() is None


def test_a_failed_write_ends_unclean(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.FAIL)
    prefill.ready(grant)
    prefill.sender.step()
    assert not prefill.closed().clean and prefill.freed == [1]
    assert prefill.sender.num_failures == 1 and not prefill.reports[0].clean
    prefill.network.clear_fault(AGENT)
    assert prefill.num_written == 6  # what failed still landed: hence "not clean"


def test_a_post_that_is_refused_ends_unclean(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.GONE)
    prefill.ready(grant)
    prefill.sender.step()
    assert not prefill.closed().clean


def test_a_stuck_write_ends_unclean_while_the_lease_is_renewed(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant)
    for _ in range(3):
        prefill.sender.step()
        prefill.clock.advance(1.0)
        prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))
    prefill.sender.step()
    assert not prefill.closed().clean
    assert prefill.sender.step() == pytest.approx(sender_module._ORPHAN_POLL_S)  # its handle is polled until it ends
    prefill.network.clear_fault(AGENT)
    prefill.sender.step()
    assert isinstance(prefill.said[-1], KVClosed) and prefill.said[-1].clean  # it has landed after all
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.sender.step() is None


def test_a_slow_link_is_no_dead_one() -> None:
    """What was posted together ends one after the other: the last write waits for the others, and none is stuck."""
    prefill = Prefill(max_write_bytes=SPEC.page_bytes(), bytes_per_s=SPEC.page_bytes())
    grant = prefill.opened()
    prefill.ready(grant)
    prefill.sender.finish(1, FIRST)
    for _ in range(7):  # six pages, a second each
        prefill.sender.step()
        prefill.clock.advance(1.0)
        prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))
    prefill.sender.step()
    assert prefill.num_written == 6 and len(prefill.arrivals()) >= 1
    assert not any(isinstance(message, KVClosed) for message in prefill.said)


def test_a_link_that_dies_after_a_write_is_noticed() -> None:
    prefill = Prefill(max_write_bytes=SPEC.page_bytes())
    grant = prefill.opened()
    prefill.ready(grant, range(1))
    prefill.sender.step()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant, range(1, 3))
    for _ in range(3):
        prefill.sender.step()
        prefill.clock.advance(1.0)
        prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))
    prefill.sender.step()
    assert not prefill.closed().clean


def test_a_closing_shipment_with_a_stuck_write_ends_unclean(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant)
    prefill.sender.step()
    prefill.clock.advance(0.5)
    prefill.sender.cancel(1, "aborted")
    prefill.clock.advance(1.9)
    prefill.sender.step()
    assert not any(isinstance(message, KVClosed) for message in prefill.said)
    prefill.clock.advance(0.2)
    prefill.sender.step()
    assert not prefill.closed().clean


def test_one_peer_has_a_bounded_number_of_bytes_in_flight() -> None:
    prefill = Prefill(max_write_bytes=SPEC.page_bytes(), max_in_flight_bytes=2 * SPEC.page_bytes())
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant)
    prefill.sender.step()
    assert len(prefill.network.late) == 2
    prefill.network.clear_fault(AGENT)
    prefill.sender.finish(1, FIRST)
    while prefill.sender.step() == 0.0 and not prefill.freed:
        pass
    assert prefill.num_written == 6


def test_writes_that_nobody_waits_for_leave_room_for_others() -> None:
    prefill = Prefill(max_in_flight_bytes=2 * SPEC.page_bytes())
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(prefill.opened(1), range(1))
    prefill.sender.step()
    prefill.clock.advance(2.1)
    prefill.sender.step()
    assert not prefill.closed().clean
    prefill.ready(prefill.opened(2), range(1), open_id=2)
    prefill.sender.step()
    assert len(prefill.network.late) == 2


def test_a_post_that_raises_may_have_begun() -> None:
    prefill = Prefill(copies_itself=True)
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.GONE)
    prefill.ready(grant)
    prefill.sender.step()
    assert not prefill.closed().clean and prefill.sender.num_failures == 1
    prefill.clock.advance(FAILED_AFTER_S)
    prefill.sender.step()
    assert prefill.sender._backend.agent == "p-0.1.1.0"


# --- reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, LocalFault.FAIL])
def test_reads_share_the_senders_turns_and_its_agent(fault: LocalFault | None) -> None:
    prefill = Prefill()
    reader = prefill.sender.reader
    assert reader is not None and prefill.sender.step() is None
    if fault is not None:
        prefill.network.set_fault(AGENT, fault)
    reader.begin(9, KV, (prefill.region,), (5, 6), (9, 3), 0, False)
    wait_s = prefill.sender.step()
    assert prefill.sender.made_progress and (wait_s is None) is (fault is None), "what failed is looked at again"
    for _ in range(6):
        prefill.sender.step()
    assert prefill.reads == [ReadOutcome.DONE if fault is None else ReadOutcome.FAILED]
    for _ in range(4):
        prefill.clock.advance(FAILED_AFTER_S)
        prefill.sender.step()
    assert prefill.reads[1:] == ([] if fault is None else [ReadOutcome.OVER])
    assert prefill.sender._backend.agent == ("p-0.1.0.0" if fault is None else "p-0.1.1.0")
    assert reader._next_agent_at == (0.0 if fault is None else 100.0 + FAILED_AFTER_S + MIN_INTERVAL_S)


# --- TOLD ---------------------------------------------------------------------------------------------------------


def test_the_arrival_is_told_again_until_somebody_answers(prefill: Prefill) -> None:
    grant = prefill.told()
    for num_told in (0, 1):
        prefill.clock.advance(0.5)
        prefill.sender.step()
        assert len(prefill.arrivals()) == num_told
    prefill.sender.on_message(CancelKV(grant_id=grant.grant_id, open_id=1))
    prefill.sender.cancel(1, "aborted")
    assert len(prefill.arrivals()) == 1
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.sender.num_unfinished == 0 and prefill.reports[0].clean


def test_a_told_shipment_that_is_gone_is_forgotten_without_a_word(prefill: Prefill) -> None:
    _be_gone(prefill, prefill.told())
    assert prefill.sender.num_unfinished == 0 and prefill.freed == [1]
    assert not any(isinstance(message, KVClosed) for message in prefill.said)


@pytest.mark.parametrize("event", [_cancel, _let_the_lease_end])
def test_a_told_shipment_that_may_not_have_been_heard_says_that_it_ended(prefill: Prefill, event: object) -> None:
    """Its word went to an agent, which may be gone."""
    grant = prefill.told()
    assert callable(event)
    event(prefill, grant)
    assert prefill.closed().clean and prefill.freed == [1]


# --- last words ---------------------------------------------------------------------------------------------------


def test_an_end_is_told_until_it_is_answered(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.sender.cancel(1, "aborted")
    prefill.sender.step()
    _cancel(prefill, grant)
    for _ in range(3):
        prefill.clock.advance(1.0)
        prefill.sender.step()
    closed = [message for message in prefill.said if isinstance(message, KVClosed)]
    assert len(closed) == 4 and len(set(closed)) == 1
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.sender.step() is None


def test_a_decode_worker_that_never_answers_is_given_up(prefill: Prefill) -> None:
    prefill.opened()
    prefill.sender.cancel(1, "aborted")
    prefill.sender.step()
    prefill.clock.advance(30.0)
    assert prefill.sender.step() is not None, "a link may be away for so long"
    prefill.clock.advance(GIVE_UP_S)
    assert prefill.sender.step() is None


def test_a_failed_write_to_this_host_ends_with_our_agent() -> None:
    prefill = Prefill(copies_itself=True)
    backend = prefill.sender._backend
    grant = prefill.opened(1)
    prefill.network.set_fault(AGENT, LocalFault.FAIL)
    prefill.ready(grant)
    prefill.sender.step()
    prefill.network.clear_fault(AGENT)
    other = prefill.opened(2)
    prefill.ready(other, range(1), open_id=2)
    prefill.sender.step()
    prefill.clock.advance(1.9)
    prefill.sender.step()
    assert backend.agent == "p-0.1.0.0"
    prefill.ready(other, range(1, 2), open_id=2)
    prefill.clock.advance(0.1)
    assert prefill.sender.step() == 0.0, "nothing is posted yet"
    assert backend.agent == "p-0.1.1.0"
    closed = prefill.said[-1]
    assert isinstance(closed, KVClosed) and closed.detached and not closed.clean and closed.open_id == 1
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    prefill.ready(other, range(2, 3), open_id=2)  # the neighbour goes on with the new agent
    prefill.sender.finish(2, FIRST)
    prefill.sender.step()
    assert [message.open_id for message in prefill.arrivals()] == [2]


def test_our_agent_stays_while_a_shipments_write_is_under_way() -> None:
    prefill = Prefill(copies_itself=True, write_timeout_s=60.0)
    backend = prefill.sender._backend
    grant = prefill.opened(1)
    prefill.network.set_fault(AGENT, LocalFault.FAIL)
    prefill.ready(grant)
    prefill.sender.step()
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    other = prefill.opened(2)
    prefill.ready(other, range(1), open_id=2)
    prefill.sender.step()
    prefill.clock.advance(2.0)
    prefill.ready(other, range(1, 2), open_id=2)
    prefill.sender.step()
    assert backend.agent == "p-0.1.0.0" and len(prefill.network.late) == 2  # nothing new was posted either
    prefill.network.clear_fault(AGENT)
    prefill.sender.step()
    prefill.sender.step()
    assert backend.agent == "p-0.1.1.0"


def _lose_our_agent() -> tuple[Prefill, GrantInfo]:
    """A write to this host has failed, and no new agent can be made. The grant of it."""
    prefill = Prefill(copies_itself=True)
    grant = prefill.opened(1)
    prefill.network.set_fault(AGENT, LocalFault.FAIL)
    prefill.ready(grant)
    prefill.sender.step()
    prefill.network.clear_fault(AGENT)
    prefill.network.can_make_agents = False
    prefill.clock.advance(2.0)
    return prefill, grant


def _has_agent(prefill: Prefill) -> bool:
    return prefill.network.agents.get(prefill.sender._backend.agent) is prefill.sender._backend


def test_the_end_of_our_agent_is_told_whether_or_not_there_is_a_new_one() -> None:
    prefill, _ = _lose_our_agent()
    prefill.sender.step()
    closed = prefill.said[-1]
    assert not _has_agent(prefill)
    assert isinstance(closed, KVClosed) and closed.detached and not closed.clean


@pytest.mark.parametrize("is_answered", [False, True])
def test_without_an_agent_of_ours_it_is_tried_again(is_answered: bool) -> None:
    """Also where nobody waits for its end any more: the decode worker has heard it."""
    prefill, grant = _lose_our_agent()
    with capture_logs() as logs:
        prefill.sender.step()
        if is_answered:
            prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
        for _ in range(3):
            prefill.clock.advance(0.5)
            prefill.sender.step()
        assert not _has_agent(prefill) and prefill.sender._backend.agent == "p-0.1.2.0"
        wait_s = prefill.sender.step()
        assert wait_s is not None and wait_s <= 1.0  # no call will come for it
        prefill.network.can_make_agents = True
        prefill.clock.advance(1.0)
        prefill.sender.step()
    assert _has_agent(prefill)
    told = [line["event"] for line in logs if line["log_level"] in ("warning", "info")]
    assert told == ["transfer_agent_not_replaced", "transfer_agent_is_back"]  # however often it was tried
    other = prefill.opened(2)
    prefill.ready(other, open_id=2)
    prefill.sender.step()
    assert prefill.sender.num_bytes == 2 * SPEC.block_bytes()


def test_an_agent_of_ours_that_lacks_a_device_is_replaced_again_and_shipments_go_on() -> None:
    prefill, _ = _lose_our_agent()
    backend = prefill.sender._backend
    assert isinstance(backend, LocalBackend)
    prefill.network.can_make_agents = True
    backend.lacks_devices = True
    prefill.sender.step()
    lame = backend.agent
    prefill.clock.advance(REPAIR_S - 0.5)
    grant = prefill.opened(2)
    wait_s = prefill.sender.step()
    assert backend.agent == lame and wait_s is not None and wait_s <= 0.5
    backend.lacks_devices = False
    prefill.clock.advance(0.5)
    prefill.sender.step()
    assert backend.agent != lame
    prefill.ready(grant, open_id=2)
    prefill.sender.step()
    assert prefill.sender.num_bytes == 2 * SPEC.block_bytes()
    whole = backend.agent
    prefill.clock.advance(10 * REPAIR_S)
    prefill.sender.step()
    assert backend.agent == whole


@pytest.mark.parametrize("is_read", [False, True])
def test_what_failed_connections_leave_behind_goes_with_our_agent(
    is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.transfer.backends.peers.MAX_FAILED", 3)
    prefill = Prefill()
    reader = prefill.sender.reader
    assert reader is not None
    prefill.network.set_fault(AGENT, LocalFault.GONE)
    agents = []
    for number in range(1, 8):
        if is_read:
            reader.begin(number, KV, (prefill.region,), (5, 6), (9, 3), 0, False)
        else:
            prefill.opened(number)
        for _ in range(2):  # a read connects at the end of a step
            prefill.sender.step()
        agents.append(prefill.sender._backend.agent.split(".")[2])
    assert agents == ["0", "0", "1", "1", "1", "2", "2"]
    prefill.network.clear_fault(AGENT)
    prefill.ready(prefill.opened(8), open_id=8)
    prefill.sender.step()
    assert prefill.num_written == 6


def test_without_an_agent_of_ours_shipments_end_cleanly() -> None:
    prefill, _ = _lose_our_agent()
    shipping, asked = prefill.opened(2), prefill.open(3)
    prefill.ready(shipping, range(1), open_id=2)
    prefill.sender.step()
    prefill.sender.step()
    prefill.answer_open(asked, 3)
    ends = {message.open_id: message for message in prefill.said if isinstance(message, KVClosed)}
    assert [ends[open_id].clean for open_id in (2, 3)] == [True, True]
    assert "no interface is up" in ends[2].reason and "no agent here" in ends[3].reason
    assert prefill.sender.num_unfinished == 0 and prefill.freed == [1, 2, 3]
    assert prefill.sender.num_failures == 1  # the write that had failed


def test_an_open_that_is_not_answered_yet_goes_on_with_our_next_agent() -> None:
    """Its agents over there may be others by then."""
    prefill, _ = _lose_our_agent()
    prefill.network.can_make_agents = True
    grant = prefill.open(2)
    region = prefill.decode.rotate(5)
    prefill.sender.step()
    assert _has_agent(prefill) and prefill.sender.num_unfinished == 1
    opened = KVOpened(grant_id=grant.grant_id, open_id=2, lease_s=3.0, generation=5, ranks=(region,))
    prefill.sender.on_message(opened)
    prefill.ready(grant, open_id=2)
    prefill.sender.step()
    assert prefill.sender.num_bytes == 2 * SPEC.block_bytes()


def test_failed_writes_that_only_a_network_carries_leave_our_agent_alone(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.network.set_fault(AGENT, LocalFault.FAIL)
    prefill.ready(grant)
    prefill.sender.step()
    for _ in range(40):
        prefill.clock.advance(1.0)
        prefill.sender.step()
    prefill.clock.advance(GIVE_UP_S)
    assert prefill.sender.step() is None and prefill.sender._backend.agent == "p-0.1.0.0"


# --- other agents than the grant's ----------------------------------------------------------------------------------


def test_an_answer_that_names_other_regions_is_followed(prefill: Prefill) -> None:
    grant = prefill.open()
    prefill.ready(grant)
    region = prefill.decode.rotate(5)
    opened = KVOpened(grant_id=grant.grant_id, open_id=1, lease_s=3.0, generation=5, ranks=(region,))
    prefill.sender.on_message(opened)
    prefill.sender.finish(1, FIRST)
    prefill.sender.step()
    assert prefill.num_written == 6 and len(prefill.arrivals()) == 1
    assert not _is_connected(prefill)  # to the agent that is gone


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"generation": 6}, "generation 5"),
        ({"page_bytes": 7}, "page_bytes"),
        ({"num_blocks": 99}, "99 blocks"),
        ({"transport": "nixl"}, "transport"),
    ],
)
def test_an_answer_with_regions_that_do_not_fit_ends_cleanly(
    prefill: Prefill, change: dict[str, object], words: str
) -> None:
    grant = prefill.open()
    region = msgspec.structs.replace(prefill.decode.rotate(5), **change)
    opened = KVOpened(grant_id=grant.grant_id, open_id=1, lease_s=3.0, generation=5, ranks=(region,))
    prefill.sender.on_message(opened)
    assert prefill.closed().clean and words in prefill.closed().reason


def test_a_notification_that_cannot_be_sent_is_sent_later(prefill: Prefill) -> None:
    grant = prefill.opened()
    prefill.ready(grant)
    prefill.sender.step()
    prefill.network.set_fault(AGENT, LocalFault.GONE)
    prefill.sender.finish(1, FIRST)
    prefill.sender.step()
    prefill.network.clear_fault(AGENT)
    prefill.clock.advance(1.0)
    prefill.sender.step()
    assert len(prefill.arrivals()) == 1


# --- other ranks, waiting, states -------------------------------------------------------------------------------------


def test_other_ranks_send_neither_opens_nor_renewals_nor_reports() -> None:
    prefill = Prefill(rank=1)
    grant = prefill.opened()
    for _ in range(4):
        prefill.clock.advance(1.0)
        prefill.sender.step()
        prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))
    assert prefill.said == []
    prefill.ready(grant)
    prefill.sender.finish(1, ())
    prefill.sender.step()
    arrived = prefill.arrivals()[0]
    assert arrived.source_rank == 1 and arrived.first_tokens == ()
    prefill.sender.on_message(KVDone(grant_id=grant.grant_id, open_id=1))
    assert prefill.reports == [] and prefill.freed == [1]


def test_another_ranks_lease_counts_from_the_answer_before() -> None:
    prefill = Prefill(rank=1)
    grant = prefill.opened()
    prefill.clock.advance(1.0)
    prefill.sender.on_message(KVRenewed(opens=((grant.grant_id, 1, 3.0),)))  # asked for after the open's answer
    prefill.clock.advance(1.84)
    prefill.sender.step()
    assert prefill.freed == []
    prefill.clock.advance(0.02)
    prefill.sender.step()
    assert prefill.freed == [1]


def test_the_wait_is_until_the_next_thing_to_do(prefill: Prefill) -> None:
    assert prefill.sender.step() is None
    grant = prefill.opened()
    assert prefill.sender.step() == pytest.approx(1.0)
    prefill.clock.advance(1.0)
    assert prefill.sender.step() == pytest.approx(1.85)  # a renewal is unanswered: until the lease's end
    prefill.network.set_fault(AGENT, LocalFault.HOLD)
    prefill.ready(grant)
    assert prefill.sender.step() == 0.0


@pytest.mark.parametrize("state", ShipmentState)
@pytest.mark.parametrize("to", ShipmentState)
def test_only_the_drawn_edges_exist(prefill: Prefill, state: ShipmentState, to: ShipmentState) -> None:
    shipment = Shipment(1, "a", 0, prefill.grant(), [], 0.0, 0.0, 0.0, state)
    if to in _NEXT[state]:
        shipment.advance(to, 0.0)
        assert shipment.state is to
    else:
        with pytest.raises(InvalidTransition, match=f"{state.value} to {to.value}"):
            shipment.advance(to, 0.0)
