"""A recorder keeps what the router tells of its requests until the end of the run (`Observer`)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

from ..router.autoscaler.load_record import LoadRecord
from ..router.state.observer import NullObserver
from ..router.state.outcome import ServiceOutcome
from ..router.state.request import RequestStatus, RouterRequest
from ..tools.load.stats import describe
from ..tools.load.traces import TraceRow
from .jobs import Job
from .kernel import Kernel
from .lengths import TOO_LONG
from .outcome import FleetSample, Outcome, RequestOutcome
from .scenario import Failure, Scenario
from .worker import SimWorker


class Recorder(NullObserver):
    """One per world."""

    def __init__(
        self,
        scenario: Scenario,
        kernel: Kernel,
        *,
        unloaded_s: Callable[[int], float],
        on_closed: Callable[[Job], None],
    ) -> None:
        """`unloaded_s`: of a prompt's tokens, the time to its first token where nothing else is."""
        self._scenario = scenario
        self._kernel = kernel
        self._unloaded_s = unloaded_s
        self._on_closed = on_closed
        self.load: LoadRecord | None = None  # an autoscaler's, which is told, too
        self._open: dict[str, tuple[Job, RouterRequest]] = {}
        self._requests: list[RequestOutcome] = []
        self._fleet: list[FleetSample] = []
        self._workers: list[tuple[SimWorker, float]] = []  # ended ones, and when
        self.num_retries = 0
        self.router_s = 0.0  # real CPU time in the dispatcher
        self._submits_s = array("d")
        self._wasted_s = 0.0  # of workers that nobody wanted any more when they were there

    @property
    def num_open(self) -> int:
        return len(self._open)

    # --- requests -------------------------------------------------------------------------------------------

    def open(self, job: Job, request: RouterRequest) -> None:
        self._open[job.request_id] = (job, request)

    def on_submit_took(self, seconds: float) -> None:
        """Real CPU time."""
        self.router_s += seconds
        self._submits_s.append(seconds)

    def refuse(self, job: Job, request: RouterRequest, error: str) -> None:
        self._close(job, request, "refused", error)

    def turn_away(self, number: int, arrival_s: float, row: TraceRow) -> None:
        """Note a request that the router's API refused: no dispatcher has seen it, and nobody would compute it."""
        self._requests.append(
            RequestOutcome(
                number=number,
                arrival_s=arrival_s,
                num_prompt_tokens=row.num_prompt_tokens,
                num_output_tokens=0,
                ended="refused",
                ttft_s=None,
                tpot_s=None,
                end_s=None,
                unloaded_s=0.0,
                is_embedding=not row.num_output_tokens,
                error=TOO_LONG,
            )
        )

    def on_finished(self, request: RouterRequest) -> None:
        job, _ = self._open[request.request_id]
        if self.load is not None:
            self.load.on_finished(request)
        finished = request.status is RequestStatus.FINISHED
        self._close(job, request, "finished" if finished else "failed", request.error_code)

    def on_submitted(self, request: RouterRequest) -> None:
        if self.load is not None:
            self.load.on_submitted(request)

    def on_outcome(self, outcome: ServiceOutcome) -> None:
        if self.load is not None:
            self.load.on_outcome(outcome)

    def on_retry(self, stage: str, reason: str) -> None:
        self.num_retries += 1

    def _close(self, job: Job, request: RouterRequest, ended: str, error: str = "") -> None:
        del self._open[job.request_id]
        self._on_closed(job)
        self._requests.append(self._outcome_of(job, request, ended, error))

    def _outcome_of(self, job: Job, request: RouterRequest, ended: str, error: str) -> RequestOutcome:
        stamps, tokens = request.timestamps, request.num_output_tokens
        first_s, last_s = stamps.get("first_token"), stamps.get("last_token")
        tpot_s = None
        if first_s is not None and last_s is not None and tokens > 1:
            tpot_s = (last_s - first_s) / (tokens - 1)
        return RequestOutcome(
            number=job.number,
            arrival_s=job.arrival_s,
            num_prompt_tokens=job.num_prompt_tokens,
            num_output_tokens=tokens,
            ended=ended,
            ttft_s=None if first_s is None else first_s - job.arrival_s,
            tpot_s=tpot_s,
            end_s=stamps.get("finished"),
            unloaded_s=self._unloaded_s(job.num_prompt_tokens),
            num_cached_tokens=request.num_cached_tokens,
            num_attempts=request.attempt_number + 1,
            is_local=request.prefill_worker is None,
            is_embedding=request.pooling is not None,
            error=error,
            is_cut=job.is_cut and ended == "finished",
        )

    # --- the fleet ------------------------------------------------------------------------------------------

    def on_worker_ended(self, worker: SimWorker) -> None:
        self._workers.append((worker, self._kernel.now()))

    def on_wasted(self, seconds: float) -> None:
        self._wasted_s += seconds

    def sample(self, workers: Iterable[SimWorker], *, num_queued: int, num_pending: int) -> None:
        """`num_pending`: workers that are wished for, and not there yet."""
        roles = [worker.role for worker in workers if not worker.draining]
        self._fleet.append(
            FleetSample(
                self._kernel.now(),
                roles.count("prefill"),
                roles.count("decode"),
                num_pending,
                num_queued,
                len(self._open),
            )
        )

    # --- the end --------------------------------------------------------------------------------------------

    def outcome(
        self, alive: Iterable[SimWorker], last_arrival_s: float, cpu_s: float, idle_failures: tuple[Failure, ...]
    ) -> Outcome:
        for job, request in list(self._open.values()):
            self._requests.append(self._outcome_of(job, request, "lost", ""))
        self._requests.sort()
        now = self._kernel.now()
        workers = self._workers + [(worker, now) for worker in alive]
        worker_s = self._wasted_s + sum(
            max(0.0, min(end_s, last_arrival_s) - worker.wished_s) for worker, end_s in workers
        )
        alive_s = sum(end_s - worker.began_s for worker, end_s in workers)
        fleet = self._scenario.fleet
        drafts = [worker.core.decode.scheduler.draft_counters for worker, _ in workers]
        arrivals = [request.arrival_s for request in self._requests]
        return Outcome(
            goals=self._scenario.goals,
            requests=tuple(self._requests),
            fleet=tuple(self._fleet),
            span_s=arrivals[-1] - arrivals[0] if arrivals else 0.0,
            end_s=now,
            gpu_hours=worker_s * fleet.gpus_per_worker / 3600,
            usd=None if fleet.usd_per_hour is None else worker_s * fleet.usd_per_hour / 3600,
            num_adapter_loads=sum(w.core.adapters.num_loads for w, _ in workers if w.core.adapters is not None),
            num_draft_tokens=sum(counted.draft_tokens for counted in drafts),
            num_accepted_tokens=sum(counted.accepted_tokens for counted in drafts),
            num_preemptions=sum(worker.core.decode.scheduler.num_preemptions for worker, _ in workers),
            num_retries=self.num_retries,
            num_events=self._kernel.num_events,
            busy_share=sum(worker.engine.busy_s for worker, _ in workers) / alive_s if alive_s else 0.0,
            idle_failures=idle_failures,
            cpu_s=cpu_s,
            router_s=self.router_s,
            submit_us=describe(seconds * 1e6 for seconds in self._submits_s),
        )
