"""What a fleet's queues are made of, its requests and workers, and what is recorded of each minute and of its size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

from kvferry.router.autoscaler.scale_types import Pool
from kvferry.sizing.steps import StepModel, StepWork


class ModelTimes:
    """A step model as the autoscaler asks for it."""

    def __init__(self, model: StepModel) -> None:
        self.model = model
        self.prefill_s = cache(self._prefill_s)  # it is asked for the same recent prompts at every decision

    def _prefill_s(self, new_tokens: int, context: int) -> float:
        return self.model.step_s(StepWork(new_tokens, new_tokens * (context + new_tokens // 2)))

    def decode_step_s(self, rows: int, context: int) -> float:
        return self.model.step_s(StepWork(decode_rows=rows, decode_context=context))


@dataclass(slots=True, eq=False)
class Request:
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    limit_s: float = 0.0  # to the first token
    first_s: float = 0.0
    adopted_s: float = 0.0  # when it began to decode, or to wait for that


@dataclass(slots=True, eq=False)
class Worker:
    """One worker's life. The same one may compute prompts and still finish answers of its former role."""

    worker_id: str
    pool: Pool
    ready_s: float
    is_leaving: bool = False
    busy_until_s: float = -math.inf
    progress: float = 0.0  # tokens that each running sequence has got, since the worker began
    context: float = 0.0  # tokens held
    rows: list[tuple[float, int, Request]] = field(default_factory=list)  # heap: (progress at its end, number, request)


@dataclass(slots=True)
class Minute:
    """What one minute saw."""

    start_s: float
    num_arrived: int = 0
    num_kept: int = 0
    gpu_s: float = 0.0
    counts: list[tuple[int, int]] = field(default_factory=list)  # (prefill, decode) wanted, at each decision
    prompts: list[tuple[float, int]] = field(default_factory=list)  # (arrival, tokens)
    crowd: list[tuple[float, float, float]] = field(default_factory=list)  # (rows, context, step_s) at each tick


@dataclass(slots=True)
class Changes:
    """Of the whole fleet's size, to find oscillation: (when, workers before, after)."""

    of_total: list[tuple[float, int, int]] = field(default_factory=list)
    num_flips: int = 0
    num_added: int = 0
    num_removed: int = 0
