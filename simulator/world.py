"""One simulated cluster: the real dispatcher, simulated workers, and the requests of a scenario.

    arrival ─> Dispatcher.submit ─> messages ─> workers ─> messages ─> Dispatcher.on_message ─> ... ─> outcome

Router and workers talk through the kernel with a constant delay. A worker that dies takes its session with it at once.
"""

from __future__ import annotations

from functools import cache, partial
from random import Random
from time import process_time

from ..common.errors import CapacityError, ConfigError, RequestError
from ..router.dispatch.dispatcher import Dispatcher
from ..router.placement import make_policy
from ..router.state.adapter_use import AdapterUse
from ..router.state.predictor import Predictor
from ..tools.load.traces import TraceRow
from ..wire.fields import Message
from ..wire.workers import Goodbye, SetRole, WorkerHello
from ..worker.roles import RoleName
from .adapters import AdapterChoice, adapter_use
from .costs.network import Link
from .jobs import Job, JobContents, any_repeats, make_job, make_request
from .kernel import Kernel
from .launcher import SimLauncher
from .lengths import cut, is_too_long
from .outcome import Outcome
from .recorder import Recorder
from .scenario import Failure, Scenario
from .setup import router_config, unloaded_s, worker_spec
from .traffic import arrivals, rows_of
from .worker import SimWorker

ROUTER_TICK_S = 0.1
_SAMPLE_EVERY_S = 1.0


class World:
    """Owns the run. `run` once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.kernel = Kernel()
        rows = rows_of(scenario.traffic)
        hashed = scenario.fleet.prefix_caching
        block_tokens = scenario.fleet.block_tokens_of(rows[0])
        self.spec = worker_spec(scenario, block_tokens, any_repeats(rows) if hashed is None else hashed)
        self._arrivals = arrivals(scenario.traffic)
        self._adapters = AdapterChoice(scenario.fleet.adapters, scenario.traffic.seed)
        self.jobs: dict[str, Job] = {}
        self.contents = JobContents(self.jobs, block_tokens)
        self._num_arrived = 0
        self._is_over = False  # the last one has come
        self._last_arrival_s = 0.0
        self._idle_failures = list(scenario.failures)
        self.recorder = Recorder(
            scenario, self.kernel, unloaded_s=cache(partial(unloaded_s, self.spec)), on_closed=self.forget
        )
        predictor = Predictor()
        config = router_config(scenario)
        maker = scenario.router.make_policy or make_policy
        self.dispatcher = Dispatcher(
            config,
            maker(config, predictor),
            self.kernel,
            self.recorder,
            rng=Random(scenario.seed),
            predictor=predictor,
        )
        self._numbers = 0
        self._lives: dict[str, int] = {}
        self.workers: dict[str, SimWorker] = {}
        self._addresses: dict[str, SimWorker] = {}  # of the same workers
        fleet = scenario.fleet
        for index in range(fleet.prefill):
            self.start(f"prefill-{index}", "prefill")
        for index in range(fleet.decode):
            self.start(f"decode-{index}", "decode")
        scaled = scenario.scaled
        self.launcher: SimLauncher | None = None
        if scaled is not None:
            self.launcher = SimLauncher(self, scaled, config, predictor)
            self.recorder.load = self.launcher.record

    # --- workers --------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        """Return a number that nothing else in this run has."""
        self._numbers += 1
        return self._numbers

    def start(self, worker_id: str, role: RoleName) -> SimWorker:
        """A new life of a worker."""
        life = self._lives[worker_id] = self._lives.get(worker_id, 0) + 1
        labels = self.scenario.fleet.labels
        own = labels(list(self._lives).index(worker_id)) if labels is not None else ()
        worker = SimWorker(self, self.spec, worker_id, role, life, own)
        self.workers[worker_id] = self._addresses[worker.address] = worker
        worker.start()
        return worker

    def at(self, address: str) -> SimWorker | None:
        """Return the worker with this address; None: that life is over."""
        return self._addresses.get(address)

    @property
    def no_link(self) -> Link:
        """Return the way to somebody who is not there."""
        return self.scenario.fleet.network.default

    def link(self, a: SimWorker, b: SimWorker) -> Link:
        return self.scenario.fleet.network.between(a.labels, b.labels)

    def joined(self, worker: SimWorker, hello: WorkerHello) -> None:
        self.dispatcher.worker_joined(worker, hello)

    def on_message(self, worker: SimWorker, message: Message) -> None:
        if not worker.has_left:
            began_s = process_time()
            self.dispatcher.on_message(worker, message)
            self.recorder.router_s += process_time() - began_s

    def leave(self, worker: SimWorker) -> None:
        """Take away a worker that has drained."""
        self.on_message(worker, Goodbye())
        self._end(worker, "drained")
        if self.launcher is not None:
            self.launcher.on_left(worker.worker_id)

    def kill(self, worker_id: str, back_after_s: float | None) -> bool:
        """False: there is no such worker now."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return False
        worker.flush()
        self._end(worker, "connection lost")
        if back_after_s is not None:
            # Not before its session has ended.
            self.kernel.after(max(back_after_s, self.scenario.message_s), self.start, worker_id, worker.role)
        return True

    def _fail(self, failure: Failure) -> None:
        if self.kill(failure.worker, failure.back_after_s):
            self._idle_failures.remove(failure)

    def dropped(self, worker: SimWorker, reason: str) -> None:
        """Raise ConfigError: the router has given it up, as it would a real one that computes a step for so long."""
        raise ConfigError(
            f"after {self.kernel.now():.0f} s the router takes {worker.worker_id} for hung ({reason}): its steps are "
            "too long to be served; give faster workers, or smaller steps (--prefill-tokens, --decode-tokens)"
        )

    def _end(self, worker: SimWorker, reason: str) -> None:
        # What it has said is on its way: it arrives before the end of the session.
        del self.workers[worker.worker_id], self._addresses[worker.address]
        worker.is_dead = worker.engine.is_dead = True
        self.recorder.on_worker_ended(worker)
        self.kernel.after(self.scenario.message_s, self._leave, worker, reason)
        for other in self.workers.values():
            other.after(self.scenario.message_s, other.on_peer_lost, worker.address)

    def _leave(self, worker: SimWorker, reason: str) -> None:
        worker.has_left = True
        self.dispatcher.worker_left(worker, reason)

    # --- requests -------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        """Requests are made when they come: a million of them never exist at once."""
        for time_s, row in self._arrivals:
            adapter = adapter_use(self._adapters.draw(), self.spec.fleet.adapters.num_bytes)
            number, taken_s = self._num_arrived, time_s + self.scenario.router_s
            self._num_arrived += 1
            self._last_arrival_s = time_s
            if is_too_long(row, self.spec.fleet.max_model_len):
                self.kernel.at(taken_s, self._turn_away, number, time_s, row)
            else:
                self.kernel.at(taken_s, self._submit, self._job_of(number, time_s, row, adapter))
            return
        self._is_over = True

    def _turn_away(self, number: int, time_s: float, row: TraceRow) -> None:
        self._next_arrival()
        self.recorder.turn_away(number, time_s, row)

    def _job_of(self, number: int, time_s: float, row: TraceRow, adapter: AdapterUse | None) -> Job:
        fitting, spec = cut(row, self.spec.fleet.max_model_len), self.spec
        job = make_job(number, fitting, time_s, spec.kv.block_size, hashed=spec.prefix_caching, adapter=adapter)
        job.is_cut = fitting is not row
        self.jobs[job.request_id] = job
        return job

    def _submit(self, job: Job) -> None:
        self._next_arrival()
        most = self.scenario.max_tokens
        if job.num_output_tokens:  # a client that says nothing is allowed what there is room for
            most = min(most, self.spec.fleet.max_model_len - job.num_prompt_tokens)
        request = make_request(job, most, self.spec.kv.block_size)
        self.recorder.open(job, request)
        began_s = process_time()
        try:
            self.dispatcher.submit(request)
        except (CapacityError, RequestError) as error:
            self.recorder.refuse(job, request, str(error))
        self.recorder.on_submit_took(process_time() - began_s)

    def forget(self, job: Job) -> None:
        """Forget a job that has ended. Workers may still hear of it for a moment."""
        self.kernel.after(10.0, self.jobs.pop, job.request_id)

    # --- the run --------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        began_s = process_time()
        self.kernel.after(1.0, self._next_arrival)  # heartbeats first
        self.kernel.after(ROUTER_TICK_S, self._tick)
        self.kernel.after(_SAMPLE_EVERY_S, self._sample)
        for failure in self.scenario.failures:
            self.kernel.at(failure.at_s, self._fail, failure)
        for change in self.scenario.role_changes:
            self.kernel.at(change.at_s, self.set_role, change.worker, change.role)
        self.kernel.run(self._has_ended)
        cpu_s = process_time() - began_s
        return self.recorder.outcome(self.workers.values(), self._last_arrival_s, cpu_s, tuple(self._idle_failures))

    def set_role(self, worker_id: str, role: str) -> None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.send(SetRole(role=role))

    def leftovers(self, after_s: float = 5.0) -> list[str]:
        """Say what workers still hold when a run has ended and the last messages have come: nothing should be left."""
        end_s = self.kernel.now() + after_s
        self.kernel.run(lambda: self.kernel.now() >= end_s)
        left = []
        for worker in self.workers.values():
            worker.pool.check()
            if worker.pool.num_owned_blocks or worker.num_unfinished or worker.engine.is_busy:
                held = f"{worker.pool.num_owned_blocks} blocks, {worker.num_unfinished} requests"
                left.append(f"{worker.worker_id}: {held}")
        return left + self.dispatcher.breaches()

    def _has_ended(self) -> bool:
        if not self._is_over:
            return False
        return not self.recorder.num_open or self.kernel.now() > self._last_arrival_s + self.scenario.drain_s

    def _tick(self) -> None:
        began_s = process_time()
        self.dispatcher.tick()
        self.recorder.router_s += process_time() - began_s
        self.kernel.after(ROUTER_TICK_S, self._tick)

    def _sample(self) -> None:
        self.recorder.sample(
            self.workers.values(),
            num_queued=self.dispatcher.view().num_queued,
            num_pending=self.launcher.num_pending if self.launcher is not None else 0,
        )
        self.kernel.after(_SAMPLE_EVERY_S, self._sample)
