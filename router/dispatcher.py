"""The dispatcher owns every request from `submit` to its one terminal state.

    submit ─> queue ─(policy)─> ReserveKV ─> Grant ─> PrefillTask ─> FirstToken, HandoffDone ─> StepTokens ... ─> done
                ^                                                                                      │
                └── attempt + 1: worker lost, handoff failed, refused, silent; goes on from accepted tokens

Everything happens in reaction to an arrival, a message or a tick, on one asyncio loop; nothing here waits. A worker
learns of an attempt's end by Abort, and what it still sends about it is dropped. Tokens are taken in `relay.py`, an
attempt's messages are in `live.py`, workers are chosen in `policy.py`, time limits checked in `watch.py`.
"""

from __future__ import annotations

import asyncio

import structlog

from ..common.clock import Clock
from ..common.config import RouterConfig
from ..common.errors import CapacityError, ProtocolError
from ..common.messages import (
    Abort,
    ChoiceTokens,
    Drain,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    LiveRequests,
    Message,
    NoCapacity,
    PromptLogprobs,
    RequestTokens,
    StepTokens,
    TaskRefused,
    TransferReport,
    WorkerFailure,
    WorkerHello,
    WorkerStatus,
)
from ..common.request import FinishReason
from .ledger import Ledger
from .live import Blame, Live, RequestMessage
from .observer import NullObserver, Observer
from .placer import Placer
from .policy import RoutingPolicy
from .pools import Pools, PoolView, Worker, WorkerLink
from .relay import Relay
from .request import RequestStatus, RouterRequest, StreamError, TokenStream
from .watch import Verdict, Watch

__all__ = ["Dispatcher", "NullObserver", "Observer"]

log = structlog.get_logger(__name__)


class Dispatcher:
    """Not thread-safe: one asyncio loop. `tick` is called about ten times a second."""

    def __init__(
        self, config: RouterConfig, policy: RoutingPolicy, clock: Clock, observer: Observer | None = None
    ) -> None:
        self._config = config
        self._clock = clock
        self._observer: Observer = observer if observer is not None else NullObserver()
        self._relay = Relay(self._observer)
        self._pools = Pools()
        self._ledger = Ledger(clock, self._observer, max_queue=config.max_queue, max_attempts=config.max_attempts)
        self._placer = Placer(config, policy, self._pools, self._ledger, self._observer)
        self._may_prefill_locally = config.local_prefill or not config.expect_prefill
        self._watch = Watch(self._pools, must_prefill_remotely=not self._may_prefill_locally)
        self._incarnations: dict[str, int] = {}  # the last one seen of each worker
        self._num_arrivals = 0
        self._is_draining = False

    # --- for the API ------------------------------------------------------------------------------------------

    def submit(self, request: RouterRequest) -> TokenStream:
        """Take a request. Raises CapacityError (queue full, draining) or RequestError (it can never fit)."""
        if self._is_draining:
            raise CapacityError("the router is draining")
        self._ledger.queue.check_room()
        self._placer.check_fits(request)
        now = self._clock.now()
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        request.timestamps["queued"] = now
        stream = TokenStream(request, lambda: self._on_client_left(live), lambda c: self._on_choice_ended(live, c))
        deadline = None if request.timeout_s is None else now + request.timeout_s
        live = Live(request, stream, deadline, event_s=now)
        self._relay.hold(live)
        self._ledger.add(live)
        self._placer.run(now)
        return stream

    def ready(self) -> list[str]:
        """Why this router cannot serve as configured; empty: it can."""
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
        return self._pools.view(now, num_queued=len(self._ledger.queue), num_live=len(self._ledger))

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new and wait for what runs; what is left at the end fails."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._ledger.wait_idle()
        except TimeoutError:
            for live in self._ledger:
                self._ledger.fail(live, StreamError("the router stops", "router_stopping", 503))

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool:
        """No new work for this worker; it exits when what it has is done, or after `deadline_s`."""
        worker = self._pools.named(worker_id)
        if worker is not None:
            worker.is_draining = True
            worker.link.send(Drain(deadline_s=deadline_s))
        return worker is not None

    # --- workers come and go ------------------------------------------------------------------------------------

    def worker_joined(self, link: WorkerLink, hello: WorkerHello) -> None:
        """A new session. One of the same worker that is still open is over."""
        old = self._pools.named(hello.worker_id)
        if old is not None:
            self.worker_left(old.link, "replaced by a newer session")
            old.link.drop("replaced by a newer session")
        if self._incarnations.get(hello.worker_id) == hello.incarnation:
            # When its last session broke, all that it had was placed anew or left to the decode worker.
            link.send(LiveRequests(live=()))
        self._incarnations[hello.worker_id] = hello.incarnation
        self._pools.join(link, hello, self._clock.now())

    def worker_left(self, link: WorkerLink, reason: str) -> None:
        """The session has ended. Idempotent."""
        worker = self._pools.leave(link)
        if worker is None:
            return
        now = self._clock.now()
        what = f"{worker.hello.role} worker {worker.worker_id} lost: {reason}"
        log.warning("worker_lost", worker_id=worker.worker_id, role=worker.hello.role, reason=reason)
        for live in self._ledger:
            if live.decode is worker:
                self._ledger.retry(live, Blame("worker_lost", what))
            elif live.prefill is worker and live.is_prefilling_remotely:
                live.lost_prefill = what
                live.ask_if_arrived(now)  # the decode worker alone knows whether this matters
        self._placer.run(now)

    def on_message(self, link: WorkerLink, message: Message) -> None:
        """A worker's message. Raises ProtocolError for one that no worker sends."""
        worker = self._pools.find(link)
        if worker is None:
            self._observer.on_dropped("old_session")
            return
        now = self._clock.now()
        match message:
            case StepTokens():
                for update in message.updates:
                    self._on_step(worker, update, now)
            case WorkerStatus():
                worker.on_status(message, now)
                self._ledger.is_due = True
            case TransferReport():
                self._observer.on_transfer(message)
            case Grant() | NoCapacity() | TaskRefused() | HandoffDone() | HandoffFailed():
                self._on_request_message(worker, message, now)
            case FirstToken() | PromptLogprobs() | WorkerFailure():
                self._on_request_message(worker, message, now)
            case _:
                raise ProtocolError(f"{type(message).__name__} from {worker.worker_id} in the middle of its session")
        self._placer.run(now)

    def tick(self) -> None:
        """Time has passed: hung workers, deadlines, answers that do not come."""
        now = self._clock.now()
        for worker in self._pools:
            reason = worker.hang(now)
            if reason is not None:
                self.worker_left(worker.link, reason)
                worker.link.drop(reason)
        self._watch.look_at_pools(now)
        for live in self._ledger:
            self._relay.check_held(live, now)
            match self._watch.judge(live, now):
                case StreamError() as error:
                    self._ledger.fail(live, error)
                case Blame() as blame:
                    self._ledger.retry(live, blame)
                case Verdict.ASK:
                    live.ask_if_arrived(now)
        self._ledger.is_due = True
        self._placer.run(now)

    # --- one request's messages ---------------------------------------------------------------------------------

    def _current(self, worker: Worker, request_id: str, attempt: int) -> Live | None:
        """The request, if this message is about its current attempt and from a worker that has to do with it."""
        live = self._ledger.get(request_id)
        if live is None:
            self._observer.on_dropped("unknown_request")
        elif live.request.attempt != attempt:
            self._observer.on_dropped("stale_attempt")
        elif worker is not live.prefill and worker is not live.decode:
            self._observer.on_dropped("wrong_worker")
        else:
            return live
        return None

    def _on_request_message(self, worker: Worker, message: RequestMessage, now: float) -> None:
        if isinstance(message, HandoffDone | HandoffFailed) and message.request_id not in self._ledger:
            return  # the answer to our last Abort
        live = self._current(worker, message.request_id, message.attempt)
        if live is None:
            if isinstance(message, Grant):  # nobody will use it: it need not wait until it lapses
                worker.link.send(Abort(request_id=message.request_id, attempt=message.attempt))
            return
        if not live.expects(worker, message):
            self._observer.on_dropped("out_of_turn")
            return
        live.event_s = now
        match message:
            case Grant():
                self._on_grant(live, message, now)
            case NoCapacity():
                self._on_no_capacity(live, worker, message, now)
            case TaskRefused():
                self._on_task_refused(live, worker, message, now)
            case HandoffDone():
                self._on_arrived(live, now)
            case HandoffFailed():
                self._on_handoff_failed(live, message, now)
            case FirstToken():
                self._on_first_token(live, message, now)
            case PromptLogprobs():
                self._relay.accept_prompt_logprobs(live, message)
            case WorkerFailure():
                text = f"worker {worker.worker_id} failed: {message.reason}"
                self._ledger.retry(live, Blame("worker_failure", text))

    def _on_grant(self, live: Live, message: Grant, now: float) -> None:
        live.grant, live.grant_s, live.answer_due_s = message.grant, now, None
        assert live.prefill is not None
        if self._pools.find(live.prefill.link) is live.prefill:
            live.send_task(now)
        else:
            self._send_elsewhere(live, f"prefill worker {live.prefill.worker_id} lost before its task", now)

    def _send_elsewhere(self, live: Live, why: str, now: float) -> None:
        """The grant is unopened: another prefill worker may use it while it lasts."""
        other = self._placer.prefill_for_grant(live, now)
        if other is not None:
            live.send_task(now, other)
        else:
            self._ledger.retry(live, Blame("refused", why, is_counted=False))

    def _on_no_capacity(self, live: Live, worker: Worker, message: NoCapacity, now: float) -> None:
        if message.reason == "held":
            live.run_locally(worker, now)
            return
        if message.reason in ("stale", "incarnation"):
            text = f"decode worker {worker.worker_id} refused a reservation: {message.reason}"
            self._ledger.retry(live, Blame("refused", text))
            return
        if message.reason == "never_fits":
            (live.ungranted if self._may_prefill_locally else live.unfit).add(worker.link.number)
        elif message.reason == "draining":
            worker.is_draining = True
        else:
            live.note_refusal(worker, message.retry_after_s, now)
        live.leave(tell=False)  # nothing was reserved: the same attempt goes on
        live.request.advance(RequestStatus.QUEUED, now)
        self._ledger.enqueue(live)

    def _on_task_refused(self, live: Live, worker: Worker, message: TaskRefused, now: float) -> None:
        text = (
            f"{worker.hello.role} worker {worker.worker_id} refused a task: {message.reason} {message.detail}".rstrip()
        )
        match message.reason:
            case "draining":
                worker.is_draining = True
            case "never_fits" | "wrong_role":
                live.unfit.add(worker.link.number)
            case "blocks":
                live.note_refusal(worker, 0.0, now)
            case _:
                live.note_failed_pair(text)
                self._ledger.retry(live, Blame("refused", text))
                return
        if live.grant is not None:
            live.return_credit()
            self._send_elsewhere(live, text, now)
        else:
            self._ledger.retry(live, Blame("refused", text, is_counted=False))

    def _on_arrived(self, live: Live, now: float) -> None:
        assert live.decode is not None
        if live.prefill is not None:
            self._pools.on_handoff(live.prefill, live.decode, now, failed=False)
        live.arrive(now)
        self._ledger.is_due = True

    def _on_handoff_failed(self, live: Live, message: HandoffFailed, now: float) -> None:
        assert live.prefill is not None and live.decode is not None
        text = f"handoff {live.pair} failed: {message.reason} (blame: {message.blame} {message.worker_id})"
        if live.lost_prefill:
            self._ledger.retry(live, Blame("worker_lost", live.lost_prefill))
            return
        if message.worker_id or message.blame != "expired":
            self._pools.on_handoff(live.prefill, live.decode, now, failed=True)
            live.note_failed_pair(text)
        # else nobody opened the grant in time: the prefill worker was late, which says nothing of the pair
        self._ledger.retry(live, Blame("handoff_failed", text))

    # --- tokens -------------------------------------------------------------------------------------------------

    def _on_first_token(self, live: Live, message: FirstToken, now: float) -> None:
        request = live.request
        live.return_credit()
        live.prompt_computed = True
        self._ledger.is_due = True
        if not request.is_resume:
            request.num_cached_tokens = max(request.num_cached_tokens, message.num_cached_tokens)
            request.prefill_s = message.prefill_s
        self._take(live, message.choices, now)

    def _on_step(self, worker: Worker, update: RequestTokens, now: float) -> None:
        if update.request_id not in self._ledger:
            # It goes on with something that has ended here: an Abort crossed, or was for single choices.
            worker.link.send(Abort(request_id=update.request_id, attempt=update.attempt))
        live = self._current(worker, update.request_id, update.attempt)
        if live is None:
            return
        if worker is not live.decode or live.request.status is RequestStatus.RESERVED:
            self._observer.on_dropped("out_of_turn")
            return
        live.event_s = now
        if live.request.status is RequestStatus.PREFILLING:
            self._on_arrived(live, now)
        request = live.request
        if live.prefill is None and not request.is_resume:
            request.num_cached_tokens = update.num_cached_tokens
        for choice in {tokens.choice for tokens in update.choices} & live.ended_here:
            live.drop_choice(choice)  # it was still on its way to the decode worker when the stop string was found
        before = request.num_output_tokens
        self._take(live, update.choices, now)
        if request.num_output_tokens > before:
            request.timestamps.setdefault("first_decode", now)

    def _take(self, live: Live, updates: tuple[ChoiceTokens, ...], now: float) -> None:
        given_up = self._relay.accept(live, updates, now)
        if not live.request.unfinished:
            self._ledger.finish(live)
        elif given_up is not None:
            text = f"{live.pair} gave up a choice: {given_up}"
            self._ledger.retry(live, Blame("worker_failure", text))

    def _on_client_left(self, live: Live) -> None:
        self._ledger.abort(live)
        self._placer.run(self._clock.now())

    def _on_choice_ended(self, live: Live, choice: int) -> None:
        """The API found a stop string. What the choice still yields is dropped."""
        state = live.request.choices[choice]
        if live.request.is_finished or state.finish is not None:
            return
        state.end_now(FinishReason.STOP)
        live.ended_here.add(choice)
        if live.request.unfinished:
            live.drop_choice(choice)
        else:
            self._ledger.finish(live)
            self._placer.run(self._clock.now())
