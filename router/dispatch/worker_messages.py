"""Messages of workers go to the request and the attempt that each is about, or are dropped.

    Grant ─> PrefillTask      NoCapacity ─> queue, or local prefill      TaskRefused ─> another prefill worker, or retry
    Embedding ─> the request's end
    FirstToken, StepTokens ─> relay      HandoffDone ─> decoding      HandoffFailed ─> retry
    WorkerFailure ─> retry, or the request's end where every worker would fail alike, as where it is not served

Only messages of the current attempt, from the sessions that take part in it, change anything. So a worker that hung,
was given up and comes back finds its late messages fenced: its new session has no part in any attempt of before.
"""

from __future__ import annotations

from ...common.served import UNSERVED
from ...wire.codec import RequestMessage
from ...wire.results import (
    ChoiceTokens,
    Embedding,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    PromptLogprobs,
    RequestTokens,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from ...wire.tasks import Abort
from ..queue.admission import Admission
from ..state.attempt import Attempt, AttemptState
from ..state.errors import StreamError
from ..state.failures import Blame
from ..state.observer import Observer
from ..state.pools import Pools
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from ..state.worker import RouterWorker
from .in_flight import InFlightRequests
from .placer import Placer
from .relay import Relay


class WorkerMessages:
    """`WorkerMessages` carries out what a message means; `InFlightRequests` ends attempts, `Placer` finds workers."""

    def __init__(
        self,
        pools: Pools,
        in_flight: InFlightRequests,
        placer: Placer,
        admission: Admission,
        observer: Observer,
        *,
        may_prefill_locally: bool,
    ) -> None:
        self.relay = Relay(observer, in_flight.due_times)
        self._pools = pools
        self._in_flight = in_flight
        self._placer = placer
        self._admission = admission
        self._observer = observer
        self._may_prefill_locally = may_prefill_locally

    def _current(self, worker: RouterWorker, request_id: str, attempt_number: int) -> TrackedRequest | None:
        """Return the request if this message is about its current attempt and from a worker that takes part in it."""
        tracked = self._in_flight.get(request_id)
        if tracked is None:
            self._observer.on_dropped("unknown_request")
        elif tracked.request.attempt_number != attempt_number:
            self._observer.on_dropped("stale_attempt")
        elif tracked.attempt is None or not tracked.attempt.has_part(worker):
            self._observer.on_dropped("wrong_worker")
        else:
            return tracked
        return None

    def on_request_message(self, worker: RouterWorker, message: RequestMessage, now: float) -> None:
        if isinstance(message, HandoffDone | HandoffFailed) and message.request_id not in self._in_flight:
            return  # the answer to our last Abort
        tracked = self._current(worker, message.request_id, message.attempt)
        if tracked is None:
            if isinstance(message, Grant):  # nobody will use it: it need not wait until it lapses
                worker.link.send(Abort(request_id=message.request_id, attempt=message.attempt))
            return
        if (attempt := tracked.attempt) is None or not attempt.expects(worker, message):
            self._observer.on_dropped("out_of_turn")
            return
        tracked.event_s = now
        match message:
            case Grant():
                self._on_grant(tracked, attempt, message, now)
            case NoCapacity(reason=reason) | TaskRefused(reason=reason) if reason in UNSERVED:  # every worker would
                text = f"worker {worker.worker_id} does not serve this request: {message.detail}"
                self._in_flight.fail(tracked, StreamError(text, "not_served", 500))
            case NoCapacity():
                self._on_no_capacity(tracked, worker, message, now)
            case TaskRefused():
                self._on_task_refused(tracked, attempt, worker, message, now)
            case HandoffDone():
                self._on_arrived(attempt, now)
            case HandoffFailed():
                self._on_handoff_failed(tracked, attempt, message, now)
            case FirstToken():
                self._on_first_token(tracked, attempt, message, now)
            case Embedding():
                self._on_embedding(tracked, attempt, message, now)
            case PromptLogprobs():
                self.relay.accept_prompt_logprobs(tracked, message)
                self._in_flight.finish_unless_held(tracked)
            case WorkerFailure(code=""):
                text = f"worker {worker.worker_id} failed: {message.reason}"
                self._in_flight.retry(tracked, Blame("worker_failure", text))
            case WorkerFailure():  # no worker is to blame
                self._in_flight.fail(tracked, StreamError(message.reason, message.code, 500))

    # --- reservations and tasks -----------------------------------------------------------------------------

    def _on_grant(self, tracked: TrackedRequest, attempt: Attempt, message: Grant, now: float) -> None:
        attempt.take_grant(message.grant, now)
        prefill = attempt.prefill
        assert prefill is not None
        if self._pools.find(prefill.link) is prefill:
            tracked.send_task(now)
        else:
            self._send_elsewhere(tracked, f"prefill worker {prefill.worker_id} lost before its task", now)

    def _send_elsewhere(self, tracked: TrackedRequest, why: str, now: float) -> None:
        """Let another prefill worker use the grant, which nobody has opened, while it lasts."""
        other = None if tracked.must_run_alone else self._placer.prefill_for_grant(tracked, now)
        if other is not None:
            self._placer.redirect(tracked, other, now)
        else:
            self._in_flight.retry(tracked, Blame("refused", why, is_counted=False))

    def _on_no_capacity(self, tracked: TrackedRequest, worker: RouterWorker, message: NoCapacity, now: float) -> None:
        if message.reason == "held":
            self._placer.redirect(tracked, worker, now)
            return
        if message.reason in ("stale", "incarnation"):
            text = f"decode worker {worker.worker_id} refused a reservation: {message.reason}"
            self._in_flight.retry(tracked, Blame("refused", text))
            return
        if message.reason == "never_fits":
            (tracked.search.ungranted if self._may_prefill_locally else tracked.search.unfit).add(worker.link.number)
        elif message.reason == "draining":
            self.note_drain(worker)
        elif message.reason == "wrong_role":
            self._note_role(tracked, worker, "prefill")
        else:
            tracked.search.note_refusal(worker, message.retry_after_s, now)
        tracked.end_attempt(tell=False)  # nothing was reserved: the next one has its number
        tracked.request.advance(RequestStatus.QUEUED, now)
        self._in_flight.enqueue(tracked)

    def _on_task_refused(
        self, tracked: TrackedRequest, attempt: Attempt, worker: RouterWorker, message: TaskRefused, now: float
    ) -> None:
        text = f"{worker.role} worker {worker.worker_id} refused a task: {message.reason} {message.detail}".rstrip()
        match message.reason:
            case "draining":
                self.note_drain(worker)
            case "never_fits":
                tracked.search.unfit.add(worker.link.number)
            case "wrong_role":
                self._note_role(tracked, worker, "prefill" if worker is attempt.decode else "decode")
            case "blocks":
                tracked.search.note_refusal(worker, 0.0, now)
            case "expired":
                return  # its deadline is ours, which came first: the next tick ends it
            case _:
                tracked.search.note_failed_pair(attempt.pair_sessions, text)
                self._in_flight.retry(tracked, Blame("refused", text))
                return
        if attempt.grant is not None:
            self._send_elsewhere(tracked, text, now)
        else:
            self._in_flight.retry(tracked, Blame("refused", text, is_counted=False))

    def _note_role(self, tracked: TrackedRequest, worker: RouterWorker, role: str) -> None:
        """Note that the worker changed its role: its next heartbeat says so, or one that crossed the task did."""
        if worker.hello.can_change_role:
            worker.set_role(role)
        else:
            tracked.search.unfit.add(worker.link.number)

    def note_drain(self, worker: RouterWorker) -> None:
        """Note that the worker drains: it says so in a heartbeat or, before the next one, in answer to a request."""
        if worker.begin_drain():
            self._observer.on_drain()

    # --- the handoff ----------------------------------------------------------------------------------------

    def _on_arrived(self, attempt: Attempt, now: float) -> None:
        if attempt.prefill is not None:
            self._pools.on_handoff(attempt.prefill, attempt.decode, now, failed=False)
        attempt.arrive(now)
        self._in_flight.is_due = True

    def _on_handoff_failed(self, tracked: TrackedRequest, attempt: Attempt, message: HandoffFailed, now: float) -> None:
        prefill, pair = attempt.prefill, attempt.pair_sessions
        assert prefill is not None and pair is not None
        text = f"handoff {attempt.pair} failed: {message.reason} (blame: {message.blame} {message.worker_id})"
        if message.worker_id:  # who opened the grant had begun to compute
            attempt.note(AttemptState.BEGUN)
        if message.blame == "draining":  # its decode worker gives up what was not opened: nobody failed
            self.note_drain(attempt.decode)
            self._in_flight.retry(tracked, Blame("refused", text, is_counted=False))
            return
        if attempt.lost_prefill is not None:
            self._in_flight.retry(tracked, attempt.lost_prefill)
            return
        if message.blame == "fenced":  # the decode worker replaced its agents because of another: the pair is well
            self._in_flight.retry(tracked, Blame("refused", text, is_counted=False))
            return
        # By what it said, whether it came or not.
        was_opened = bool(message.worker_id) or attempt.state >= AttemptState.COMPUTED
        if message.blame != "expired" or was_opened or tracked.search.note_late(pair):
            self._pools.on_handoff(prefill, attempt.decode, now, failed=True)
            tracked.search.note_failed_pair(pair, text)
        # else nobody opened the grant in time: the prefill worker was late, which says nothing of the pair
        self._in_flight.retry(tracked, Blame("handoff_failed", text))

    # --- tokens ---------------------------------------------------------------------------------------------

    def on_steps(self, worker: RouterWorker, message: StepTokens, now: float) -> None:
        worker.note_step(message, now)
        for update in message.updates:
            self._on_step(worker, update, now)

    def _on_step(self, worker: RouterWorker, update: RequestTokens, now: float) -> None:
        tracked = self._current(worker, update.request_id, update.attempt)
        if tracked is None:
            if update.request_id not in self._in_flight:
                # It goes on with something that has ended here: an Abort crossed, or was for single choices.
                worker.link.send(Abort(request_id=update.request_id, attempt=update.attempt))
            return
        request, attempt = tracked.request, tracked.attempt
        is_out_of_turn = request.status is RequestStatus.RESERVED or request.pooling is not None
        if attempt is None or worker is not attempt.decode or is_out_of_turn:
            self._observer.on_dropped("out_of_turn")
            return
        tracked.event_s = now
        if request.status is RequestStatus.PREFILLING:
            self._on_arrived(attempt, now)
        attempt.state = AttemptState.STEPPED
        if not request.is_resume:  # the prefill worker's word may come later, or not at all
            request.num_cached_tokens = max(request.num_cached_tokens, update.num_cached_tokens)
        if tracked.ended_here:
            for choice in {tokens.choice for tokens in update.choices} & tracked.ended_here:
                attempt.drop_choice(choice)  # its end was still on the way to the decode worker
        if self._take(tracked, attempt, update.choices, now) and "first_decode" not in request.timestamps:
            request.timestamps["first_decode"] = now

    def _on_first_token(self, tracked: TrackedRequest, attempt: Attempt, message: FirstToken, now: float) -> None:
        request = tracked.request
        attempt.return_credit()
        attempt.note(AttemptState.COMPUTED)
        self._in_flight.is_due = True
        if not request.is_resume:
            request.num_cached_tokens = max(request.num_cached_tokens, message.num_cached_tokens)
            request.prefill_s, request.prefill_wait_s = message.prefill_s, message.queue_s
        self._take(tracked, attempt, message.choices, now)

    def _on_embedding(self, tracked: TrackedRequest, attempt: Attempt, message: Embedding, now: float) -> None:
        request = tracked.request
        request.num_cached_tokens = message.num_cached_tokens
        request.prefill_s, request.prefill_wait_s = message.prefill_s, message.queue_s
        request.end_embedded(message.vector, now)
        self._admission.on_first_token(tracked, now)
        self._in_flight.finish(tracked)

    def _take(self, tracked: TrackedRequest, attempt: Attempt, updates: tuple[ChoiceTokens, ...], now: float) -> int:
        """Take an attempt's tokens, and return the number of those that are new."""
        accepted = self.relay.accept(tracked, attempt, updates, now)
        if accepted.num_new:
            self._on_progress(tracked, attempt, is_first=accepted.is_first, now=now)
        if accepted.has_end and not tracked.request.unfinished:
            self._in_flight.finish_unless_held(tracked)
        elif accepted.given_up is not None:
            text = f"{attempt.pair} gave up a choice: {accepted.given_up}"
            self._in_flight.retry(tracked, Blame("worker_failure", text))
        return accepted.num_new

    def _on_progress(self, tracked: TrackedRequest, attempt: Attempt, *, is_first: bool, now: float) -> None:
        tracked.num_same = 0
        if tracked.note_step(attempt):
            self._in_flight.is_due = True  # others may join it
        if is_first:
            self._admission.on_first_token(tracked, now)
            if (said := attempt.prediction) is not None and not tracked.request.attempt_number:
                self._pools.predictor.on_first_token(
                    attempt.way, said.ttft_s, now - attempt.placed_s, bare_s=said.bare_s, wait_s=said.wait_s
                )
        if tracked.is_resuming:
            tracked.is_resuming = False
            self._observer.on_resumed("ok")
