"""One life of a router: the real dispatcher, its sessions, its ticks and the clients that read from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING

from kvferry.common.errors import CapacityError, RequestError
from kvferry.router.autoscaler.load_record import LoadRecord
from kvferry.router.autoscaler.scale_types import Counts
from kvferry.router.autoscaler.scaling import Scaling
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.placement import make_policy
from kvferry.router.state.classes import RequestClasses
from kvferry.router.state.objectives import DEFAULT_CLASS
from kvferry.router.state.observer import NullObserver
from kvferry.router.state.outcome import ServiceOutcome
from kvferry.router.state.predictor import Predictor
from kvferry.router.state.request import RouterRequest
from kvferry.wire.fields import Message
from kvferry.wire.results import NoCapacity, StepTokens, TaskRefused
from kvferry.wire.workers import WorkerHello, WorkerStatus

from .clients import Call
from .fetching import FetchingPolicy
from .invariants import RouterRules
from .kernel import Kernel, Process, ProcessClock
from .network import End
from .scaling import Launcher, ScaleOperations
from .sessions import WorkerSession

if TYPE_CHECKING:
    from kvferry.common.router_config import RouterConfig

TICK_S = 0.1
_BOOKS_EVERY = 8  # ticks


class Router(NullObserver):
    """What `router/dispatch/control.py` and the API do around a dispatcher."""

    def __init__(
        self,
        kernel: Kernel,
        place: str,
        router_id: str,
        config: RouterConfig,
        seen: Counter[str],
        *,
        fetch_share: float,
        launcher: Launcher | None,
    ) -> None:
        """`launcher`: None where the fleet stays as it is."""
        self.place = place
        self.router_id = router_id
        self.process = Process(kernel, router_id, place, self._after_event)
        self.clock = ProcessClock(kernel, kernel.random.uniform(1, 1000), 1 + kernel.random.uniform(-1e-3, 1e-3))
        predictor = Predictor()
        policy = FetchingPolicy(make_policy(config, predictor), fetch_share, kernel.random)
        self.dispatcher = Dispatcher(config, policy, self.clock, self, predictor=predictor)
        self._record = LoadRecord()
        self._operations = ScaleOperations(self)
        self._launcher = launcher
        self._scaling = Scaling(
            config.autoscale,
            RequestClasses.from_config(config).named(DEFAULT_CLASS),
            self._operations,
            predictor,
            self._record,
            self.clock,
            lambda: kernel.now,
            launcher=self._ask_launcher if launcher is not None else None,
        )
        self.calls: dict[str, Call] = {}
        self.rules = RouterRules(self, config)
        self._seen = seen
        self._kernel = kernel
        self._numbers = count(1)
        self._sessions: dict[str, WorkerSession] = {}
        self._num_ticks = 0
        self._dirty: list[Call] = []
        self.process.after(TICK_S, self._tick)

    def _after_event(self) -> None:
        while self._dirty:
            dirty, self._dirty = self._dirty, []
            for call in dirty:
                call.on_news()

    def _tick(self) -> None:
        self.dispatcher.tick()
        if self._launcher is not None:
            self._scaling.tick()
        self._num_ticks += 1
        if self._num_ticks % _BOOKS_EVERY == 0:
            self.rules.check_books()
        self.process.after(TICK_S, self._tick)

    # --- launcher -------------------------------------------------------------------------------------------

    def on_launcher(self, event: Mapping[str, object]) -> None:
        self._scaling.on_launcher(event)

    def note(self, what: str) -> None:
        """Count something that was reached."""
        self._seen[what] += 1

    def hold(self, counts: Counts, for_s: float) -> None:
        """Take an operator's edit."""
        self._scaling.hold(counts, for_s)

    def _ask_launcher(self, event: Mapping[str, object]) -> None:
        assert self._launcher is not None
        if event["event"] == "scale":
            self._operations.check_request(event)
        self._launcher.on_event(self, event)

    # --- clients --------------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """A client's request; refused at the door, it never was one."""
        self.calls[call.request.request_id] = call
        try:
            stream = self.dispatcher.submit(call.request)
        except (CapacityError, RequestError) as error:
            del self.calls[call.request.request_id]
            call.on_refused(error)
            return
        call.on_accepted(stream, self._note_news)

    def _note_news(self, call: Call) -> None:
        self._dirty.append(call)  # the list of now: each event's end puts another one in its place

    # --- workers --------------------------------------------------------------------------------------------

    def accept(self, end: End) -> None:
        end.on_message = lambda message: self._on_hello(end, message)

    def _on_hello(self, end: End, message: Message) -> None:
        assert isinstance(message, WorkerHello), message
        old = self._sessions.get(message.worker_id)
        if old is not None:
            self._end(old, "replaced by a newer session")
            old.end.close(lossy=True)
        session = WorkerSession(end, message.worker_id, next(self._numbers), self.rules.check_sent)
        self._sessions[message.worker_id] = session
        end.on_message = lambda message: self._on_message(session, message)
        end.on_closed = lambda: self._end(session, "connection ended")
        self.rules.note_role(session, message.role)
        self.dispatcher.worker_joined(session, message)

    def _on_message(self, session: WorkerSession, message: Message) -> None:
        with_stale = self.rules.stale_of(message)
        if isinstance(message, WorkerStatus):
            self.rules.note_role(session, message.role)
        elif isinstance(message, NoCapacity | TaskRefused) and message.reason == "wrong_role":
            self._seen["work of the other role refused"] += 1
        self.dispatcher.on_message(session, message)
        if with_stale is not None:
            with_stale.check()
        if isinstance(message, StepTokens):
            self.rules.check_bounds(message)

    def _end(self, session: WorkerSession, reason: str) -> None:
        if self._sessions.get(session.worker_id) is session:
            del self._sessions[session.worker_id]
        self.dispatcher.worker_left(session, reason)

    def drain_worker(self, worker_id: str, deadline_s: float) -> None:
        if self.dispatcher.drain_worker(worker_id, deadline_s):
            self.rules.note_drain(self._sessions[worker_id])

    # --- observer -------------------------------------------------------------------------------------------

    def on_submitted(self, request: RouterRequest) -> None:
        self._record.on_submitted(request)

    def on_outcome(self, outcome: ServiceOutcome) -> None:
        self._record.on_outcome(outcome)

    def on_finished(self, request: RouterRequest) -> None:
        self._record.on_finished(request)
        call = self.calls.get(request.request_id)
        if call is not None:
            call.on_terminal()

    def on_retry(self, stage: str, reason: str) -> None:
        self._seen[f"retry {stage} {reason}"] += 1

    def on_resumed(self, result: str) -> None:
        self._seen[f"resumed {result}"] += 1

    def on_fallback(self, kind: str) -> None:
        self._seen[f"fallback {kind}"] += 1

    def on_dropped(self, kind: str) -> None:
        self._seen[f"dropped {kind}"] += 1
        if kind == "mismatch":
            self.rules.on_mismatch()
