"""Sizing says how many workers a load needs, from the distribution of its lengths and the fleet's step times.

Prefill is a queue of N servers. Its service times are those of the sampled prompts, so a few long ones among many
short ones count as what they are: by their variance (Pollaczek and Khinchine, with Erlang's C for N servers, as Allen
and Cunneen combine them). Each prompt is held against the objective of its class, and each class has its share in time.

Decode is a crowd. By Little's law rate x length x step time sequences run at once, and as their number is that of a
queue without waiting (M/G/infinity), it scatters as Poisson's, and their KV as shot noise (Campbell). N workers are
enough when a step with an unlucky share of the crowd keeps the strictest objective in it and fits the cache.

Where one pool does both, workers share their time: steps of rows take as much longer as prompts take of it, and
prompts get what rows leave that keep their pace.

Everything here is deterministic: the same load gives the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from ...common.kv_spec import KVCacheSpec
from ...kvcache.frames import handed_frames
from ..state.objectives import Objectives, filled_step_s
from .scale_types import AnswerLengths, StepTimes, WorkerLimits

MOST_WORKERS = 4096  # where the search for a number ends
_MAX_UTILIZATION = 0.97  # from there on the queue is taken to grow without end; larger plans fuller workers
_MAX_KV_USAGE = 0.95  # of a cache, that is planned for; larger leaves no room for what the lengths do not tell
_FULL_SHARE = 0.1  # of the misses that are allowed: how often a cache may be full; larger plans fewer workers
_DEFAULT_TTFT_S = 1.0  # where the operator set no objective; smaller plans more prefill workers
_DEFAULT_TPOT_S = 0.05  # where the operator set no objective; smaller plans more decode workers
_LEAST_STRETCH = 1.25  # of a step with one row, as no fleet makes tokens come faster; nearer to 1 plans rows alone
_ROUNDS = 30  # at most, until step time and crowd agree
_TOLERANCE = 1e-3  # relative change of the step time that ends the rounds

_Numbers = npt.NDArray[np.float64]


def erlang_c(num_servers: int, offered: float) -> float:
    """The chance that an arrival finds all servers busy; `offered`: arrivals per mean service time."""
    if offered >= num_servers:
        return 1.0
    blocked = 1.0  # Erlang's B, by its recursion over servers
    for servers in range(1, num_servers + 1):
        blocked = offered * blocked / (servers + offered * blocked)
    return blocked / (1.0 - offered / num_servers * (1.0 - blocked))


@dataclass(slots=True, frozen=True, eq=False)
class PrefillLoad:
    """Prompts as work: what they take of a worker, and how long each may wait."""

    mean_s: float  # of what a prompt takes
    variation: float  # of that: its variance, over the square of the mean
    slack_s: tuple[_Numbers, ...]  # by class: of each one's objective, after its own time
    alone_s: tuple[_Numbers, ...]  # by class: each one's own time
    mean_tokens: float  # of whole prompts, cached tokens included

    @classmethod
    def from_answers(
        cls, answers: Sequence[AnswerLengths], times: StepTimes, limits: WorkerLimits, objectives: Objectives
    ) -> PrefillLoad:
        if not answers:
            return cls(0.0, 0.0, (), (), 0.0)
        prompts, cached = _fields(answers, "num_prompt_tokens", "num_cached_tokens")
        new = np.maximum(1.0, prompts - cached)
        new_tokens, contexts = (each.astype(int).tolist() for each in (new, cached))
        alone_s = np.array(list(map(times.prefill_s, new_tokens, contexts)), np.float64)
        work_s = np.maximum(0.25 * alone_s, alone_s - _saved_s(round(float(new.mean())), times, limits))
        mean_s = float(work_s.mean())
        by_class = _by_class(alone_s, [a.objectives for a in answers])
        return cls(
            mean_s,
            max(0.0, float((work_s * work_s).mean()) / (mean_s * mean_s) - 1.0),
            tuple(_slack_s(own, objectives, theirs) for own, theirs in by_class.items()),
            tuple(by_class.values()),
            float(prompts.mean()),
        )

    def kept(self, rate: float, num_workers: int, time_share: float = 1.0) -> float:
        """The share of the worst class's prompts that start in time; 0 where the queue grows without end.

        `time_share`: of their time that workers have for prompts.
        """
        if time_share <= 0:
            return 0.0
        mean_s, longer = self.mean_s / time_share, 1.0 / time_share - 1.0
        offered = rate * mean_s
        utilization = offered / num_workers if num_workers else math.inf
        if utilization >= _MAX_UTILIZATION:
            return 0.0
        waiting = erlang_c(num_workers, offered)
        wait_s = 0.5 * (1.0 + self.variation) * mean_s / (num_workers * (1.0 - utilization))
        slacks = (slack_s - longer * alone_s for slack_s, alone_s in zip(self.slack_s, self.alone_s, strict=True))
        return 1.0 - waiting * max(float(np.exp(np.maximum(0.0, each) / -wait_s).mean()) for each in slacks)

    def needed(self, rate: float, target: float) -> int:
        if not self.slack_s or rate <= 0:
            return 0
        floor = max(1, math.ceil(rate * self.mean_s))
        return _least(floor, lambda count: self.kept(rate, count) >= target)


def _fields(answers: Sequence[AnswerLengths], *names: str) -> _Numbers:
    """Return a row for each of these fields, with what all answers have there."""
    return np.stack([np.fromiter(map(attrgetter(name), answers), np.float64, len(answers)) for name in names])


def _by_class(numbers: _Numbers, classes: Sequence[Objectives | None]) -> dict[Objectives | None, _Numbers]:
    """Return the numbers of each class, in their order."""
    different = dict.fromkeys(classes)
    if len(different) == 1:
        return dict.fromkeys(different, numbers)
    return {own: numbers[np.array([each is own or each == own for each in classes])] for own in different}


def _slack_s(own: Objectives | None, default: Objectives, alone_s: _Numbers) -> _Numbers:
    """Return how long prompts of a class may wait that take `alone_s`; without end where it sets no limit."""
    ttft_s, stretch = (default.ttft_s, default.ttft_stretch) if own is None else (own.ttft_s, own.ttft_stretch)
    if ttft_s is None:
        ttft_s = _DEFAULT_TTFT_S if own is None else math.inf
    return np.maximum(ttft_s, stretch * alone_s) - alone_s


def _saved_s(mean_new: int, times: StepTimes, limits: WorkerLimits) -> float:
    """Return what a prompt saves because a busy worker fills its steps: the fixed part of a step, shared."""
    together = limits.max_num_batched_tokens / max(1, mean_new)
    fixed_s = 2.0 * times.prefill_s(mean_new, 0) - times.prefill_s(2 * mean_new, 0)
    return max(0.0, fixed_s) * (1.0 - 1.0 / together) if together > 1.0 else 0.0


@dataclass(slots=True, frozen=True)
class DecodeLoad:
    """Answers as a crowd of running sequences."""

    mean_output: float  # row-steps: tokens of all choices
    mean_square_output: float  # choices of an answer run side by side, so their rows come and go together
    mean_held: float  # token-steps of KV: each generated token reads the context before it
    mean_square_held: float
    # Token-steps of what caches keep of that: choices share their prompt, handoffs leave out what windows do not reach.
    mean_kept: float
    mean_square_kept: float
    times: StepTimes
    limits: WorkerLimits
    longest_step_s: float  # by the strictest objective, as answers of all classes share steps

    @classmethod
    def from_answers(
        cls, answers: Sequence[AnswerLengths], times: StepTimes, limits: WorkerLimits, objectives: Objectives
    ) -> DecodeLoad:
        count = max(1, len(answers))
        prompts, outputs, choices = _fields(answers, "num_prompt_tokens", "num_output_tokens", "num_choices")
        num_steps = outputs / choices
        held, squares = _held(choices * prompts, choices, num_steps)
        kept, kept_squares = _held(_kept(prompts, limits.spec), choices, num_steps)
        num_outputs = float(outputs.sum())
        classes = {a.objectives for a in answers if a.num_output_tokens}
        wanted = min((_tpot_s(own, objectives) for own in classes), default=_DEFAULT_TPOT_S)
        possible = _LEAST_STRETCH * times.decode_step_s(1, round(held / max(1, num_outputs)))
        longest_s = max(filled_step_s(wanted), possible)
        return cls(
            num_outputs / count,
            float((choices * outputs).sum()) / count,
            held / count,
            squares / count,
            kept / count,
            kept_squares / count,
            times,
            limits,
            longest_s,
        )

    def fits(self, rate: float, num_workers: int, target: float, time_share: float = 1.0) -> bool:
        """Return whether a step keeps the objective, and the KV fits the cache, in all but 1 - `target` of the time.

        `time_share`: of their time that workers have for rows.
        """
        if time_share <= 0:
            return False
        step_s = self.times.decode_step_s(1, 0) / time_share
        for _ in range(_ROUNDS):
            rows, context = rate * self.mean_output * step_s, rate * self.mean_held * step_s
            slower_s = self._step_s(rows / num_workers, context / num_workers) / time_share
            if slower_s > self.longest_step_s:
                return False
            if slower_s - step_s < _TOLERANCE * step_s:
                break
            step_s = slower_s
        row_sigma = math.sqrt(rate * self.mean_square_output * step_s)
        context_sigma = math.sqrt(rate * self.mean_square_held * step_s)
        # A full cache costs more than slow steps: who waits for room makes the next ones wait too.
        rare = NormalDist().inv_cdf(1.0 - (1.0 - target) * _FULL_SHARE)
        kept, kept_sigma = rate * self.mean_kept * step_s, math.sqrt(rate * self.mean_square_kept * step_s)
        room = num_workers * self.limits.kv_tokens * _MAX_KV_USAGE
        if kept + rare * kept_sigma > room or rows + rare * row_sigma > num_workers * self.limits.max_num_seqs:
            return False
        sigmas = NormalDist().inv_cdf(target)
        rows, context = rows + sigmas * row_sigma, context + sigmas * context_sigma
        return self._step_s(rows / num_workers, context / num_workers) / time_share <= self.longest_step_s

    def least_share(self, rate: float, num_workers: int) -> float:
        """Return what part of their time workers need for rows that come as slowly as the objective lets them."""
        if math.isinf(self.longest_step_s):
            return 0.0
        rows, context = (rate * each * self.longest_step_s / num_workers for each in (self.mean_output, self.mean_held))
        return min(1.0, rows) * self._step_s(rows, context) / self.longest_step_s

    def _step_s(self, rows: float, context: float) -> float:
        return self.times.decode_step_s(max(1, math.ceil(rows)), math.ceil(context))

    def needed(self, rate: float, target: float) -> int:
        if self.mean_output <= 0 or rate <= 0:
            return 0
        return _least(1, lambda count: self.fits(rate, count, target))


def needed_of_both(
    prompts: PrefillLoad, crowd: DecodeLoad, prompt_rate: float, answer_rate: float, target: float
) -> int:
    """Return how many workers are enough that compute prompts beside their rows."""
    if crowd.mean_output <= 0 or answer_rate <= 0:
        return prompts.needed(prompt_rate, target)

    def is_enough(count: int) -> bool:
        left = 1.0 - prompt_rate * prompts.mean_s / count
        if not crowd.fits(answer_rate, count, target, left):
            return False
        return prompts.kept(prompt_rate, count, 1.0 - crowd.least_share(answer_rate, count)) >= target

    return _least(max(1, math.ceil(prompt_rate * prompts.mean_s)), is_enough)


def _held(contexts: _Numbers, growth: _Numbers, num_steps: _Numbers) -> tuple[float, float]:
    """Return the integrals, over all answers' steps, of the context that each one holds and of its square.

    `contexts`: at an answer's first step. `growth`: tokens of each step.
    """
    grown = growth * num_steps
    held = num_steps * (contexts + grown / 2)
    squares = num_steps * (contexts * contexts + contexts * grown + grown * grown / 3)
    return float(held.sum()), float(squares.sum())


def _kept(prompts: _Numbers, spec: KVCacheSpec | None) -> _Numbers:
    """Return as how many tokens of whole blocks prompts lie in the cache that they are handed to."""
    if spec is None or not spec.windows:
        return prompts
    lengths = prompts.astype(int).tolist()
    frames = [handed_frames(spec, spec.num_blocks_for(length), length) for length in lengths]
    return np.minimum(prompts, np.array(frames, np.float64) * spec.block_size)


def _tpot_s(own: Objectives | None, default: Objectives) -> float:
    """Return the time per token that a class's answers are to keep; infinite for one that sets none."""
    if own is None:
        return default.tpot_s if default.tpot_s is not None else _DEFAULT_TPOT_S
    return math.inf if own.tpot_s is None else own.tpot_s


def _least(start: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest count from `start` on that is enough: steps that double, then halves of the last one."""
    high, step = start, 1
    while high < MOST_WORKERS and not is_enough(high):
        high, step = high + step, step * 2
    low = high if step == 1 else high - step // 2 + 1
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return min(high, MOST_WORKERS)
