"""A fleet of prefill and decode workers as queues around step-time models, driven by the production autoscaler.

    arrival ─> central queue ─> a free prefill worker takes a batch ─> first tokens ─> the decode worker with most room
                  └─> refused, once its objective cannot be met                              └─> last token

Prompts are exact events; decode advances in ticks, in which every sequence of a worker gets the same number of
tokens. What no scale decision depends on is left out: transfers, prefix caches, placement rules.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from kvferry.benchmarks.autoscale.records import Changes, Minute, ModelTimes, Request, Worker
from kvferry.router.autoscaler.autoscaler import Autoscaler
from kvferry.router.autoscaler.scale_types import (
    AnswerLengths,
    Kept,
    LoadSnapshot,
    Member,
    MemberState,
    Pool,
    ScaleDecision,
    WorkerLimits,
)
from kvferry.router.state.objectives import Objectives
from kvferry.sizing.steps import StepModel, StepWork

_TICK_S = 0.25
_DECIDE_EVERY_S = 5.0
_ROLE_CHANGE_S = 0.5
FILL_TOKENS = 1024  # from here on a step of more prompts takes longer in proportion: other workers take them
SETTLED_S = 600.0  # after its begin, every answer of a minute has ended


class FleetRun:
    """One run; `run` once."""

    def __init__(
        self,
        autoscaler: Autoscaler,
        model: StepModel,
        limits: WorkerLimits,
        objectives: Objectives,
        *,
        num_prefill: int,
        num_decode: int,
        start_s: float,
        gpus_per_worker: int,
    ) -> None:
        self._autoscaler = autoscaler
        self._times = ModelTimes(model)
        self._model = model
        self._limits = limits
        self._objectives = objectives
        self._start_s = start_s
        self._gpus = gpus_per_worker
        self._now = 0.0
        self._num_made = 0
        self._number = 0
        self._workers: list[Worker] = []
        self._queue: deque[Request] = deque()
        self._computing: list[tuple[float, int, Worker, list[Request]]] = []  # heap of batches by their end
        self._waiting: deque[Request] = deque()  # for room on a decode worker
        self._prompts: list[int] = []
        self._answers: list[AnswerLengths] = []
        self._kept = {"prefill": [0, 0], "decode": [0, 0]}  # met, seen
        self.minutes: list[Minute] = []
        self.changes = Changes()
        self._begin = (num_prefill, num_decode)

    def run(
        self,
        requests: Iterator[tuple[float, int, int]],
        begin_s: float,
        duration_s: float,
        on_minute: Callable[[Minute], None],
    ) -> None:
        """`requests`: (seconds of the day, prompt tokens, answer tokens). `on_minute`: all but the last ones."""
        self._now = begin_s
        self.minutes = [Minute(begin_s + 60.0 * index) for index in range(int(-(-duration_s // 60)))]
        for pool, count in zip(("prefill", "decode"), self._begin, strict=True):
            for _ in range(count):
                self._add(pool, begin_s)  # type: ignore[arg-type]
        pending = next(requests, None)
        decide_s, end_s = begin_s + _DECIDE_EVERY_S, begin_s + duration_s
        num_settled = 0
        while self._now < end_s:
            until_s = self._now + _TICK_S
            while pending is not None and pending[0] < until_s:
                self._finish_batches(pending[0])
                self._arrive(*pending)
                pending = next(requests, None)
            self._finish_batches(until_s)
            self._now = until_s
            self._decode()
            if self._now >= decide_s:
                self._apply(self._autoscaler.decide(self._snapshot()))
                decide_s += _DECIDE_EVERY_S
            self._start_batches(self._now)
            if self.minutes[num_settled].start_s + SETTLED_S <= self._now:
                self._settle(num_settled, on_minute)
                num_settled += 1
        # Answers of the last minutes are under way: those minutes are not counted.

    def _settle(self, index: int, on_minute: Callable[[Minute], None]) -> None:
        on_minute(self.minutes[index])
        self.minutes[index] = replace(self.minutes[index], prompts=[], crowd=[])

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _arrive(self, at_s: float, num_prompt: int, num_output: int) -> None:
        alone_s = self._times.prefill_s(num_prompt, 0)
        ttft_s = self._objectives.ttft_limit_s(alone_s)
        assert ttft_s is not None
        minute = self._minute(at_s)
        minute.num_arrived += 1
        minute.prompts.append((at_s, num_prompt))
        self._prompts.append(num_prompt)
        self._queue.append(Request(at_s, num_prompt, num_output, ttft_s))
        self._start_batches(at_s)

    def _start_batches(self, now_s: float) -> None:
        if not self._queue:
            return
        for worker in self._workers:
            if worker.pool == "prefill" and not worker.is_leaving and max(worker.ready_s, worker.busy_until_s) <= now_s:
                batch, work_s = self._take(now_s)
                if batch:
                    worker.busy_until_s = now_s + work_s
                    self._number += 1
                    heapq.heappush(self._computing, (worker.busy_until_s, self._number, worker, batch))
                if not self._queue:
                    return

    def _take(self, now_s: float) -> tuple[list[Request], float]:
        """A long prompt, or short ones that fill a step together; those that are late already are refused."""
        batch: list[Request] = []
        tokens = pairs = 0
        while self._queue and tokens < FILL_TOKENS:
            request = self._queue[0]
            size = request.num_prompt_tokens
            alone_s = self._times.prefill_s(size, 0)
            if now_s + alone_s > request.arrival_s + request.limit_s:
                self._queue.popleft()
                self._count("prefill", met=False)
                continue
            if batch and tokens + size > FILL_TOKENS:
                break
            self._queue.popleft()
            batch.append(request)
            tokens, pairs = tokens + size, pairs + size * size // 2
        return batch, self._model.step_s(StepWork(tokens, pairs)) if batch else 0.0

    def _finish_batches(self, until_s: float) -> None:
        while self._computing and self._computing[0][0] <= until_s:
            end_s, _, _, batch = heapq.heappop(self._computing)
            for request in batch:
                request.first_s = end_s
                self._count("prefill", met=end_s - request.arrival_s <= request.limit_s)
                self._waiting.append(request)
            self._start_batches(end_s)

    # --- answers ----------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One tick of all decode workers, then the answers that wait for one."""
        rows = context = slowest_s = 0.0
        for worker in self._workers:
            if worker.rows:
                count = len(worker.rows)
                step_s = self._times.decode_step_s(count, round(worker.context))
                rows, context, slowest_s = rows + count, context + worker.context, max(slowest_s, step_s)
                self._advance(worker, step_s)
        minute = self._minute(self._now - _TICK_S)
        minute.crowd.append((rows, context, slowest_s))
        minute.gpu_s += _TICK_S * self._gpus * len(self._workers)
        self._workers = [worker for worker in self._workers if not (worker.is_leaving and self._is_done(worker))]
        while self._waiting and self._adopt(self._waiting[0]):
            self._waiting.popleft()

    def _is_done(self, worker: Worker) -> bool:
        return not worker.rows and worker.busy_until_s <= self._now

    def _advance(self, worker: Worker, step_s: float) -> None:
        begin = worker.progress
        worker.progress += _TICK_S / step_s
        worker.context += len(worker.rows) * (worker.progress - begin)
        while worker.rows and worker.rows[0][0] <= worker.progress:
            end, _, request = heapq.heappop(worker.rows)
            worker.context -= request.num_prompt_tokens + request.num_output_tokens + (worker.progress - end)
            end_s = self._now - (worker.progress - end) * step_s
            per_token_s = (end_s - request.adopted_s) / request.num_output_tokens
            met = per_token_s <= (self._objectives.tpot_s or float("inf"))
            self._count("decode", met=met)
            minute = self._minute(request.arrival_s)
            minute.num_kept += met and request.first_s - request.arrival_s <= request.limit_s
            self._answers.append(AnswerLengths(request.num_prompt_tokens, 0, request.num_output_tokens))

    def _adopt(self, request: Request) -> bool:
        able = [w for w in self._workers if w.pool == "decode" and not w.is_leaving and w.ready_s <= self._now]
        held = request.num_prompt_tokens + request.num_output_tokens
        able = [
            worker
            for worker in able
            if worker.context + held <= self._limits.kv_tokens and len(worker.rows) < self._limits.max_num_seqs
        ]
        if not able:
            return False
        worker = min(able, key=lambda w: w.context)
        self._number += 1
        heapq.heappush(worker.rows, (worker.progress + request.num_output_tokens, self._number, request))
        worker.context += request.num_prompt_tokens
        waited_s = self._now - request.first_s
        request.adopted_s = self._now if waited_s <= _TICK_S else request.first_s  # a tick is nobody's wait
        return True

    # --- the fleet --------------------------------------------------------------------------------------------------

    def _minute(self, at_s: float) -> Minute:
        return self.minutes[min(len(self.minutes) - 1, int((at_s - self.minutes[0].start_s) // 60))]

    def _count(self, pool: str, *, met: bool) -> None:
        self._kept[pool][0] += met
        self._kept[pool][1] += 1

    def _add(self, pool: Pool, ready_s: float) -> None:
        self._workers.append(Worker(f"{pool[0]}-{self._num_made}", pool, ready_s))
        self._num_made += 1

    def _snapshot(self) -> LoadSnapshot:
        members = tuple(self._member(worker) for worker in self._workers)
        load = LoadSnapshot(
            now_s=self._now,
            interval_s=_DECIDE_EVERY_S,
            week_s=self._now,
            prompts=tuple(self._prompts),
            answers=tuple(self._answers),
            members=members,
            limits=self._limits,
            queued_tokens=sum(request.num_prompt_tokens for request in self._queue),
            ttft=Kept(*self._kept["prefill"]),
            tpot=Kept(*self._kept["decode"]),
            start_s=self._start_s,
        )
        self._prompts, self._answers = [], []
        self._kept = {"prefill": [0, 0], "decode": [0, 0]}
        return load

    def _member(self, worker: Worker) -> Member:
        state = MemberState.READY if worker.ready_s <= self._now else MemberState.PENDING
        if worker.is_leaving:
            state = MemberState.DRAINING
        load = worker.context + 1000.0 * (worker.busy_until_s > self._now)
        return Member(worker.worker_id, worker.pool, state, load)

    def _apply(self, decision: ScaleDecision) -> None:
        self._minute(self._now - _TICK_S).counts.append((decision.prefill, decision.decode))
        by_id = {worker.worker_id: worker for worker in self._workers}
        before = sum(not worker.is_leaving for worker in self._workers)
        for worker_id, pool in decision.flips:
            worker = by_id[worker_id]
            worker.pool, worker.ready_s = pool, self._now + _ROLE_CHANGE_S
        for worker_id in decision.removals:
            by_id[worker_id].is_leaving = True
        for pool, count in (("prefill", decision.additions.prefill), ("decode", decision.additions.decode)):
            for _ in range(count):
                self._add(pool, self._now + self._start_s)
        after = sum(not worker.is_leaving for worker in self._workers)
        if after != before:
            self.changes.of_total.append((self._now, before, after))
        self.changes.num_flips += len(decision.flips)
        self.changes.num_added += decision.additions.total
        self.changes.num_removed += len(decision.removals)
