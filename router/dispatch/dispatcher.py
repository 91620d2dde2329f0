"""The dispatcher owns every request from `submit` to its one terminal state.

    submit ─> queue ─(policy)─> ReserveKV ─> Grant ─> PrefillTask ─> FirstToken, HandoffDone ─> StepTokens ... ─> done
                ^                                                                                      │
                └── attempt + 1: worker lost, handoff failed, refused, silent; goes on from accepted tokens

Everything happens in reaction to an arrival, a message or a tick, on one asyncio loop; nothing here waits. A worker
learns of an attempt's end by Abort, and what it still sends about it is dropped.

    admission  who may wait      in_flight        how attempts and requests end     attempt    an attempt's messages
    placer     who goes next     worker_messages  what workers say about requests   relay      tokens, once, in order
    policy     where to          worker_sessions  how workers come and go           deadlines  time limits
    isolation  who runs alone    losses           what a lost worker means          due_times  when they are checked
    background who makes way     retries          how much is tried again           due_checks what follows
    readers    what clients do   running_steps    who computed what, as far as can be known
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from ...common.clock import Clock
from ...common.errors import CapacityError, ProtocolError
from ...common.router_config import RouterConfig
from ...wire.fields import Message
from ...wire.results import (
    Embedding,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    PromptLogprobs,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from ...wire.workers import (
    CacheChange,
    Drain,
    Goodbye,
    SetRole,
    TransferReport,
    WorkerHello,
    WorkerStatus,
)
from ..placement.policy import RoutingPolicy
from ..queue.admission import Admission
from ..state.classes import RequestClasses
from ..state.errors import StreamError
from ..state.failures import WorkerLife
from ..state.history import Kind, Record, is_named
from ..state.objectives import NO_OBJECTIVES
from ..state.observer import NullObserver, Observer
from ..state.pools import Pools
from ..state.predictor import Predictor
from ..state.request import RouterRequest
from ..state.token_stream import TokenStream
from ..state.tracked_request import TrackedRequest
from ..state.views import PoolView
from ..state.worker import WorkerLink
from .background import Background
from .deadlines import Deadlines
from .due_checks import DueChecks
from .in_flight import InFlightRequests
from .invariants import breaches
from .isolation import Isolation
from .losses import Losses
from .placer import Placer
from .prefix_fetch import hash_prompt
from .readers import Readers
from .retries import RetryBudget
from .worker_messages import WorkerMessages
from .worker_sessions import WorkerSessions


class Dispatcher:
    """`Dispatcher` belongs to one asyncio loop. `tick` is called about ten times a second."""

    def __init__(
        self,
        config: RouterConfig,
        policy: RoutingPolicy,
        clock: Clock,
        observer: Observer | None = None,
        *,
        rng: random.Random | None = None,
        time_us: Callable[[], int] | None = None,
        predictor: Predictor | None = None,
        on_blameless: Callable[[WorkerLife], None] = lambda life: None,
    ) -> None:
        """`rng`: for the pauses before retries; seeded with the config's seed if there is none.

        `on_blameless`: a worker was lost with a request that others had been lost with.

        `predictor`: the one that the policy asks.

        `time_us`: the time that several routers share, so that workers serve their requests in the order of arrival.
        """
        self._config = config
        self._policy = policy
        self._clock = clock
        self._observer: Observer = observer if observer is not None else NullObserver()
        is_local = config.local_prefill or not config.expect_prefill
        self._pools = Pools(predictor)
        budget = RetryBudget(rng if rng is not None else random.Random(config.seed))
        self._in_flight = InFlightRequests(
            clock,
            self._observer,
            budget,
            max_queue=config.max_queue,
            max_attempts=config.max_attempts,
            by_arrival=not policy.predicts,
            on_blameless=on_blameless,
        )
        self._admission = Admission(self._in_flight.queue, self._observer)
        self._isolation = Isolation(self._pools, may_prefill_locally=is_local)
        self._placer = Placer(
            config, policy, self._pools, self._in_flight, self._admission, self._isolation, self._observer
        )
        self._worker_messages = WorkerMessages(
            self._pools, self._in_flight, self._placer, self._admission, self._observer, may_prefill_locally=is_local
        )
        self._sessions = WorkerSessions(
            self._pools, self._in_flight, self._placer, self._admission, Losses(self._in_flight)
        )
        self._background = Background(self._in_flight, config.batch_requests_beside)
        self._due_checks = DueChecks(
            self._in_flight,
            self._placer,
            self._admission,
            self._worker_messages.relay,
            Deadlines(self._pools, expects_prefill=config.expect_prefill, may_prefill_locally=is_local),
        )
        self._readers = Readers(self._in_flight, place=self._place)
        self._time_us = time_us
        self._last_arrival = 0
        self._is_draining = False
        self._classes = RequestClasses.from_config(config)

    # --- for the API ------------------------------------------------------------------------------------------

    def submit(self, request: RouterRequest) -> TokenStream:
        """Take a request. Raises CapacityError (no room, too late, draining) or RequestError (it can never fit)."""
        if self._is_draining:
            self._observer.on_rejected("draining")
            raise CapacityError("the router is draining")
        now = self._clock.now()
        self._placer.check_fits(request)
        self._observer.on_submitted(request)
        hash_prompt(self._pools, request)
        if request.objectives is NO_OBJECTIVES:  # nobody has said what it is to get
            request.objectives = self._classes.named(request.request_class)
        request.unloaded_s = self._pools.predictor.unloaded_s(request.num_prompt_tokens)
        victim = self._admission.check(request, now)
        if victim is not None:
            self._in_flight.fail(victim, self._admission.displaced(now))
        self._last_arrival = max(self._last_arrival + 1, self._time_us() if self._time_us is not None else 0)
        request.arrival = self._last_arrival
        request.timestamps["queued"] = now
        stream = self._readers.open(request)
        deadline = None if request.timeout_s is None else now + request.timeout_s
        tracked = TrackedRequest(request, stream, deadline, event_s=now)
        self._worker_messages.relay.hold(tracked)
        self._admission.on_admitted(tracked, now)
        self._in_flight.add(tracked)
        self._background.on_added(tracked, now)
        self._placer.run(now)
        return stream

    def longest_answer(self, num_prompt_tokens: int, num_choices: int, limit: int) -> int:
        return self._pools.longest_answer(num_prompt_tokens, num_choices, limit)

    def ready(self) -> list[str]:
        """Return why this router cannot serve as configured; empty: it can."""
        reasons = []
        if not self._pools.has_ready("decode"):
            reasons.append("no decode worker is ready")
        if self._config.expect_prefill and not self._pools.has_ready("prefill"):
            reasons.append("no prefill worker is ready")
        if self._is_draining:
            reasons.append("the router is draining")
        return reasons

    def view(self) -> PoolView:
        now = self._clock.now()
        view = self._pools.view(now, num_queued=len(self._in_flight.queue), num_in_flight=len(self._in_flight))
        view.queued_by_class = dict(self._in_flight.queue.num_by_class)
        return view

    def _place(self) -> None:
        self._placer.run(self._clock.now())

    # --- for operators ----------------------------------------------------------------------------------------

    def requests(self, kind: Kind, request_class: str | None, limit: int) -> list[dict[str, object]]:
        """Return the summaries of requests that have ended lately; `limit` of them at most."""
        now = self._clock.now()
        records = self._in_flight.history.list(kind, request_class, limit, now_s=now)
        return [record.summary(now) for record in records]

    def request(self, request_id: str) -> dict[str, object] | None:
        """Return all that is known of a request that lives or has ended lately."""
        alive = (tracked.request for tracked in self._in_flight if is_named(tracked.request.request_id, request_id))
        record = next(map(Record.from_request, alive), None) or self._in_flight.history.find(request_id)
        return None if record is None else record.details(self._clock.now())

    def breaches(self) -> list[str]:
        """Return what must hold between any two events and does not: for simulations and tests."""
        return breaches(self._in_flight, self._pools, self._isolation)

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what runs; what is left at the end fails."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._in_flight.wait_idle()
        except TimeoutError:
            for tracked in self._in_flight:
                self._in_flight.fail(tracked, StreamError("the router stops", "router_stopping", 503))

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool:
        """No new work for this worker; it exits when what it has is done, or after `deadline_s`."""
        worker = self._pools.named(worker_id)
        if worker is not None:
            self._worker_messages.note_drain(worker)
            worker.link.send(Drain(deadline_s=deadline_s))
        return worker is not None

    def set_role(self, worker_id: str, role: str) -> bool:
        """Make `role` the worker's active role. False: it is not here, or it has one role for good."""
        worker = self._pools.named(worker_id)
        if worker is None or not worker.hello.can_change_role:
            return False
        worker.link.send(SetRole(role=role))
        return True

    # --- workers come and go ------------------------------------------------------------------------------------

    def worker_joined(self, link: WorkerLink, hello: WorkerHello) -> None:
        self._sessions.begin(link, hello, self._clock.now())

    def worker_left(self, link: WorkerLink, reason: str) -> None:
        """The session has ended. Idempotent."""
        self._sessions.end(link, reason, self._clock.now())

    def on_message(self, link: WorkerLink, message: Message) -> None:
        """A worker's message. Raises ProtocolError for one that no worker sends."""
        worker = self._pools.find(link)
        if worker is None:
            self._observer.on_dropped("old_session")
            return
        now = self._clock.now()
        match message:
            case StepTokens():
                self._worker_messages.on_steps(worker, message, now)
            case WorkerStatus():
                has_gained = self._pools.on_status(worker, message, now)
                self._pools.predictor.on_status(link.number, message)
                if message.state == "draining":
                    self._worker_messages.note_drain(worker)
                self._in_flight.is_due = self._in_flight.is_due or has_gained
            case Goodbye():
                worker.has_said_goodbye = True
                return
            case CacheChange():
                self._pools.prefix_index.on_change(link.number, message)
                return
            case TransferReport():
                self._observer.on_transfer(message)
                self._pools.on_transfer(worker, message)
            case Grant() | NoCapacity() | TaskRefused() | HandoffDone() | HandoffFailed():
                self._worker_messages.on_request_message(worker, message, now)
            case FirstToken() | Embedding() | PromptLogprobs() | WorkerFailure():
                self._worker_messages.on_request_message(worker, message, now)
            case _:
                raise ProtocolError(f"{type(message).__name__} from {worker.worker_id} in the middle of its session")
        self._placer.run(now)

    def tick(self) -> None:
        """Time has passed: hung workers, deadlines, answers that do not come."""
        now = self._clock.now()
        for worker in self._pools:
            reason = worker.hang(now)
            if reason is not None:
                self._sessions.drop_hung(worker, reason, now)
        self._admission.observe(now)
        self._due_checks.run(now)
        self._background.tick(now)
        self._in_flight.is_due = True
        self._placer.run(now)

    def stood_still(self) -> None:
        """Give whoever is judged by a clock his time anew: this process has not run for a while, nor perhaps others."""
        self._due_checks.forgive(self._clock.now())
