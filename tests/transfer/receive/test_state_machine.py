"""The decode side's invariants after every event of whatever story: Hypothesis tells them, and long seeded ones.

The same stories find the bugs that are planted here: each rule that is taken out must bring its breach back.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.common.request import RequestSpec
from kvferry.transfer.backends.local import LocalFault
from kvferry.transfer.receive.opens import Refusal
from kvferry.transfer.receive.reservation import Reservation, ReservationState, Writer
from kvferry.wire.handoff import KVOpen
from kvferry.wire.results import Grant, NoCapacity

from ..walk import NUM_PEERS, Walk

_peers = st.integers(0, NUM_PEERS - 1)
_some = st.sampled_from([99, 99, 1, 0])
_FAULTS = (LocalFault.HOLD, LocalFault.FAIL, LocalFault.STALL, LocalFault.DROP)


class HandoffMachine(RuleBasedStateMachine):
    """Few rules with many arguments: a rule is drawn first, and a way of many rules is seldom walked to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.walk = Walk()

    @rule(
        name=st.sampled_from("abc"),
        num_tokens=st.integers(1, 20),
        num_choices=st.integers(1, 2),
        peers=st.lists(_peers, max_size=2),
    )
    def request(self, name: str, num_tokens: int, num_choices: int, peers: list[int]) -> None:
        self.walk.request(name, num_tokens, num_choices, peers)

    @rule(peer=_peers, rounds=st.integers(1, 4), hears=_some, answers=_some, arrives=st.booleans())
    def progress(self, peer: int, rounds: int, hears: int, answers: int, arrives: bool) -> None:
        self.walk.progress(peer, rounds, hears, answers, arrives)

    @rule(back=st.integers(1, 4), peer=_peers, name=st.sampled_from("abc"), what=st.integers(0, 3))
    def change_of_mind(self, back: int, peer: int, name: str, what: int) -> None:
        match what:
            case 0:
                self.walk.deliver_late(back, peer)
            case 1:
                self.walk.cancel(peer)
            case _:
                self.walk.abort(name, unless_arrived=what == 2)

    @precondition(lambda self: self.walk.notifications)
    @rule(index=st.integers(0, 5), fate=st.sampled_from(["deliver", "deliver", "double", "lose"]))
    def deliver_notification(self, index: int, fate: str) -> None:
        self.walk.deliver_notification(index, fate)

    @rule(fault=st.sampled_from([None, *_FAULTS]))
    def set_link(self, fault: LocalFault | None) -> None:
        self.walk.set_link(fault)

    @rule(peer=_peers, what=st.sampled_from(["stop", "stop in a turn", "resume", "resume", "crash", "die", "cut"]))
    def befall(self, peer: int, what: str) -> None:
        match what:
            case "stop" | "stop in a turn":
                self.walk.stop(peer, posts=what != "stop")
            case "resume":
                self.walk.resume(peer)
            case "cut":
                self.walk.lose_connection(peer)
            case _:
                self.walk.crash(peer, is_noticed=what == "crash")

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 10.0]), rotation=st.sampled_from([None, True, True, False]))
    def wait(self, seconds: float, rotation: bool | None) -> None:
        """Time passes; a rotation that was asked for ends well, or badly, or not yet."""
        self.walk.wait(seconds)
        if rotation is not None:
            self.walk.finish_rotation(succeeds=rotation)

    @rule(adopts=st.booleans(), finishes=st.booleans())
    def schedule(self, adopts: bool, finishes: bool) -> None:
        self.walk.schedule(adopts, finishes)

    @rule(what=st.sampled_from(["spoil", "restart"]))
    def hurt_decode(self, what: str) -> None:
        if what == "spoil":
            self.walk.spoil()
        else:
            self.walk.restart_decode()

    @invariant()
    def holds(self) -> None:
        self.walk.check_invariants()

    def teardown(self) -> None:
        self.walk.settle()


HandoffMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHandoffMachine = pytest.mark.slow(HandoffMachine.TestCase)


# --- long stories ---------------------------------------------------------------------------------------------------


def _event(walk: Walk, draw: random.Random) -> None:
    """One of them, those that lead somewhere more often."""
    peer = draw.randrange(NUM_PEERS)
    some = draw.choice([99, 99, 99, 1, 0])
    match draw.choices(range(14), weights=[12, 40, 8, 5, 5, 2, 2, 3, 4, 4, 6, 8, 1, 2])[0]:
        case 0:
            peers = draw.choice([[], [peer], [peer], [peer], [peer, peer], [0, 1]])
            walk.request(draw.choice("abc"), draw.randint(1, 20), draw.randint(1, 2), peers)
        case 1:
            walk.progress(peer, draw.randint(1, 4), some, draw.choice([99, some]), draw.random() < 0.5)
        case 2:
            walk.schedule(draw.random() < 0.7, draw.random() < 0.5)
        case 3:
            walk.set_link(draw.choice([None, None, None, *_FAULTS]))
        case 4:
            walk.wait(draw.choice([0.1, 0.5, 1.0, 2.0, 3.0, 10.0]))
        case 5:
            walk.abort(draw.choice("abc"), draw.random() < 0.5)
        case 6:
            walk.cancel(peer)
        case 7:
            if draw.random() < 0.5:
                walk.lose_connection(peer)
            else:
                walk.crash(peer, draw.random() < 0.5)
        case 8:
            walk.stop(peer, draw.random() < 0.7)
        case 9:
            walk.resume(peer)
        case 10:
            walk.deliver_notification(draw.randrange(6), draw.choice(["deliver", "double", "lose"]))
        case 11:
            walk.finish_rotation(draw.random() < 0.8)
        case 12:
            walk.deliver_late(draw.randint(1, 4), peer)
        case 13:
            draw.choice([walk.spoil, walk.spoil, walk.spoil, walk.restart_decode])()


def _story(walk_type: type[Walk], seed: int, num_events: int = 150) -> Walk:
    walk, draw = walk_type(), random.Random(seed)
    for _ in range(num_events):
        _event(walk, draw)
        walk.check_invariants()
    walk.settle()
    return walk


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(0, 240, 40))
def test_long_stories_keep_every_invariant_and_end_well(first_seed: int) -> None:
    walks = [_story(Walk, seed) for seed in range(first_seed, first_seed + 40)]
    assert sum(walk.num_adopted for walk in walks) > 40  # they are about something
    assert sum(walk.num_rotations for walk in walks) > 10


# --- planted bugs ---------------------------------------------------------------------------------------------------


class WithoutRotation(Walk):
    """A fence that replaces nothing."""

    rotates = False


class WithoutWatching(Walk):
    """A rotation taken for a fence of writers that copy by themselves."""

    watches = False


class WithoutChecksums(Walk):
    """Arrivals are taken as they are."""

    checks_bytes = False


class WithoutQuarantine(Walk):
    """Who gives an open up, for a lease that ran out as for an abort, frees its blocks."""

    def plant(self) -> None:
        endings = self.receiver.endings
        doom = endings.doom

        def free_at_once(reservation: Reservation, reason: str, blame: str | None) -> None:
            doom(reservation, reason, blame)
            endings.end_doomed(reservation)

        endings.doom = free_at_once  # type: ignore[method-assign]


class WithUncleanTakenForClean(Walk):
    """«What was posted may still land» taken for an end."""

    def plant(self) -> None:
        endings = self.receiver.endings
        doom = endings.doom

        def end_if_closed(reservation: Reservation, reason: str, blame: str | None) -> None:
            doom(reservation, reason, blame)
            if blame == "link":
                endings.rank_ended(reservation, 0)

        endings.doom = end_if_closed  # type: ignore[method-assign]


class WithoutSingleUse(Walk):
    """Whoever opens last writes."""

    def plant(self) -> None:
        def let_in(session: str, message: KVOpen, reservation: Reservation, writer: Writer) -> Refusal | None:
            if reservation.state is not ReservationState.OPEN:
                return Refusal("reused", "the grant was opened before")
            writer.open_id, writer.session, writer.incarnation = message.open_id, session, message.incarnation
            return None

        self.receiver.opens._refuse_second = let_in  # type: ignore[method-assign]


class WithoutShutOut(Walk):
    """A peer with an old quarantine goes on to open."""

    def plant(self) -> None:
        reservations = self.receiver.reservations
        reservations.quarantine_s = lambda now, incarnation=None: 0.0  # type: ignore[method-assign]


class WithoutPins(Walk):
    """Cached blocks that a grant counts on may be evicted."""

    def plant(self) -> None:
        pool = self.pool
        reserve = self.receiver.reserve

        def forget_to_pin(spec: RequestSpec, router_id: str, **options: Any) -> Grant | NoCapacity:
            answer = reserve(spec, router_id, **options)
            known = self.receiver.reservations.of_request(spec.request_id)
            if known is not None and known.hit_blocks:
                pool.free(known.hit_blocks)
            return answer

        self.receiver.reserve = forget_to_pin  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("walk_type", "breach"),
    [
        (WithoutRotation, "a write "),
        (WithoutWatching, "a write "),
        (WithoutChecksums, "holds other bytes"),
        (WithoutQuarantine, "a write "),
        (WithUncleanTakenForClean, "a write "),
        (WithoutSingleUse, "bound to two opens"),
        (WithoutShutOut, "after it should have been shut out"),
        (WithoutPins, "freed twice|not pinned"),
    ],
)
def test_a_rule_that_is_taken_out_is_missed(walk_type: type[Walk], breach: str) -> None:
    with pytest.raises(AssertionError, match=breach):
        for seed in range(200):
            _story(walk_type, seed)
