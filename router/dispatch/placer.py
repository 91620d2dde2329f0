"""The placer matches the central queue with the policy: who goes where next, and who waits.

A round of placing walks the queue in order. A request that finds no room keeps the decode worker that it waits for,
so nothing smaller starves it; a few may be passed over, and then the round ends. Who waits for workers that are not
there holds nobody up: what no worker can hold stands aside until workers come, and embeddings are placed where answers
lack a worker.
"""

from __future__ import annotations

from dataclasses import replace

import structlog

from ...common.router_config import RouterConfig
from ..placement.candidates import EXPLAIN_EVERY, candidates
from ..placement.policy import RoutingPolicy
from ..queue.admission import Admission
from ..state.attempt import Attempt
from ..state.decisions import Candidate, Decision, note
from ..state.demand import Lack, Placement, Reason, Wait
from ..state.errors import StreamError
from ..state.observer import Observer
from ..state.pools import Pools
from ..state.request import RequestStatus, RouterRequest
from ..state.tracked_request import TrackedRequest
from ..state.views import PoolView
from ..state.worker import RouterWorker
from .fits import check_fits, fits_nowhere, has_shortened
from .in_flight import InFlightRequests
from .isolation import Isolation
from .prefix_fetch import fetch_from
from .prefix_homes import PrefixHomes

ISOLATION = "isolation"  # who decides on requests that run alone
LOOK_AHEAD = 8  # requests that may be passed over in one round
FALLBACK_LOG_EVERY_S = 1.0

log = structlog.get_logger(__name__)


class Placer:
    """`Placer` moves requests from the queue to workers."""

    def __init__(
        self,
        config: RouterConfig,
        policy: RoutingPolicy,
        pools: Pools,
        in_flight: InFlightRequests,
        admission: Admission,
        isolation: Isolation,
        observer: Observer,
    ) -> None:
        self._in_flight = in_flight
        self._admission = admission
        self._isolation = isolation
        self._policy = policy
        self._pools = pools
        self._prefix_homes = PrefixHomes(pools)
        self._observer = observer
        self._max_local_tokens = config.max_local_prefill_tokens if config.local_prefill else 0
        self._needs_prefill_worker = config.expect_prefill and not config.local_prefill
        self._explains_all = config.explain
        self._is_running = False
        self._fallbacks_unlogged = 0
        self._fallback_logged_s = float("-inf")

    def run(self, now_s: float) -> None:
        """Place what can be placed; once more if placing itself changed something."""
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._in_flight.is_due:
                self._in_flight.is_due = False
                self._place_alone(now_s)
                if len(self._in_flight.queue):
                    self._run_round(now_s)
        finally:
            self._is_running = False

    def _run_round(self, now_s: float) -> None:
        view: PoolView | None = self._pools.picture(now_s)
        self._in_flight.queue.look_again(self._pools.membership)
        claimed, passed = frozenset[int](), set[TrackedRequest]()
        kind: bool | None = None  # of those that are looked at: embeddings or others, where these lack a role's workers
        if self._policy.predicts:
            rate = self._admission.forecast.work_rate(self._pools.num_computing)
            self._in_flight.queue.triage(now_s, rate, self._admission.arrivals)
        queue = self._in_flight.queue
        while len(queue) > len(passed) and (
            next_ones := [one for one in queue.first(LOOK_AHEAD, now_s, embeddings=kind) if one not in passed]
        ):
            for tracked in next_ones:
                if tracked.request.status is not RequestStatus.QUEUED or self.is_too_late(tracked, now_s):
                    continue  # placing an earlier one has ended it, or it ends now
                queued = self._tokens_behind(tracked)
                demand = tracked.search.demand(self._pools, claimed, now_s, tokens_behind=queued)
                view = view or self._pools.picture(now_s)
                answer = self._policy.place(view, demand)
                if isinstance(answer, Placement):
                    seen = candidates(self._policy, view, demand) if self._is_explained(tracked) else ()
                    behind = demand.local_tokens_behind
                    self._place(tracked, answer, now_s, decided_by=self._policy.name, seen=seen, tokens_behind=behind)
                    view = None
                    continue
                if tracked.search.waits_s is None:
                    tracked.search.waits_s = now_s
                self._note_lack(tracked, answer, now_s)
                if tracked.search.is_aside:
                    queue.set_apart(tracked)
                    continue
                if answer.claim is not None:
                    claimed |= {answer.claim}
                passed.add(tracked)
                if len(passed) == LOOK_AHEAD:
                    return
                if answer.lack in (Lack.DECODE_WORKER, Lack.PREFILL_WORKER):
                    if kind is not None:
                        return
                    kind = not demand.is_embedding
                    break

    def _place_alone(self, now_s: float) -> None:
        """Place requests that may kill workers, each on workers of its own. Nobody behind them waits for that."""
        self._isolation.sweep(now_s)
        self._make_way(now_s)
        for tracked in self._in_flight.queue.alone(now_s):
            has_others = any(not other.must_run_alone for other in self._in_flight)
            placement = self._isolation.place(tracked, now_s, has_others=has_others)
            if placement is not None:
                self._place(tracked, placement, now_s, decided_by=ISOLATION)
            elif self._isolation.has_claim(tracked):
                tracked.search.note_hope()
            elif not self._isolation.claims:
                self._note_hopeless(tracked, now_s)

    def _make_way(self, now_s: float) -> None:
        """Interrupt answers on the last open decode workers for who is to run alone there, if others wait as well."""
        if not self._in_flight.queue.num_waiting:
            return
        for claim in self._isolation.overdue(now_s):
            claim.made_way_s = now_s
            self._in_flight.interrupt_on(claim.workers, now_s)

    def _note_hopeless(self, tracked: TrackedRequest, now_s: float) -> None:
        """Note why no worker is kept for it, where every pair has failed or nothing can hold it."""
        answer = self._policy.place(self._pools.picture(now_s), tracked.search.demand(self._pools, frozenset(), now_s))
        if isinstance(answer, Wait) and answer.lack in (Lack.PAIR, Lack.FIT):
            self._note_lack(tracked, answer, now_s)

    def is_too_late(self, tracked: TrackedRequest, now_s: float) -> bool:
        """Send the request away if its first token cannot come in time any more, and return whether that was so."""
        error = self._admission.too_late(tracked, now_s)
        if error is not None:
            self._in_flight.fail(tracked, error)
        return error is not None

    def _is_explained(self, tracked: TrackedRequest) -> bool:
        return self._explains_all or tracked.request.arrival % EXPLAIN_EVERY == 0

    def _place(
        self,
        tracked: TrackedRequest,
        placement: Placement,
        now_s: float,
        *,
        decided_by: str,
        seen: tuple[Candidate, ...] = (),
        tokens_behind: int | None = None,
    ) -> None:
        if tracked.request.pooling is not None:  # of two workers that are kept for it, one is enough
            placement = replace(placement, prefill_worker=None, decode_worker=placement.computing_worker)
        self._note_decision(tracked.request, placement, now_s, decided_by, seen)
        decode = self._pools.named(placement.decode_worker)
        assert decode is not None
        self._in_flight.queue.take(tracked)
        tracked.search.note_hope()
        computing = self._pools.named(placement.computing_worker)
        assert computing is not None
        attempt = Attempt(
            tracked.request,
            decode,
            tracked.deadline_s,
            now_s,
            prediction=placement.prediction,
            fetch=fetch_from(self._pools, tracked.request, placement.fetch_from, computing),
            tokens_behind=tokens_behind,
            whole_prompt_on=tracked.search.whole_prompt_on,
        )
        tracked.begin(attempt)
        if placement.prefill_worker is None:
            if placement.reason.is_fallback:
                self._note_fallback(tracked, decode, placement.reason, now_s)
            self._prefix_homes.note_local(tracked.request, decode)
            tracked.run_locally(now_s)
            return
        attempt.decode_retains = self._prefix_homes.decode_retains(tracked.request, computing, decode)
        # A short prompt that is handed over all the same is not to be computed between the streams there.
        is_short = tracked.request.num_prompt_tokens <= self._max_local_tokens
        attempt.reserve(
            computing,
            max_local_tokens=0 if is_short else self._max_local_tokens,
            queue_if_full=tracked.search.queue_if_full(now_s),
        )

    def _tokens_behind(self, tracked: TrackedRequest) -> int:
        """Return the tokens of other prompts, as urgent as this one, by worker of the pool that computes prompts."""
        others = self._in_flight.queue.tokens_up_to(tracked.request.priority) - tracked.request.num_prompt_tokens
        return others // max(1, self._pools.num_computing)

    def _note_decision(
        self, request: RouterRequest, placement: Placement, now_s: float, decided_by: str, seen: tuple[Candidate, ...]
    ) -> None:
        expected, is_embedding = placement.prediction, request.pooling is not None
        computing = self._pools.named(placement.computing_worker)
        is_embedder = is_embedding and computing is not None and computing.role == "prefill"
        decision = Decision(
            attempt=request.attempt_number,
            at_s=now_s,
            policy=decided_by,
            prefill_worker=placement.computing_worker if is_embedder else placement.prefill_worker,
            decode_worker=None if is_embedder else placement.decode_worker,
            reason=placement.reason.value,
            waited_for=request.waiting_for,
            ttft_s=expected.ttft_s if expected is not None else None,
            tpot_s=expected.tpot_s if expected is not None and not is_embedding else None,
            candidates=seen,
        )
        note(request.decisions, decision)
        request.waiting_for = ""
        self._observer.on_placed(decided_by, decision.reason)

    def _note_lack(self, tracked: TrackedRequest, wait: Wait, now_s: float) -> None:
        request, search = tracked.request, tracked.search
        request.waiting_for = wait.lack.value
        if wait.lack is not Lack.FIT:
            search.misfit_s = None
        has_fit = request.num_output_tokens > 0 or (request.attempt_number > 0 and not search.unfit)
        if wait.lack is Lack.FIT and has_fit:
            search.is_aside = True
            if search.misfit_s is None:  # the worker that could hold it, or one like it, may come back
                search.misfit_s = now_s
        elif wait.lack is Lack.FIT and has_shortened(request, self._pools):
            self._in_flight.is_due = True
        elif wait.lack is Lack.FIT:
            text = fits_nowhere(request, self._pools)
            self._in_flight.fail(tracked, StreamError(text, "context_length_exceeded", 400))
        elif wait.lack is not Lack.PAIR:
            tracked.search.lacks_s = None
        elif tracked.search.lacks_s is None:
            tracked.search.lacks_s = now_s

    def _note_fallback(self, tracked: TrackedRequest, decode: RouterWorker, reason: Reason, now_s: float) -> None:
        """Count each; log the first, and then one a second at most."""
        self._observer.on_fallback("local_prefill")
        self._fallbacks_unlogged += 1
        if now_s - self._fallback_logged_s >= FALLBACK_LOG_EVERY_S:
            log.warning(
                "local_prefill_fallback",
                request_id=tracked.request.request_id,
                worker_id=decode.worker_id,
                reason=reason.value,
                failed=list(tracked.search.failed_pairs.values()),
                count=self._fallbacks_unlogged,
            )
            self._fallback_logged_s, self._fallbacks_unlogged = now_s, 0

    def prefill_for_grant(self, tracked: TrackedRequest, now_s: float) -> RouterWorker | None:
        """Another prefill worker for the unopened grant that the request holds, while it is fresh."""
        attempt = tracked.attempt
        assert attempt is not None and attempt.grant is not None
        if now_s - attempt.grant_s >= attempt.grant.open_within_s / 2:
            return None
        decode = attempt.decode.link.number
        demand = tracked.search.demand(self._pools, frozenset(), now_s)
        # The worker that gave the grant may prefill by now: it hands nothing off to itself.
        demand = replace(demand, failed_pairs=demand.failed_pairs | {(decode, decode)})
        other = self._policy.prefill_for(self._pools.picture(now_s), demand, decode)
        return None if other is None else self._pools.named(other.worker_id)

    def redirect(self, tracked: TrackedRequest, worker: RouterWorker, now_s: float) -> None:
        """Let another worker than was planned compute the prompt, which reads what it lacks itself."""
        attempt = tracked.attempt
        assert attempt is not None
        if (planned := attempt.fetch) is not None:
            attempt.fetch = fetch_from(self._pools, tracked.request, planned.worker_id, worker)
        if worker is attempt.decode:
            tracked.run_locally(now_s)
        else:
            tracked.send_task(now_s, worker)

    def check_fits(self, request: RouterRequest) -> None:
        """Raises RequestError (400) if none of the workers that are there could ever run the request."""
        check_fits(request, self._pools, needs_prefill_worker=self._needs_prefill_worker)
