"""What a rotation frees and what it must not, and what becomes of those who ask meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from kvferry.transfer.backends.reach import MAX_REPAIR_S, REPAIR_S
from kvferry.transfer.receive.processes import ProcessWatch
from kvferry.wire.grants import ProcessMark, RegionInfo
from kvferry.wire.handoff import CancelKV, KVClosed, KVDone, KVOpened, KVRefused
from kvferry.wire.results import Grant, HandoffFailed, NoCapacity

from .test_receiver import Decode, only

HERE = ProcessMark("here", 4321, 99)


class FakeProcessWatch:
    """A prefill worker's process, which ends when it is told to."""

    def __init__(self) -> None:
        self.has_ended = False
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Host(Decode):
    """A decode worker that can replace its agents, on a host with prefill workers that can be watched."""

    def __init__(self, num_blocks: int = 64, tp_size: int = 1) -> None:
        self.watches: list[FakeProcessWatch] = []
        self.rotations: list[int] = []
        super().__init__(num_blocks, tp_size, rotate=self.rotations.append, watch=self.watch)

    def watch(self, marks: Sequence[ProcessMark]) -> ProcessWatch | None:
        if not marks:
            return None
        if any(mark.pid == 0 for mark in marks):
            raise ProcessLookupError("process 0 is not found here")
        process_watch = FakeProcessWatch()
        self.watches.append(process_watch)
        return process_watch

    def left(self, name: str = "a", *, incarnation: int = 7, here: bool = False, num_tokens: int = 10) -> int:
        """A quarantine: opened, and given up by an abort. The open id."""
        grant = self.grant(name, num_tokens=num_tokens, first=hash(name) % 1000 * 1000)
        change: dict[str, object] = {"incarnation": incarnation, "processes": (HERE,) if here else ()}
        open_id = self.open(grant, change=change)
        assert isinstance(self.said_to_peer()[-1], KVOpened)
        self.grants = {**getattr(self, "grants", {}), open_id: grant}
        self.receiver.abort(name, 0)
        return open_id

    def regions(self, generation: int, *, lacks_device: bool = False) -> tuple[RegionInfo, ...]:
        """Return the regions of new agents; `lacks_device`: on the last rank, which names a way less."""
        last = self.first_regions[-1].rank
        return tuple(
            msgspec.structs.replace(
                region,
                generation=generation,
                agent=f"d-0.1.{generation}.{region.rank}",
                agent_metadata=b"tcp" if lacks_device and region.rank == last else region.agent_metadata,
            )
            for region in self.first_regions
        )

    def finish_rotation(self, *, lacks_device: bool = False) -> int:
        count = self.receiver.rotated(self.regions(self.rotations[-1], lacks_device=lacks_device))
        self.receiver.check()
        return count


@pytest.fixture
def host() -> Host:
    return Host()


def test_agents_that_were_made_during_an_outage_are_replaced_when_it_may_be_over() -> None:
    host = Host(tp_size=2)
    host.left()
    host.wait(10.1)
    assert host.finish_rotation(lacks_device=True) == 3
    host.wait(REPAIR_S - 1.0)
    assert host.rotations == [1]
    grant = host.grant("b", first=100)
    open_id = host.open(grant)
    host.wait(1.1)
    assert host.rotations == [1] and not host.receiver.rotation.timer.is_idle
    host.close(grant, open_id)  # of itself: nobody asked it to
    assert host.rotations == [1, 2]
    assert host.finish_rotation() == 0
    host.wait(2 * MAX_REPAIR_S)
    assert host.rotations == [1, 2]


def test_an_open_that_came_while_a_repair_waited_is_answered_when_it_is_put_off(host: Host) -> None:
    host.left("a")
    host.wait(10.1)
    host.finish_rotation(lacks_device=True)
    host.wait(REPAIR_S - 1.0)
    host.open(host.grant("b", first=100))
    host.wait(1.1)
    host.said_to_peer()
    open_id = host.open(host.grant("c", first=200))
    assert host.said_to_peer() == []
    host.wait(1.1)
    assert only(host.said_to_peer(), KVOpened).open_id == open_id and host.rotations == [1]


def _settling(host: Host) -> int:
    """Have an open that waits, as agents are to be replaced once another has arrived. The quarantine's open id."""
    quarantined = host.left("a")
    host.wait(9.0)
    host.open(host.grant("b", first=100), change={"incarnation": 8})
    host.wait(1.1)
    host.open(host.grant("c", first=200), change={"incarnation": 8})
    assert host.rotations == [] and not host.receiver.rotation.timer.is_idle
    host.said_to_peer()
    return quarantined


def test_an_open_that_waits_is_answered_at_once_when_the_quarantine_ends_by_itself(host: Host) -> None:
    open_id = _settling(host)
    host.close(host.grants[open_id], open_id)
    assert any(isinstance(said, KVOpened) for said in host.said_to_peer()) and host.rotations == []


def test_an_open_that_waits_is_refused_where_the_worker_has_begun_to_drain(host: Host) -> None:
    open_id = _settling(host)
    host.receiver.draining = True
    host.close(host.grants[open_id], open_id)
    assert only(host.said_to_peer(), KVRefused).reason == "draining"


def test_a_refusal_for_the_share_that_a_quarantine_takes_of_all_promises_begins_a_rotation(host: Host) -> None:
    host.left("a")
    host.wait(2.0)
    host.grant("b", num_tokens=29 * 4, first=5000)
    host.wait(0.1)
    assert host.rotations == []
    answer = host.reserve("c", num_tokens=4, first=9000)
    assert isinstance(answer, NoCapacity) and answer.reason == "growth"
    host.wait(0.1)
    assert host.rotations == [1]


def test_a_refusal_is_forgotten_after_a_second(host: Host) -> None:
    host.left("a")
    host.wait(0.5)
    assert isinstance(host.reserve("b", num_tokens=63 * 4), NoCapacity)
    host.wait(1.5)
    assert host.rotations == []


def test_a_quarantine_is_as_old_as_the_first_of_its_writer(host: Host) -> None:
    host.open(host.grant("b", first=100))
    host.left("a")
    host.wait(0.5)
    host.receiver.abort("b", 0)
    host.wait(9.6)
    assert host.rotations == [1]


def test_a_quarantine_that_ends_while_agents_are_replaced_ends_once(host: Host) -> None:
    open_id = host.left("a")
    host.wait(10.1)
    host.close(host.grants[open_id], open_id)
    assert host.rotations == [1] and host.holds_nothing()
    assert host.finish_rotation() == 0 and host.holds_nothing()


def test_an_old_quarantine_of_another_host_is_freed_by_a_rotation_alone(host: Host) -> None:
    host.left()
    host.wait(9.9)
    assert host.rotations == []
    host.wait(0.2)
    assert host.rotations == [1] and host.receiver.reservations.num_quarantined_blocks == 3
    host.wait(5.0)  # until every rank has its new agent
    assert host.rotations == [1] and host.receiver.reservations.num_quarantined_blocks == 3
    assert host.finish_rotation() == 3
    assert host.holds_nothing() and isinstance(host.said_to_peer()[-1], KVDone)


def test_a_writer_that_asks_again_waits_for_a_rotation_and_not_for_its_quarantine_to_be_old(host: Host) -> None:
    """Its connection broke, and a new one would work. Asked again at once, nobody is to pay for a second rotation."""
    host.left("a")
    host.wait(1.1)
    host.open(host.grant("b", first=100))
    assert host.rotations == [1] and not any(isinstance(said, KVRefused) for said in host.said_to_peer())
    assert host.finish_rotation() == 3
    [opened] = [said for said in host.said_to_peer() if isinstance(said, KVOpened)][-1:]
    assert opened.generation == 1 and [region.generation for region in opened.ranks] == [1]
    host.left("c")
    host.wait(1.1)
    host.open(host.grant("d", first=200))
    assert host.rotations == [1] and only(host.said_to_peer(), KVRefused).reason == "fenced_peer"


def test_a_held_open_that_is_closed_frees_its_grant_and_tells_its_router_at_once(host: Host) -> None:
    host.left("a")
    host.wait(10.1)
    grant = host.grant("b", first=100)
    open_id = host.open(grant)
    assert host.rotations == [1] and not any(isinstance(said, KVRefused) for said in host.said_to_peer())
    host.close(grant, open_id + 1)
    assert host.said_to_router() == []
    host.close(grant, open_id)
    failed = only(host.said_to_router(), HandoffFailed)
    assert (failed.request_id, failed.blame) == ("b", "refused")
    assert only(host.said_to_peer(), KVRefused).reason == "the open was closed before"
    assert host.finish_rotation() == 3 and host.holds_nothing()
    assert host.said_to_router() == [] and not any(isinstance(said, KVRefused) for said in host.said_to_peer())


def test_a_held_open_that_is_none_of_the_grants_ends_no_grant_when_it_is_closed(host: Host) -> None:
    host.left("a")
    host.wait(10.1)
    grant = host.grant("b", first=100)
    open_id = host.open(grant, change={"mac": b"x" * 32})
    host.close(grant, open_id)
    assert host.said_to_router() == [] and host.receiver.reservations.num_granted_blocks == 3


def test_a_writer_of_this_host_is_not_fenced_while_it_lives(host: Host) -> None:
    host.left("a", here=True)
    host.left("b", incarnation=8)
    host.wait(10.1)
    assert host.finish_rotation() == 3
    assert host.receiver.reservations.num_quarantined_blocks == 3 and host.receiver.quarantine_s(7) > 0
    host.wait(100.0)
    assert host.rotations == [1]  # nothing more would be freed
    host.watches[0].has_ended = True
    host.wait(0.1)
    assert host.rotations == [1, 2]
    assert host.finish_rotation() == 3 and host.holds_nothing()
    host.wait(0.1)
    assert host.watches[0].is_closed


def test_a_death_that_comes_while_agents_are_replaced_is_too_late_for_this_rotation(host: Host) -> None:
    """What it gave to the network just before may be on its way to an agent that is new already."""
    host.left("a", here=True)
    host.left("b", incarnation=8)
    host.wait(10.1)
    host.watches[0].has_ended = True
    assert host.finish_rotation() == 3
    assert host.receiver.reservations.num_quarantined_blocks == 3


def test_a_writer_of_this_host_that_destroyed_its_agent_is_behind_the_network(host: Host) -> None:
    open_id = host.left("a", here=True)
    grant = host.grants[open_id]
    host.wait(11.0)
    assert host.rotations == []
    closed = KVClosed(grant_id=grant.grant_id, open_id=open_id, source_rank=0, clean=False, detached=True)
    host.receiver.on_message("p-0#1", msgspec.structs.replace(closed, detached=False))
    host.wait(0.1)
    assert host.rotations == []  # it may still copy
    host.receiver.on_message("p-0#1", closed)
    assert host.receiver.reservations.num_quarantined_blocks == 3  # loopback's buffers may still hold some
    host.wait(0.1)
    assert host.rotations == [1]
    assert host.finish_rotation() == 3 and host.holds_nothing()


def test_a_writer_is_behind_the_network_when_each_rank_has_ended_or_destroyed_its_agent(host: Host) -> None:
    grant = host.grant("a")
    open_id = host.open(grant, tp_size=2, change={"processes": (HERE,)})
    host.close(grant, open_id)
    host.wait(11.0)
    assert host.rotations == []
    closed = KVClosed(grant_id=grant.grant_id, open_id=open_id, source_rank=1, clean=False, detached=True)
    host.receiver.on_message("p-0#1", closed)
    host.wait(0.1)
    assert host.rotations == [1] and host.finish_rotation() == 3


def test_the_death_of_a_writer_ends_its_opens_and_frees_at_once_what_is_wanted() -> None:
    host = Host(num_blocks=16)
    grant = host.grant("a", num_tokens=32)
    host.open(grant, change={"processes": (HERE,)})
    host.watches[0].has_ended = True
    host.wait(0.1)
    assert only(host.said_to_router(), HandoffFailed).blame == "peer"
    host.finish_rotation()  # half of the pool: more than a tenth
    assert host.holds_nothing()
    host = Host(num_blocks=64)
    host.left("a", here=True, num_tokens=20)
    host.watches[0].has_ended = True
    host.wait(0.1)
    assert host.rotations == []
    host.pool.allocate(52)
    assert isinstance(host.reserve("b", num_tokens=40, first=5000), NoCapacity)
    host.wait(0.0)
    assert host.rotations == [1]
    assert host.finish_rotation() == 5
    assert isinstance(host.reserve("b", num_tokens=40, first=5000), Grant)


def test_open_handoffs_get_a_second_and_then_end_with_the_rotation(host: Host) -> None:
    host.left("a")
    host.wait(10.0)
    grant = host.grant("b", first=5000)
    host.wait(0.0)
    assert host.rotations == [1]
    host.finish_rotation()
    host = Host()
    host.left("a")
    host.wait(9.5)
    grant = host.grant("b", first=5000)
    open_id = host.open(grant, change={"incarnation": 8})
    host.wait(0.5)
    assert host.rotations == [] and not host.receiver.rotation.timer.is_idle
    host.said_to_router()
    host.wait(1.0)
    assert host.rotations == [1]
    assert only(host.said_to_router(), HandoffFailed).blame == "fenced"
    assert any(isinstance(message, CancelKV) and message.open_id == open_id for message in host.said_to_peer())
    assert host.finish_rotation() == 6 and host.holds_nothing()


def test_a_handoff_that_arrives_in_time_is_spared(host: Host) -> None:
    host.left("a")
    host.wait(9.5)
    grant = host.grant("b", first=5000)
    open_id = host.open(grant, change={"incarnation": 8})
    host.wait(0.5)
    host.arrive(grant, open_id)
    assert host.rotations == [1] and len(host.receiver.arrived) == 1
    host.finish_rotation()
    assert host.pool.num_owned_blocks == 3


def test_a_live_neighbour_gets_time_to_end_cleanly_before_the_agents_go(host: Host) -> None:
    host.left("a")
    host.wait(9.5)
    grant = host.grant("b", first=5000)
    open_id = host.open(grant, change={"incarnation": 8, "processes": (HERE,)})
    host.wait(1.5)
    host.said_to_peer()
    host.wait(1.0)
    assert only(host.said_to_peer(), CancelKV).open_id == open_id and host.rotations == []
    host.close(grant, open_id)
    assert host.rotations == [1] and host.receiver.reservations.num_quarantined_blocks == 3
    assert host.finish_rotation() == 3 and host.holds_nothing()


def test_a_grant_from_before_is_opened_with_the_new_regions(host: Host) -> None:
    host.left("a")
    host.wait(9.9)
    before = host.grant("b", first=5000)
    host.wait(0.2)
    host.finish_rotation()
    assert before.ranks[0].generation == 0
    host.open(before, change={"incarnation": 8})
    opened = only(host.said_to_peer()[-1:], KVOpened)
    assert opened.generation == 1 and [region.agent for region in opened.ranks] == ["d-0.1.1.0"]
    after = host.grant("c", first=9000)
    assert [region.agent for region in after.ranks] == ["d-0.1.1.0"]
    host.open(after, change={"incarnation": 8})
    assert only(host.said_to_peer()[-1:], KVOpened).ranks == ()


def test_an_open_that_comes_during_a_rotation_is_answered_after_it(host: Host) -> None:
    host.left("a")
    host.wait(9.0)
    grant = host.grant("b", first=5000)
    host.wait(1.1)
    host.said_to_peer()
    open_id = host.open(grant)  # by the very peer whose quarantine is being fenced
    assert host.said_to_peer() == []
    host.wait(2.5)  # the grant does not lapse meanwhile
    host.finish_rotation()
    opened = [message for message in host.said_to_peer() if isinstance(message, KVOpened)]
    assert [(message.open_id, message.generation) for message in opened] == [(open_id, 1)]
    host.wait(0.1)
    assert host.said_to_peer() == []


def test_a_refusal_that_no_rotation_would_have_spared_begins_none(host: Host) -> None:
    host.left("a")
    host.wait(2.0)
    assert isinstance(host.reserve("b", num_tokens=65 * 4), NoCapacity)
    host.wait(0.1)
    assert host.rotations == []
    assert isinstance(host.reserve("b", num_tokens=63 * 4), NoCapacity)
    host.wait(0.1)
    assert host.rotations == [1]


def test_an_open_whose_connection_ended_meanwhile_binds_nobody(host: Host) -> None:
    host.left("a")
    host.wait(9.0)
    grant = host.grant("b", first=5000)
    host.wait(1.1)
    host.open(grant, session="p-0#9")
    host.receiver.on_session_lost("p-0#9")
    host.finish_rotation()
    assert not host.receiver.has_open


def test_a_rotation_that_fails_frees_nothing_and_is_tried_again(host: Host) -> None:
    host.left("a")
    host.wait(10.1)
    host.receiver.rotation_failed()
    assert host.receiver.reservations.num_quarantined_blocks == 3
    answer = host.reserve("b", first=5000)
    assert isinstance(answer, NoCapacity) and answer.reason == "no_agent"
    host.wait(0.5)
    assert host.rotations == [1]
    host.wait(0.6)
    assert host.rotations == [1, 2]
    assert host.finish_rotation() == 3 and host.holds_nothing()
    assert isinstance(host.reserve("b", first=5000), Grant)
    timer = host.receiver.rotation.timer
    assert (timer.num_rotations, timer.num_failures) == (1, 1)


def test_an_open_that_waits_for_agents_that_never_come_is_refused(host: Host) -> None:
    host.left("a")
    host.wait(9.0)
    grant = host.grant("b", first=5000)
    host.wait(1.1)
    host.open(grant)
    host.receiver.rotation_failed()
    host.said_to_peer()
    host.wait(3.1)
    assert only(host.said_to_router(), HandoffFailed).blame == "expired"
    host.finish_rotation()
    assert isinstance(host.said_to_peer()[-1], KVRefused)


def test_an_incarnation_is_watched_once_and_one_that_is_not_found_opens_nothing(host: Host) -> None:
    host.open(host.grant("a"), change={"processes": (HERE,)})
    host.open(host.grant("b", first=5000), change={"processes": (HERE,)})
    assert len(host.watches) == 1
    host.open(host.grant("c", first=9000), change={"incarnation": 9, "processes": (ProcessMark("here", 0, 1),)})
    assert "not found" in only(host.said_to_peer()[-1:], KVRefused).reason
    assert host.receiver.counters.grant_rejects == {"process": 1}


def test_an_incarnation_that_comes_back_is_watched_anew(host: Host) -> None:
    host.close(grant := host.grant("a"), host.open(grant, change={"processes": (HERE,)}))
    host.wait(0.1)
    assert [watch.is_closed for watch in host.watches] == [True]
    host.open(host.grant("b", first=5000), change={"processes": (HERE,)})
    host.wait(0.1)
    assert [watch.is_closed for watch in host.watches] == [True, False]


def test_the_first_open_that_waits_for_agents_binds_and_shortens_no_grant(host: Host) -> None:
    host.left("a")
    host.wait(10.1)
    grant = host.grant("b", first=5000)
    reservation = host.receiver.reservations.of_request("b")
    assert reservation is not None
    reservation.deadline += 10.0
    open_id = host.open(grant)
    host.open(grant, session="p-0#9")
    host.wait(5.0)
    host.said_to_peer()
    host.finish_rotation()
    assert only(host.said_to_peer(), KVOpened).open_id == open_id


def test_without_a_way_to_rotate_only_a_clean_end_frees() -> None:
    decode = Decode()
    grant, open_id = decode.opened()
    decode.receiver.abort("a", 0)
    decode.wait(1000.0)
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.close(grant, open_id)
    assert decode.holds_nothing()
