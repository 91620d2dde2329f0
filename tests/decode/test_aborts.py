"""A decode worker gives everything back, wherever a request was when it ended.

Routers ask, change their minds, come back and go away; prefill workers open, arrive, give up and vanish; all at
random, over a pool that is too small, with the books compared after each event.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec
import pytest

from kvferry.common.batch import Batch
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.wire.grants import GrantInfo
from kvferry.wire.handoff import CancelKV, KVClosed
from kvferry.wire.results import ChoiceTokens, Grant, HandoffDone, NoCapacity, TaskRefused
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV
from kvferry.wire.workers import LiveRequests

from .bench import BLOCK, EOS, Bench, first_token

NUM_BLOCKS = 24
ROUTERS = ("R", "S")


class _Play:
    """The others of one decode worker. `specs`: what routers have asked for and not given up."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.bench = Bench(NUM_BLOCKS, max_num_seqs=4, num_swap_blocks=self.random.choice((0, 6, 40, 40)))
        self.role = self.bench.role
        self.specs: dict[str, tuple[str, RequestSpec]] = {}
        self.grants: dict[int, tuple[RequestSpec, GrantInfo]] = {}  # by epoch: those that were not opened
        self.opens: dict[int, tuple[RequestSpec, GrantInfo]] = {}  # by open id: those whose writers have not ended
        self.batch: Batch | None = None
        self.num_requests = self.num_aborts = self.num_swapped = 0

    # --- routers ------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        self.num_requests += 1
        name, attempt = f"r{self.num_requests}", 0
        if self.specs and self.random.random() < 0.15:  # another attempt, or the same one again
            name = self.random.choice(list(self.specs))
            attempt = self.specs[name][1].attempt + self.random.randint(0, 1)
        spec, router = self._spec(name, attempt), self.random.choice(ROUTERS)
        self.specs[name] = (router, spec)
        if self.random.random() < 0.6:
            message = ReserveKV(spec=spec, queue_if_full=self.random.random() < 0.5)
            self.role.on_router_message(router, message)
        else:
            self.role.on_router_message(router, LocalTask(spec=spec))

    def _spec(self, name: str, attempt: int) -> RequestSpec:
        random, n = self.random, self.random.choice((1, 1, 2, 3))
        num_tokens, first = random.randint(1, 40), random.choice((0, 100, 200))
        outputs: tuple[bytes, ...] = ()
        if random.random() < 0.2:
            outputs = tuple(pack_ids([9] * random.randint(0, 5)) for _ in range(n))
        return RequestSpec(
            request_id=name,
            attempt=attempt,
            prompt=pack_ids(list(range(first, first + num_tokens))),
            sampling=SamplingParams(temperature=0.0, max_tokens=random.randint(6, 60)),
            choices=tuple(range(n)),
            outputs=outputs,
            priority=random.randint(0, 2),
            arrival=self.num_requests,
            remaining_s=random.choice((None, None, 0.0, 0.5, 5.0)),
        )

    def abort(self) -> None:
        if not self.specs:
            return
        name = self.random.choice(list(self.specs))
        router, spec = self.specs[name]
        self.num_aborts += 1
        kind = self.random.random()
        if kind < 0.3:
            choices = (self.random.choice(spec.choices),)
            self.role.on_router_message(router, Abort(request_id=name, attempt=spec.attempt, choices=choices))
            return
        if kind < 0.4:
            message = Abort(request_id=name, attempt=spec.attempt, unless_arrived=True)
            self.role.on_router_message(router, message)
            return
        del self.specs[name]
        self.role.on_router_message(router, Abort(request_id=name, attempt=spec.attempt))

    def abort_before_it_is_asked(self) -> None:
        spec = self._spec(f"early{self.num_requests}", 0)
        self.num_requests += 1
        self.num_aborts += 1
        self.role.on_router_message("R", Abort(request_id=spec.request_id, attempt=0))
        asked = ReserveKV(spec=spec) if self.random.random() < 0.5 else LocalTask(spec=spec)
        self.role.on_router_message("R", asked)
        answer = self.bench.sent[-1]
        assert isinstance(answer, NoCapacity | TaskRefused) and answer.reason == "stale"

    def lose_router(self) -> None:
        router = self.random.choice(ROUTERS)
        live = {name: entry for name, entry in self.specs.items() if entry[0] == router and self.random.random() < 0.7}
        if self.random.random() < 0.3:
            self.role.on_router_lost(router)
            live = {}
        else:
            pairs = tuple((name, spec.attempt) for name, (_, spec) in live.items())
            self.role.on_router_message(router, LiveRequests(attempts=pairs))
        self.num_aborts += len(self.specs) - len(live)
        self.specs = {name: entry for name, entry in self.specs.items() if entry[0] != router} | live

    # --- prefill workers ----------------------------------------------------------------------------------------

    def read_answers(self) -> None:
        for message in self.bench.sent:
            if isinstance(message, Grant) and message.request_id in self.specs:
                spec = self.specs[message.request_id][1]
                if spec.attempt == message.attempt:
                    self.grants[message.grant.grant_id.epoch] = (spec, message.grant)
        self.bench.sent.clear()
        for message in self.bench.told:
            if isinstance(message, CancelKV) and message.open_id in self.opens and self.random.random() < 0.5:
                self._close(message.open_id, clean=True)
        self.bench.told.clear()

    def open(self) -> None:
        if self.grants:
            epoch = self.random.choice(list(self.grants))
            spec, grant = self.grants.pop(epoch)
            self.bench.open(spec, grant, open_id=epoch)
            self.opens[epoch] = (spec, grant)

    def arrive(self) -> None:
        if self.opens:
            open_id = self.random.choice(list(self.opens))
            spec, grant = self.opens.pop(open_id)
            first: tuple[ChoiceTokens, ...] = ()
            if not spec.is_resume:
                tokens = [(choice, self.random.choice((5, 6, EOS))) for choice in spec.choices]
                first = tuple(first_token(c, token, "stop" if token == EOS else None) for c, token in tokens)
            self.bench.arrive(spec, grant, first, open_id=open_id)

    def close(self) -> None:
        if self.opens:
            self._close(self.random.choice(list(self.opens)), clean=self.random.random() < 0.7)

    def _close(self, open_id: int, *, clean: bool) -> None:
        _, grant = self.opens[open_id]
        if clean:
            del self.opens[open_id]
        message = KVClosed(grant_id=grant.grant_id, open_id=open_id, source_rank=0, clean=clean)
        self.bench.receiver.on_message("p#1", message)

    def lose_connection(self) -> None:
        self.bench.receiver.on_session_lost("p#1")

    # --- the worker ---------------------------------------------------------------------------------------------

    def step(self) -> None:
        if self.batch is None:
            self.batch = self.role.schedule()
            if self.batch is not None:
                self.num_swapped += len(self.batch.swap_out)
        else:
            batch, self.batch = self.batch, None
            self.bench.complete(batch, token=self.random.choice((6, 7, 8, 7, 8, EOS)))

    def tick(self) -> None:
        self.bench.clock.advance(self.random.choice((0.05, 0.1, 1.0)))
        self.role.tick()

    def settle(self) -> None:
        """Everybody gives up; writers end cleanly; the running step ends."""
        self.num_aborts += len(self.specs)
        for name, (router, spec) in self.specs.items():
            self.role.on_router_message(router, Abort(request_id=name, attempt=spec.attempt))
        for open_id in list(self.opens):
            self._close(open_id, clean=True)
        if self.batch is not None:
            self.step()
        self.bench.check()
        assert self.role.schedule() is None
        self.role.tick()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_blocks_and_slots_are_back_after_aborts_at_random_moments(seed: int) -> None:
    play = _Play(seed)
    events: dict[Callable[[], None], int] = {
        play.ask: 10,
        play.abort: 9,
        play.abort_before_it_is_asked: 1,
        play.open: 8,
        play.arrive: 8,
        play.close: 1,
        play.lose_connection: 1,
        play.lose_router: 1,
        play.step: 60,
        play.tick: 4,
    }
    for _ in range(8000):
        [event] = play.random.choices(list(events), weights=list(events.values()))
        event()
        play.read_answers()
        play.bench.check()
    play.settle()
    assert play.num_aborts > 800
    assert play.role.is_quiet and play.role.num_unfinished == 0
    assert play.bench.pool.num_owned_blocks == play.bench.pool.num_quarantined_blocks == 0


def test_it_comes_to_rest_by_itself_when_nobody_says_anything_more() -> None:
    play = _Play(seed=11)
    for _ in range(300):
        play.random.choice([play.ask, play.open, play.arrive, play.step])()
        play.read_answers()
        play.bench.check()
    for _ in range(60):  # leases end, what runs ends
        play.bench.clock.advance(0.1)
        play.role.tick()
        for _ in range(20):
            play.step()
        for open_id in list(play.opens):
            play._close(open_id, clean=True)
    assert play.role.is_quiet and play.bench.pool.num_owned_blocks == 0


def test_an_abort_ends_a_sequence_in_host_memory() -> None:
    bench = Bench(5, num_swap_blocks=8)
    for number in range(2):
        spec = bench.spec(f"r{number}", 2 * BLOCK, arrival=number, cache_salt=bytes([number]))
        bench.send(LocalTask(spec=spec))
    while not bench.role.scheduler.blocks.swap.num_used:
        assert bench.step() is not None, "nobody was preempted"
    bench.send(Abort(request_id="r1", attempt=0))
    assert bench.role.scheduler.blocks.swap.num_used == 0
    bench.run()
    assert bench.role.is_quiet and set(bench.tokens("r0")) == {0}


def test_a_handoff_of_which_every_choice_has_ended_leaves_nothing() -> None:
    bench = Bench()
    spec = bench.spec("a", 6, n=2)
    bench.send(ReserveKV(spec=spec))
    for choice in range(2):
        bench.send(Abort(request_id="a", attempt=0, choices=(choice,)))
    grant = bench.last(Grant)
    assert isinstance(grant, Grant)
    bench.open(spec, grant.grant)
    bench.arrive(spec, grant.grant, (first_token(0, 5), first_token(1, 6)))
    bench.run()
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0


def test_an_abort_that_asks_is_answered_by_what_runs_here() -> None:
    bench = Bench()
    bench.hand_over(bench.spec("a", 6), (first_token(0, 5),))
    bench.step()
    bench.sent.clear()
    bench.send(Abort(request_id="a", attempt=0, unless_arrived=True))
    assert bench.sent == [HandoffDone(request_id="a", attempt=0)]
    bench.run()
    assert len(bench.tokens("a")[0]) == 2


def test_an_abort_that_asks_about_another_attempt_is_not_answered_by_what_runs_here() -> None:
    bench = Bench()
    bench.hand_over(msgspec.structs.replace(bench.spec("a", 6), attempt=1), (first_token(0, 5),))
    bench.step()
    bench.sent.clear()
    bench.send(Abort(request_id="a", attempt=0, unless_arrived=True))
    assert not any(isinstance(message, HandoffDone) for message in bench.sent)
    bench.run()
    assert len(bench.tokens("a")[0]) == 2
