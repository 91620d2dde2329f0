"""The least workers for each minute, with perfect knowledge of its requests and without any time to start or stop.

    prefill   a replay of the minute's prompts against N free workers: enough of them in time
    decode    the crowd that ran in that minute, as large as it would be at the speed of N workers, spread evenly

A bound from below: nothing is carried over between minutes, no answer is on an unlucky worker, and what a real fleet
holds ready for the next second costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable

from kvferry.benchmarks.autoscale.fleet import FILL_TOKENS
from kvferry.benchmarks.autoscale.records import Minute, ModelTimes
from kvferry.router.autoscaler.scale_types import Counts, WorkerLimits
from kvferry.router.state.objectives import Objectives
from kvferry.sizing.steps import StepWork

_PARTS = 6  # of a minute: an objective for the mean of an answer is held against about ten seconds
_ROUNDS = 20


class Oracle:
    """Asked for one minute after the other: each search begins at the answer before it."""

    def __init__(self, times: ModelTimes, limits: WorkerLimits, objectives: Objectives, target: float) -> None:
        self._times = times
        self._limits = limits
        self._objectives = objectives
        self._target = target
        self._last = Counts(1, 1)

    def least(self, minute: Minute) -> Counts:
        prompts = [(at_s, size, self._limit_s(size)) for at_s, size in minute.prompts]
        self._last = Counts(
            _least(lambda count: self._prompts_kept(prompts, minute.start_s, count), self._last.prefill),
            _least(lambda count: self._crowd_fits(minute.crowd, count), self._last.decode),
        )
        return self._last

    def _limit_s(self, size: int) -> float:
        return self._objectives.ttft_limit_s(self._times.prefill_s(size, 0)) or math.inf

    def _prompts_kept(self, prompts: list[tuple[float, int, float]], start_s: float, num_workers: int) -> bool:
        free, queue, kept = [start_s] * num_workers, deque(prompts), 0
        while queue:
            begin_s = max(heapq.heappop(free), queue[0][0])
            tokens = pairs = 0
            batch: list[float] = []  # when each has to be done
            while queue and queue[0][0] <= begin_s and (not batch or tokens + queue[0][1] <= FILL_TOKENS):
                at_s, size, limit_s = queue.popleft()
                if begin_s < at_s + limit_s:
                    batch.append(at_s + limit_s)
                    tokens, pairs = tokens + size, pairs + size * size // 2
            end_s = begin_s + (self._times.model.step_s(StepWork(tokens, pairs)) if batch else 0.0)
            heapq.heappush(free, end_s)
            kept += sum(end_s <= due_s for due_s in batch)
        return bool(kept >= self._target * len(prompts))

    def _crowd_fits(self, crowd: list[tuple[float, float, float]], num_workers: int) -> bool:
        part = max(1, len(crowd) // _PARTS)
        return all(self._part_fits(crowd[start : start + part], num_workers) for start in range(0, len(crowd), part))

    def _part_fits(self, ticks: list[tuple[float, float, float]], num_workers: int) -> bool:
        rows, context, seen_s = (sum(column) / len(ticks) for column in zip(*ticks, strict=True))
        if rows <= 0:
            return True
        step_s = seen_s
        for _ in range(_ROUNDS):  # slower steps, more of them at once
            scale = step_s / seen_s / num_workers
            slower_s = self._times.decode_step_s(max(1, round(rows * scale)), round(context * scale))
            if slower_s > (self._objectives.tpot_s or math.inf):
                return False
            step_s = slower_s
        scale = step_s / seen_s / num_workers
        return bool(rows * scale <= self._limits.max_num_seqs and context * scale <= self._limits.kv_tokens)


def _least(is_enough: Callable[[int], bool], hint: int) -> int:
    """The smallest count that is enough, searched for in growing steps from the hint."""
    low, high, step = 0, max(1, hint), 1
    while not is_enough(high):
        low, high, step = high, high + step, step * 2
    step = 1
    while low < high - 1 and low == 0:
        trial = max(1, high - step)
        if not is_enough(trial):
            low = trial
        else:
            high, step = trial, step * 2
        if high == 1:
            break
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
