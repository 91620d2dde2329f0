"""Random orders of messages, losses, restarts and aborts: what must hold in every one of them.

The workers here answer as correct ones do, each over its own FIFO channel, which may end at any moment. Which
channel moves next, what is lost, who hangs and comes back, who drains, which request kills its worker and when
clients leave is Hypothesis's choice.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.request import RequestSpec
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.results import (
    ChoiceTokens,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    RequestTokens,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from kvferry.wire.tasks import Abort, LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import LiveRequests

from .fleet import SPEC, Fleet, Link, config, received, token

MAX_TOKENS = 5
Key = tuple[str, int]  # request, attempt


@dataclass
class Running:
    """A request on a decode worker; its next token of each choice."""

    spec: RequestSpec
    next_index: dict[int, int]
    told_arrival: bool = True


@dataclass
class Worker:
    """A correct worker's answers, and what it holds."""

    link: Link
    role: str
    outbox: deque[Message] = field(default_factory=deque)
    reserved: dict[Key, RequestSpec] = field(default_factory=dict)
    running: dict[Key, Running] = field(default_factory=dict)
    tasks: dict[Key, PrefillTask] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.link.worker_id

    def read(self, message: Message, refuse: bool) -> None:
        match message:
            case ReserveKV(spec=spec) if refuse:
                self.outbox.append(NoCapacity(request_id=spec.request_id, attempt=spec.attempt, reason="blocks"))
            case ReserveKV(spec=spec):
                self.forget(spec.request_id, spec.attempt)
                self.reserved[spec.request_id, spec.attempt] = spec
                self.outbox.append(Grant(request_id=spec.request_id, attempt=spec.attempt, grant=self.grant(spec)))
            case LocalTask(spec=spec) | PrefillTask(spec=spec) if refuse:
                self.outbox.append(TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason="blocks"))
            case LocalTask(spec=spec):
                self.forget(spec.request_id, spec.attempt)
                self.run(spec)
            case PrefillTask(spec=spec):
                self.tasks[spec.request_id, spec.attempt] = message
            case Abort():
                self.abort(message)
            case LiveRequests(attempts=live):
                for held in (self.reserved, self.running, self.tasks):
                    for key in [key for key in held if key not in live]:
                        del held[key]
            case _:
                pass

    def grant(self, spec: RequestSpec) -> GrantInfo:
        return GrantInfo(
            grant_id=GrantId(self.link.worker_id, 1, 1),
            spec=SPEC,
            kv_address="",
            block_ids=(),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=0,
            ranks=(),
            open_within_s=2.0,
            mac=b"",
        )

    def run(self, spec: RequestSpec) -> None:
        first = {choice: len(spec.output_token_ids(i)) for i, choice in enumerate(spec.choices)}
        self.running[spec.request_id, spec.attempt] = Running(spec, first)

    def forget(self, request_id: str, attempt: int) -> None:
        for held in (self.reserved, self.running, self.tasks):
            for key in [key for key in held if key[0] == request_id and key[1] <= attempt]:
                del held[key]

    def abort(self, message: Abort) -> None:
        key = (message.request_id, message.attempt)
        if message.choices:
            if key in self.running:
                for choice in message.choices:
                    self.running[key].next_index.pop(choice, None)
        elif not (message.unless_arrived and key in self.running):
            had = key in self.reserved
            self.forget(*key)
            if self.role == "decode" and (had or message.unless_arrived):
                self.outbox.append(
                    HandoffFailed(request_id=key[0], attempt=key[1], reason="aborted", blame="abort", worker_id="")
                )

    def step(self) -> None:
        """One token for every running choice."""
        updates = []
        for key, running in list(self.running.items()):
            choices = tuple(self._next(running, choice) for choice in list(running.next_index))
            updates.append(RequestTokens(*key, choices))
            if not running.next_index:
                del self.running[key]
        if updates:
            self.outbox.append(StepTokens(updates=tuple(updates)))

    def _next(self, running: Running, choice: int) -> ChoiceTokens:
        index = running.next_index[choice]
        running.next_index[choice] = index + 1
        if index + 1 == length(running.spec.request_id, choice):
            del running.next_index[choice]
            return ChoiceTokens(choice, index, (token(choice, index),), "stop")
        return ChoiceTokens(choice, index, (token(choice, index),))


def length(request_id: str, choice: int) -> int:
    """How many tokens every worker gives this choice."""
    return 1 + (int(request_id[2:]) * 2 + choice * 3) % MAX_TOKENS


class World:
    """A fleet with live workers, clients that read, and what they have seen."""

    def __init__(self, data: st.DataObject, *, local_prefill: bool) -> None:
        self.data = data
        self.lives = count(1)
        self.poison: set[str] = set()  # requests that end every worker that decodes them
        self.fleet = Fleet(config(local_prefill=local_prefill, max_attempts=50))
        self.workers: dict[str, Worker] = {}
        self.streams: list[TokenStream] = []
        self.seen: dict[tuple[str, int], list[int]] = {}
        self.finishes: Counter[tuple[str, int]] = Counter()
        self.stopped: set[str] = set()  # requests with a choice that a stop string ended
        for worker_id in ("p-0", "p-1", "d-0", "d-1"):
            self.join(worker_id)

    def join(self, worker_id: str) -> None:
        """A new process."""
        role = "prefill" if worker_id.startswith("p") else "decode"
        self.workers[worker_id] = Worker(self.fleet.join(worker_id, incarnation=next(self.lives)), role)

    def pick(self, able: Callable[[Worker], object] = lambda worker: True) -> Worker | None:
        """One of the workers that can do it, if there are any."""
        workers = [worker for worker in self.workers.values() if able(worker)]
        return self.data.draw(st.sampled_from(workers)) if workers else None

    # --- what may happen ------------------------------------------------------------------------------------

    def submit(self) -> None:
        stream = self.fleet.submit(n=self.data.draw(st.integers(1, 2)), max_tokens=MAX_TOKENS)
        self.streams.append(stream)
        if self.data.draw(st.integers(0, 7)) == 7:
            self.poison.add(stream.request.request_id)

    def deliver_to_worker(self) -> None:
        worker = self.pick(lambda worker: worker.link.sent)
        if worker is not None:
            worker.read(worker.link.sent.pop(0), refuse=self.data.draw(st.integers(0, 5)) == 5)

    def deliver_to_router(self) -> None:
        worker = self.pick(lambda worker: worker.outbox)
        if worker is not None:
            self.fleet.dispatcher.on_message(worker.link, worker.outbox.popleft())

    def repeat_a_message(self) -> None:
        worker = self.pick(lambda worker: worker.outbox)
        if worker is not None:
            self.fleet.dispatcher.on_message(worker.link, worker.outbox[0])

    def prefill(self) -> None:
        worker = self.pick(lambda worker: worker.tasks)
        if worker is not None:
            self.complete(worker, self.data.draw(st.sampled_from(sorted(worker.tasks))), self.data.draw(st.booleans()))

    def complete(self, worker: Worker, key: Key, succeeds: bool) -> None:
        """The prompt is computed, and its KV arrives or not."""
        task = worker.tasks.pop(key)
        spec = task.spec
        if task.sample:
            worker.outbox.append(
                FirstToken(
                    request_id=key[0],
                    attempt=key[1],
                    choices=tuple(
                        ChoiceTokens(c, 0, (token(c, 0),), "stop" if length(key[0], c) == 1 else None)
                        for c in spec.choices
                    ),
                    num_cached_tokens=0,
                    prefill_s=0.0,
                    queue_s=0.0,
                )
            )
        decode = next((w for w in self.workers.values() if w.link.worker_id == task.grant.grant_id.worker_id), None)
        if decode is None or decode.reserved.pop(key, None) is None:
            return
        if succeeds:
            decode.outbox.append(HandoffDone(request_id=key[0], attempt=key[1]))
            decode.run(spec)
        else:
            decode.outbox.append(HandoffFailed(request_id=key[0], attempt=key[1], reason="cut", blame="link"))

    def decode_step(self) -> None:
        worker = self.pick(lambda worker: worker.running)
        if worker is not None:
            self.step(worker)

    def step(self, worker: Worker) -> None:
        if any(request_id in self.poison for request_id, _ in worker.running):
            self.end(worker, comes_back=True)
        else:
            worker.step()

    def kill(self) -> None:
        """With everything that it holds and that is on its channels."""
        worker = self.pick()
        assert worker is not None
        self.end(worker, comes_back=self.data.draw(st.booleans()))

    def drain(self) -> None:
        """It says that it leaves, and leaves."""
        worker = self.pick()
        assert worker is not None
        self.fleet.beat(worker.link, state="draining")
        if self.data.draw(st.booleans()):
            self.end(worker, comes_back=True)

    def hang_and_return(self) -> None:
        """Given up and back: what it still had to say comes over the new session."""
        worker = self.pick()
        assert worker is not None
        self.fleet.dispatcher.worker_left(worker.link, "hung")
        incarnation = next(
            life for name, life in self.fleet.dispatcher._sessions._incarnations.items() if name == worker.name
        )
        worker.link = self.fleet.join(worker.name, incarnation=incarnation)

    def worker_fails_one(self) -> None:
        worker = self.pick(lambda worker: worker.running)
        if worker is not None:
            key = self.data.draw(st.sampled_from(sorted(worker.running)))
            worker.forget(*key)
            worker.outbox.append(WorkerFailure(request_id=key[0], attempt=key[1], reason="out of memory"))

    def end(self, worker: Worker, *, comes_back: bool) -> None:
        self.fleet.clock.advance(0.01)
        self.fleet.dispatcher.worker_left(worker.link, "killed")
        if comes_back:
            self.join(worker.link.worker_id)
        else:
            del self.workers[worker.link.worker_id]
            if not any(w.role == worker.role for w in self.workers.values()):
                self.join(worker.link.worker_id)

    def client_leaves(self) -> None:
        if self.streams:
            self.data.draw(st.sampled_from(self.streams)).abort()

    def stop_string(self) -> None:
        if self.streams:
            stream = self.data.draw(st.sampled_from(self.streams))
            stream.finish_choice(self.data.draw(st.integers(0, stream.request.n - 1)))
            self.stopped.add(stream.request.request_id)

    def time_passes(self) -> None:
        self.fleet.clock.advance(self.data.draw(st.sampled_from([0.1, 0.6, 1.5])))
        self.beat()
        self.fleet.dispatcher.tick()

    def beat(self) -> None:
        for worker in self.workers.values():
            self.fleet.beat(
                worker.link,
                num_running=len(worker.running) + len(worker.tasks),
                num_granted_blocks=len(worker.reserved),
                steps=int(self.fleet.clock.now() * 10),
            )

    # --- what must hold -------------------------------------------------------------------------------------

    def check(self) -> None:
        assert not self.fleet.dispatcher.breaches()
        self.read_streams()

    def read_streams(self) -> None:
        for stream in self.streams:
            for update in received(stream):
                key = (stream.request.request_id, update.choice)
                assert not self.finishes[key], "something came after the finish reason"
                ids = self.seen.setdefault(key, [])
                ids.extend(t.token_id for t in update.tokens)
                assert ids == [token(update.choice, index).token_id for index in range(len(ids))]
                self.finishes[key] += update.finish is not None

    def settle(self) -> None:
        """No more faults but poison: everything must come to an end."""
        for worker_id in ("p-0", "d-0"):
            if worker_id not in self.workers:
                self.join(worker_id)
        for _ in range(400):
            for worker in list(self.workers.values()):
                while worker.link.sent:
                    worker.read(worker.link.sent.pop(0), refuse=False)
                for key in list(worker.tasks):
                    self.complete(worker, key, succeeds=True)
                self.step(worker)
                while worker.outbox:
                    self.fleet.dispatcher.on_message(worker.link, worker.outbox.popleft())
            self.check()
            if all(stream.request.is_finished for stream in self.streams):
                return
            self.fleet.clock.advance(0.1)
            self.beat()
            self.fleet.dispatcher.tick()
        raise AssertionError([(s.request.request_id, s.request.status) for s in self.streams])

    def check_ends(self) -> None:
        assert Counter(r.request_id for r in self.fleet.observer.finished) == Counter(
            s.request.request_id for s in self.streams
        ), "each request ends once"
        for stream in self.streams:
            request = stream.request
            if request.status is RequestStatus.FINISHED:
                if request.request_id in self.poison - self.stopped:
                    assert all(len(state.tokens) <= 1 for state in request.choices), "it kills whoever decodes it"
                for choice, state in enumerate(request.choices):
                    assert state.finish == "stop"
                    whole = len(state.tokens) == length(request.request_id, choice)
                    assert whole or not self.finishes[request.request_id, choice], "cut short without a stop string"
            else:
                assert request.status in (RequestStatus.ABORTED, RequestStatus.FAILED)
        view = self.fleet.dispatcher.view()
        assert (view.num_in_flight, view.num_queued) == (0, 0)
        assert all(worker.num_bound == 0 for worker in view.workers), "a load is still bound"


# Progress is likelier than trouble.
ACTIONS = (
    [World.submit] * 2
    + [World.deliver_to_worker] * 8
    + [World.deliver_to_router] * 8
    + [World.prefill] * 4
    + [World.decode_step] * 4
    + [World.repeat_a_message, World.kill, World.client_leaves, World.stop_string]
    + [World.drain, World.hang_and_return, World.worker_fails_one]
    + [World.time_passes] * 2
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(data=st.data(), local_prefill=st.booleans())
def test_every_request_ends_once_with_its_tokens_in_order(data: st.DataObject, local_prefill: bool) -> None:
    world = World(data, local_prefill=local_prefill)
    world.submit()
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), min_size=20, max_size=90)):
        action(world)
        world.check()
    world.settle()
    world.check_ends()
    # A worker that holds nothing for the router but what a lost channel made it forget to drop.
    for worker in world.workers.values():
        while worker.link.sent:
            worker.read(worker.link.sent.pop(0), refuse=False)
        assert not worker.reserved and not worker.running and not worker.tasks
