"""A worker's figures: its memory, its steps and its prompts, as bounds and as expected, and what binds each.

    Sizer(engine, model, gpu, context)  ->  .memory()  .decode(rows)  .prompt(tokens)  .batch(tpot_s)  .handoff(…)

A bound is what the hardware's published peaks allow, and nothing can be faster; what is expected takes the shares of
the peaks that `hardware.py` assumes, kernels and sums over ranks however short included. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..common.config import EngineConfig, ExpertExchange
from ..common.errors import ConfigError
from ..models.config import ModelConfig
from .cpu import CpuSteps
from .hardware import Gpu
from .memory import block_tokens, cache_token_bytes, handed_blocks, handoff_bytes, last_handoff_bytes
from .shapes import ModelShape, shape_of
from .steps import Roofline, StepWork, Terms
from .weights import item_bytes
from .work import exchanged_bytes


@dataclass(slots=True, frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    workspace: int  # a step's arrays, kernels' own room, what the runtime takes
    cache: int
    cache_token: int  # of one token's keys and values
    num_blocks: int
    num_tokens: int
    num_contexts: float  # sequences of the context's length that fit as handoffs bring them, in blocks of their own
    num_own_contexts: float  # that fit where their worker computes them, and keeps what no window reaches any more
    binding: str  # what takes most: weights, workspace, KV


@dataclass(slots=True, frozen=True)
class Time:
    """A step's, or a prompt's, seconds."""

    bound_s: float
    expected_s: float
    binding: str  # the term that takes most of what is expected: `Terms`


@dataclass(slots=True, frozen=True)
class Batch:
    """The most rows that a decode worker's steps may have."""

    num_rows: int
    binding: str  # TPOT objective, KV cache, max_num_seqs


@dataclass(slots=True, frozen=True)
class Handoff:
    """One prompt's keys and values on their way to a decode worker."""

    num_bytes: int  # to all of its ranks
    link_s: float  # on the links of all ranks at once
    exposed_s: float  # of it, behind the computation: layers are shipped while others are computed
    binding: str  # compute, link


class Sizer:
    """Sizes one worker: a model in a layout on so many GPUs of a kind, near so many tokens of context."""

    def __init__(self, engine: EngineConfig, model: ModelConfig, gpu: Gpu, context: int) -> None:
        """Raises ConfigError where the ranks cannot share the model, or the weights do not fit."""
        model.check_tp_size(engine.tensor_parallel_size, whole_experts=engine.enable_expert_parallel)
        if context > (longest := engine.max_model_len or model.longest_model_len):
            raise ConfigError(f"context: {context:,} tokens are more than the model's {longest:,}")
        self.engine, self.model, self.gpu, self.context = engine, model, gpu, context
        self.steps = self._roofline(gpu, shape_of(engine, model, gpu, context))

    def _roofline(self, gpu: Gpu, shape: ModelShape) -> Roofline:
        share = 1.0 if gpu.is_cpu else self.engine.gpu_memory_utilization
        num_ranks = self.engine.tensor_parallel_size
        if gpu.rates is not None:
            return CpuSteps(gpu, shape, num_ranks, memory_share=share, rates=gpu.rates)
        return Roofline(gpu, shape, num_ranks, memory_share=share)

    @cached_property
    def _bound(self) -> Roofline:
        peak = self.gpu.at_peak  # another in its rates alone: the shape, which takes long to count, is the same
        return self._roofline(peak, replace(self.shape, kernels_s=self.shape.num_layers * peak.layer_s))

    @property
    def shape(self) -> ModelShape:
        return self.steps.model

    def memory(self) -> Memory:
        shape, num_ranks = self.shape, self.engine.tensor_parallel_size
        block_size = block_tokens(self.engine, self.model)
        num_blocks = self.steps.num_blocks(block_size)
        token = cache_token_bytes(self.engine, self.model)
        parts = {
            "weights": round(shape.kept_bytes / num_ranks),
            "workspace": round(shape.reserve_bytes),
            "KV": num_blocks * block_size * token,
        }
        return Memory(
            weights=parts["weights"],
            workspace=parts["workspace"],
            cache=parts["KV"],
            cache_token=token,
            num_blocks=num_blocks,
            num_tokens=num_blocks * block_size,
            num_own_contexts=num_blocks / -(-self.context // block_size),
            num_contexts=num_blocks / handed_blocks(self.engine, self.model, self.context),
            binding=max(parts, key=lambda part: parts[part]),
        )

    def decode(self, num_rows: int) -> Time:
        """Return the time of a step of so many rows at the context."""
        work = StepWork(decode_rows=num_rows, decode_context=num_rows * self.context)
        terms = self.steps.terms(work)
        return Time(self._bound.step_s(work), terms.total_s, terms.binding)

    def prompt(self, num_tokens: int) -> Time:
        """Return the time of a prompt alone on a worker, in chunks of the largest step."""
        terms = self._prompt_terms(self.steps, num_tokens)
        return Time(self._prompt_terms(self._bound, num_tokens).total_s, terms.total_s, terms.binding)

    def _prompt_terms(self, steps: Roofline, num_tokens: int) -> Terms:
        chunk = self.engine.max_num_batched_tokens
        works = [
            StepWork(size := min(chunk, num_tokens - done), size * done + size * (size + 1) // 2)
            for done in range(0, num_tokens, chunk)
        ]
        return Terms(*map(sum, zip(*map(steps.terms, works), strict=True)))

    def batch(self, tpot_s: float) -> Batch:
        """Return the most rows at the context whose step keeps the objective; one row, if none does."""
        limits = {
            "KV cache": int(self.memory().num_contexts),
            "max_num_seqs": self.engine.max_num_seqs,
        }
        binding = min(limits, key=lambda limit: limits[limit])
        most = max(1, limits[binding])
        if self.decode(most).expected_s <= tpot_s:
            return Batch(most, binding)
        if self.decode(1).expected_s > tpot_s:
            return Batch(1, "TPOT objective, which no batch keeps")
        low, high = 1, most  # low keeps it, high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.decode(middle).expected_s <= tpot_s else (low, middle)
        return Batch(low, "TPOT objective")

    def handoff(self, num_tokens: int, link_bytes_per_s: float) -> Handoff:
        """Return what a prompt's handoff takes over links of such a rate, one for each rank: of whole blocks, all but
        what nobody reads any more.
        """
        num_ranks, layers = self.engine.tensor_parallel_size, self.model.num_layers
        num_bytes = num_ranks * handoff_bytes(self.engine, self.model, num_tokens)
        link_s, prompt_s = num_bytes / num_ranks / link_bytes_per_s, self.prompt(num_tokens).expected_s
        behind_s = last_handoff_bytes(self.engine, self.model, num_tokens) / link_bytes_per_s
        exposed_s = max(behind_s, link_s - prompt_s * (layers - 1) / layers)
        return Handoff(num_bytes, link_s, exposed_s, "link" if link_s > prompt_s else "compute")

    def exchanged_bytes(self, num_tokens: int, exchange: ExpertExchange | None = None) -> float:
        """Return the bytes that each rank sends to the others in a step of so many tokens. None: as it is served."""
        engine, exchange = self.engine, exchange or self.engine.expert_exchange
        item = item_bytes(engine, self.model)
        return exchanged_bytes(num_tokens, engine.tensor_parallel_size, item, self.model, exchange)
