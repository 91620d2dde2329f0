"""A prefill worker gives every block back, wherever a task or a shipment was when it ended."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from kvferry.common.batch import Batch
from kvferry.wire.results import FirstToken
from kvferry.wire.tasks import Abort
from kvferry.wire.workers import LiveRequests

from .test_role import EOS, _Bench

ROUTERS = ("R", "S")


class _Play:
    """Routers and the senders of one prefill worker."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.bench = _Bench(num_blocks=20, budget=8)
        self.role = self.bench.role
        self.tasks: dict[str, tuple[str, int]] = {}  # request id -> router, attempt
        self.open_of: dict[int, tuple[str, int]] = {}  # open id -> request id, attempt; until the shipment has ended
        self.told: set[int] = set()  # their blocks are read no more
        self.batch: Batch | None = None
        self.num_requests = self.num_aborts = 0

    def ask(self) -> None:
        self.num_requests += 1
        name, attempt = f"r{self.num_requests}", 0
        if self.tasks and self.random.random() < 0.15:
            name = self.random.choice(list(self.tasks))
            attempt = self.tasks[name][1] + self.random.randint(0, 1)
        router = self.random.choice(ROUTERS)
        self.tasks[name] = (router, attempt)
        task = self.bench.prefill_task(
            name,
            self.random.randint(1, 60),
            attempt=attempt,
            sample=self.random.random() < 0.8,
            priority=self.random.randint(0, 2),
            remaining_s=self.random.choice((None, None, 0.0, 0.2, 5.0)),
            first=self.random.choice((0, 500)),
        )
        self.role.on_router_message(router, task)

    def abort(self) -> None:
        if self.tasks:
            name = self.random.choice(list(self.tasks))
            router, attempt = self.tasks.pop(name)
            self.num_aborts += 1
            self.role.on_router_message(router, Abort(request_id=name, attempt=attempt))

    def lose_router(self) -> None:
        router = self.random.choice(ROUTERS)
        live = tuple(
            (n, attempt) for n, (r, attempt) in self.tasks.items() if r == router and self.random.random() < 0.6
        )
        self.role.on_router_message(router, LiveRequests(attempts=live))
        self.tasks = {n: entry for n, entry in self.tasks.items() if entry[0] != router or (n, entry[1]) in live}

    def step(self) -> None:
        if self.batch is not None:
            batch, self.batch = self.batch, None
            self.bench.end(batch, self.random.choice((7, EOS)))
            return
        known = len(self.bench.shipping.opened)
        self.batch = self.bench.begin()
        for open_id in range(known + 1, len(self.bench.shipping.opened) + 1):
            self.open_of[open_id] = self.bench.shipping.opens[open_id - 1]

    def end_shipment(self) -> None:
        """Any shipment may fail; those that were finished or cancelled end some day."""
        if self.open_of:
            open_id = self.random.choice(list(self.open_of))
            if open_id in self.told:
                self.told.remove(open_id)
                del self.open_of[open_id]
                assert self.role.router_of(open_id) is not None
            else:
                self.told.add(open_id)
                self.role.on_source_free(open_id)

    def pass_time(self) -> None:
        self.bench.clock.advance(0.1)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_back_after_aborts_at_random_moments(seed: int) -> None:
    play = _Play(seed)
    events: dict[Callable[[], None], int] = {
        play.ask: 8,
        play.abort: 6,
        play.lose_router: 1,
        play.step: 30,
        play.end_shipment: 14,
        play.pass_time: 4,
    }
    for _ in range(6000):
        [event] = play.random.choices(list(events), weights=list(events.values()))
        event()
        play.role.check()
    for name, (router, attempt) in play.tasks.items():
        play.role.on_router_message(router, Abort(request_id=name, attempt=attempt))
    assert set(play.open_of) - play.told <= set(play.bench.shipping.cancelled) | set(play.bench.shipping.finished)
    while play.batch is not None:
        play.step()
        play.batch = None if play.batch is None else play.batch
    while play.open_of:
        play.end_shipment()
        play.role.check()
    assert play.num_aborts > 400 and len(play.bench.messages(FirstToken)) > 100
    assert play.role.is_quiet and play.bench.pool.num_owned_blocks == 0


def test_an_abort_after_the_first_token_ends_the_shipment() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.run()
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert bench.shipping.cancelled == {1: "aborted by the router"}


def test_a_newer_attempt_ends_the_shipment_of_the_one_before() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.run()
    bench.task("a", 18, attempt=1)
    assert bench.shipping.cancelled == {1: "a newer attempt has begun"}
    bench.run()
    assert set(bench.shipping.finished) == {1, 2} and 2 not in bench.shipping.cancelled


def test_an_abort_that_asks_or_is_about_choices_is_the_decode_workers() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0, unless_arrived=True))
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0, choices=(0,)))
    bench.run()
    assert bench.shipping.finished and not bench.shipping.cancelled
