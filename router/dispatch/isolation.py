"""Requests that run alone: those in whose running step two workers were lost.

    claim ─> nothing new goes there ─> what runs there ends ─> the one attempt ─> released

If that attempt's worker is lost too, nothing else can have been the reason. Where prompts may be computed on decode
workers one worker is claimed, else one of each role. Claims never take every open decode worker for more than half of
the time: after such a claim the others come first for as long as it lasted. What still runs on the last open one after
a while, with others waiting, makes way and goes on behind the attempt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..placement.policy import fits_decode, fits_prefill
from ..state.demand import Demand, Placement, Reason
from ..state.pools import Pools
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from ..state.views import WorkerView
from ..state.worker import RouterWorker
from .running_steps import TRANSIT_S

# For what runs on a claimed worker. Then another router's is borne, for it is as alone as can be had, and our own makes
# way where others wait for that worker: longer, they wait longer; shorter, more answers are interrupted.
PATIENCE_S = 10.0
_MAX_SHARE = 2  # at most one in so many decode workers is claimed, if there is more than one


@dataclass(slots=True, eq=False)
class Claim:
    """Workers that are kept for one request."""

    tracked: TrackedRequest
    workers: tuple[RouterWorker, ...]  # the decode worker first
    since_s: float
    attempt_number: int | None = None  # of the attempt that runs there; None: they are not empty yet
    made_way_s: float | None = None  # when what ran there was interrupted for it

    @property
    def is_finished(self) -> bool:
        """True once its attempt has ended or nobody needs it. A refused reservation is the same attempt."""
        request = self.tracked.request
        if request.is_finished or not self.tracked.must_run_alone:
            return True
        return self.attempt_number is not None and request.attempt_number != self.attempt_number

    @property
    def is_waiting(self) -> bool:
        return self.tracked.request.status is RequestStatus.QUEUED


class Isolation:
    """Claims workers and says when they are empty. `sweep` comes before every round of placing."""

    def __init__(self, pools: Pools, *, may_prefill_locally: bool) -> None:
        self.claims: list[Claim] = []
        self._pools = pools
        self._may_prefill_locally = may_prefill_locally
        self._rest_until_s = 0.0  # until then the last open decode worker is not claimed

    def sweep(self, now_s: float) -> None:
        """Give back what is claimed in vain."""
        for claim in list(self.claims):
            if claim.is_finished or (claim.is_waiting and self._is_in_vain(claim, now_s)):
                self._release(claim, now_s)

    def place(self, tracked: TrackedRequest, now_s: float, *, has_others: bool) -> Placement | None:
        """Return where to run it, as soon as its workers are empty."""
        demand = tracked.search.demand(self._pools, frozenset(), now_s)
        claim = next((claim for claim in self.claims if claim.tracked is tracked), None)
        claim = claim or self._claim(tracked, demand, now_s, has_others)
        if claim is None or not all(self._is_empty(worker, claim, now_s) for worker in claim.workers):
            return None
        if any(tracked.search.is_refused_by(worker, now_s) for worker in claim.workers):
            return None
        claim.attempt_number = tracked.request.attempt_number
        decode, *prefill = claim.workers
        return Placement(prefill[0].worker_id if prefill else None, decode.worker_id, Reason.ALONE)

    def has_claim(self, tracked: TrackedRequest) -> bool:
        """Return whether workers are kept for it."""
        return any(claim.tracked is tracked for claim in self.claims)

    def overdue(self, now_s: float) -> list[Claim]:
        """Return claims that have waited for our own work on their workers for long, where no decode worker is open."""
        if not self.claims or self._open("decode"):
            return []
        return [
            claim
            for claim in self.claims
            if claim.is_waiting and now_s - claim.since_s >= PATIENCE_S and any(one.loads for one in claim.workers)
        ]

    def _claim(self, tracked: TrackedRequest, demand: Demand, now_s: float, has_others: bool) -> Claim | None:
        open_decodes = self._open("decode")
        num_decodes = len(open_decodes) + len(self.claims)
        if len(self.claims) >= max(1, num_decodes // _MAX_SHARE):
            return None
        if len(open_decodes) == 1 and has_others and now_s < self._rest_until_s:
            return None
        workers = self._emptiest_together(open_decodes, demand, now_s)
        if workers is None:
            return None
        claim = Claim(tracked, workers, now_s)
        for worker in workers:
            self._pools.claim(worker)
        self.claims.append(claim)
        return claim

    def _open(self, role: str) -> list[RouterWorker]:
        return [worker for worker in self._pools.with_role(role) if worker.is_ready and not worker.is_claimed]

    def _emptiest_together(
        self, decodes: list[RouterWorker], demand: Demand, now_s: float
    ) -> tuple[RouterWorker, ...] | None:
        """Return those that are likely to be empty first: a decode worker, with a prefill worker that it has not
        failed with where one is needed."""
        local = self._may_prefill_locally
        prefills = [] if local else self._emptiest_first(self._open("prefill"), demand, now_s, fits_prefill)
        for decode in self._emptiest_first(decodes, demand, now_s, fits_decode):
            if local:
                return (decode,)
            for prefill in prefills:
                if (prefill.link.number, decode.link.number) not in demand.failed_pairs:
                    return decode, prefill
        return None

    def _emptiest_first(
        self,
        workers: list[RouterWorker],
        demand: Demand,
        now_s: float,
        fits: Callable[[WorkerView, Demand], bool],
    ) -> list[RouterWorker]:
        views = {worker: worker.view(now_s) for worker in workers}
        fitting = [worker for worker, view in views.items() if fits(view, demand)]
        return sorted(fitting, key=lambda worker: _emptiness(views[worker]))

    def _is_in_vain(self, claim: Claim, now_s: float) -> bool:
        """Tell whether its request is not to run yet, as one that makes way for others, or cannot run there."""
        return claim.tracked.is_put_off(now_s) or not self._is_there(claim)

    def _is_there(self, claim: Claim) -> bool:
        """Tell whether its workers live, take work, and have the roles that they were claimed for."""
        return all(
            self._pools.find(worker.link) is worker and worker.is_ready and worker.role == role
            for worker, role in zip(claim.workers, ("decode", "prefill"), strict=False)
        )

    def _is_empty(self, worker: RouterWorker, claim: Claim, now_s: float) -> bool:
        if worker.loads:
            return False
        if claim.made_way_s is not None and not worker.has_stepped_since(claim.made_way_s + TRANSIT_S):
            return False  # what was interrupted is in the step that runs: whose fault would the next loss be?
        view = worker.view(now_s)
        return not (view.num_running or view.ahead_tokens) or now_s - claim.since_s >= PATIENCE_S

    def _release(self, claim: Claim, now_s: float) -> None:
        self.claims.remove(claim)
        for worker in claim.workers:
            self._pools.unclaim(worker)
        if not self._open("decode")[1:]:
            self._rest_until_s = now_s + (now_s - claim.since_s)


def _emptiness(view: WorkerView) -> tuple[int, int, str]:
    return view.num_running, view.ahead_tokens, view.worker_id
