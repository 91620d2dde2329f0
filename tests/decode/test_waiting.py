"""Reservations that wait for blocks: in which order they get them, and that each is answered."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvferry.common.request import RequestSpec
from kvferry.kvcache.contents import TokenContents
from kvferry.wire.fields import Message
from kvferry.wire.results import Grant, NoCapacity
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV
from kvferry.wire.workers import LiveRequests

from .bench import Bench


def _full(bench: Bench) -> None:
    """Half of the pool is promised: more than that needs room."""
    bench.send(ReserveKV(spec=bench.spec("full", 32)))
    assert isinstance(bench.sent[-1], Grant)
    bench.sent.clear()


def _ask(bench: Bench, name: str, num_tokens: int, *, router: str = "R", **fields: Any) -> RequestSpec:
    spec = msgspec.structs.replace(bench.spec(name, num_tokens, **fields), prompt=bytes([len(name)]) * 4 * num_tokens)
    bench.role.on_router_message(router, ReserveKV(spec=spec, queue_if_full=True))
    return spec


def _answers(bench: Bench) -> list[tuple[str, str]]:
    found = []
    for message in bench.sent:
        if isinstance(message, Grant):
            found.append((message.request_id, "grant"))
        elif isinstance(message, NoCapacity):
            found.append((message.request_id, message.reason))
    bench.sent.clear()
    return found


def test_a_reservation_waits_for_blocks_and_gets_them_when_they_come_free() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "large", 20, router="Q")
    bench.role.tick()
    assert _answers(bench) == [] and bench.role.num_unfinished == 2 and not bench.role.is_quiet
    assert bench.role.routers == {"R", "Q"}
    bench.send(Abort(request_id="full", attempt=0))
    bench.step()
    assert _answers(bench) == [("large", "grant")]
    bench.role.check()


def test_its_prompt_is_hashed_once_however_often_there_is_other_room(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, hashes = list[str](), TokenContents.prompt_hashes

    def count(self: TokenContents, spec: RequestSpec) -> list[bytes]:
        hashed.append(spec.request_id)
        return hashes(self, spec)

    monkeypatch.setattr(TokenContents, "prompt_hashes", count)
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "large", 20)
    for _ in range(3):
        blocks = bench.pool.allocate(1)
        bench.role.tick()
        bench.pool.free(blocks)
        bench.role.tick()
    bench.send(Abort(request_id="full", attempt=0))
    bench.role.tick()
    assert _answers(bench) == [("large", "grant")] and hashed == ["full", "large"]


def test_without_the_wish_to_wait_it_is_refused_at_once() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    bench.send(ReserveKV(spec=bench.spec("large", 20)))
    assert _answers(bench) == [("large", "growth")]


def test_smaller_ones_pass_only_in_what_the_waiting_one_does_not_need() -> None:
    bench = Bench(num_blocks=16)
    bench.hand_over(bench.spec("a", 20), ())  # five blocks in use
    bench.send(ReserveKV(spec=bench.spec("full", 32, arrival=1)))
    _answers(bench)
    _ask(bench, "large", 12, arrival=2)  # three of the three that are left: none for growth
    assert _answers(bench) == []
    bench.send(ReserveKV(spec=bench.spec("small", 4, arrival=3)))
    assert _answers(bench) == [("small", "growth")]
    bench.send(ReserveKV(spec=bench.spec("older", 4, arrival=0)))
    assert ("older", "blocks") not in _answers(bench)


def test_what_may_be_promised_is_kept_for_a_waiting_one_as_well() -> None:
    """More than half of the pool is promised to nobody but one: beside steady small ones it would wait for ever."""
    bench = Bench(num_blocks=32)
    bench.send(ReserveKV(spec=bench.spec("open", 8, arrival=1)))
    assert _answers(bench) == [("open", "grant")]
    _ask(bench, "large", 72, arrival=2)  # 18 of 32
    bench.send(ReserveKV(spec=bench.spec("before", 8, arrival=3)))
    assert _answers(bench) == [("before", "grant")], "what is open holds the large one up, whoever comes"
    bench.send(Abort(request_id="open", attempt=0))
    bench.send(ReserveKV(spec=bench.spec("small", 8, arrival=4)))  # for which 12 are left
    assert _answers(bench) == [("small", "growth")]
    bench.send(ReserveKV(spec=bench.spec("older", 8, arrival=0)))
    assert _answers(bench) == [("older", "grant")]
    for name in ("before", "older"):
        bench.send(Abort(request_id=name, attempt=0))
    bench.step()
    assert _answers(bench) == [("large", "grant")]
    bench.role.check()


def test_others_have_what_a_waiting_one_cannot_get_before_an_older_promise_ends() -> None:
    bench = Bench(num_blocks=100)
    bench.send(ReserveKV(spec=bench.spec("long", 160, arrival=0)))  # 40 blocks, for as long as its prompt is computed
    _answers(bench)
    _ask(bench, "waits", 80, arrival=1)  # 20 more would be more than half
    for number in range(5):
        bench.send(ReserveKV(spec=bench.spec(f"small-{number}", 4, arrival=2 + number)))
    assert [answer for _, answer in _answers(bench)] == ["grant"] * 5
    bench.send(Abort(request_id="long", attempt=0))
    bench.step()
    assert _answers(bench) == [("waits", "grant")]


def test_what_was_kept_for_one_that_is_given_up_goes_to_the_next() -> None:
    bench = Bench(num_blocks=16)
    bench.send(LocalTask(spec=bench.spec("running", 40)))
    while len(bench.tokens("running").get(0, ())) < 1:
        bench.step()
    bench.sent.clear()
    _ask(bench, "large", 24)
    _ask(bench, "small", 4, router="Q", arrival=1)
    bench.role.tick()
    assert _answers(bench) == []
    bench.send(Abort(request_id="large", attempt=0))
    bench.role.tick()
    assert _answers(bench) == [("small", "grant")]


def test_one_that_is_asked_for_again_goes_on_waiting() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    for _ in range(2):
        _ask(bench, "large", 40)
    assert _answers(bench) == [] and bench.role.num_waiting_reservations == 1


def test_only_one_of_a_router_waits_and_that_is_its_oldest() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "second", 20, arrival=5)
    _ask(bench, "third", 20, arrival=6)
    assert _answers(bench) == [("third", "growth")]
    _ask(bench, "first", 20, arrival=4)
    assert _answers(bench) == [("second", "growth")]
    _ask(bench, "other", 20, arrival=9, router="S")
    assert _answers(bench) == [] and bench.role.num_unfinished == 3


def test_a_higher_class_is_served_before_an_older_one() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "older", 20, arrival=1, priority=1)
    _ask(bench, "higher", 20, arrival=2, priority=0, router="S")
    bench.send(Abort(request_id="full", attempt=0))
    bench.step()
    assert _answers(bench) == [("higher", "grant")]


@pytest.mark.parametrize(("remaining_s", "waits_s"), [(None, 2.0), (0.5, 0.5)])
def test_it_is_refused_after_two_seconds_or_at_its_deadline(remaining_s: float | None, waits_s: float) -> None:
    bench = Bench(num_blocks=16)
    bench.hand_over(bench.spec("full", 60), ())
    _answers(bench)
    _ask(bench, "large", 20, remaining_s=remaining_s)
    bench.clock.advance(waits_s - 0.01)
    bench.role.tick()
    assert _answers(bench) == []
    bench.clock.advance(0.02)
    bench.role.tick()
    assert _answers(bench) == [("large", "blocks")]
    assert not bench.role.receiver.holds("large")


@pytest.mark.parametrize(
    "end",
    [
        Abort(request_id="large", attempt=0),
        Abort(request_id="large", attempt=0, unless_arrived=True),
        LiveRequests(attempts=()),
    ],
)
def test_its_router_can_give_it_up(end: Message) -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "large", 20)
    bench.send(end)
    bench.send(Abort(request_id="full", attempt=0))
    bench.step()
    assert ("large", "grant") not in _answers(bench)
    assert bench.role.is_quiet


def test_a_lost_router_waits_for_nothing() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "large", 20)
    bench.role.on_router_lost("R")
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0


def test_a_draining_worker_answers_it() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    _ask(bench, "large", 20)
    bench.role.draining = True
    assert ("large", "draining") in _answers(bench)


def test_what_can_never_fit_does_not_wait() -> None:
    bench = Bench(num_blocks=16)
    _ask(bench, "huge", 80)
    assert _answers(bench) == [("huge", "never_fits")]


def test_a_choice_that_ends_while_its_reservation_waits_never_decodes() -> None:
    bench = Bench(num_blocks=16)
    _full(bench)
    spec = _ask(bench, "large", 18, n=2)
    bench.send(Abort(request_id="large", attempt=0, choices=(0,)))
    bench.send(Abort(request_id="full", attempt=0))
    bench.step()
    grant = bench.last(Grant)
    assert isinstance(grant, Grant)
    bench.open(spec, grant.grant)
    bench.arrive(spec, grant.grant, ())
    bench.run()
    assert set(bench.tokens("large")) == {1}
