"""Step times of a worker's engine: a roofline of published figures, or what a live worker was seen to take.

    a step computes prompt chunks and decode rows together, its kernels one after the other:
        products     of all tokens with the weights: arithmetic, or reading the weights once, whichever takes longer;
                     of weights in 4 or 8 bits on a GPU reading them for each 16 rows, or widening them before
        attention    of prompts: arithmetic on every pair of tokens; of decode rows: reading every attended token's KV
        exchange     sums over the GPUs that share the model: their bytes, and a constant for each; ways to experts
        launches     a constant

Attention of prompts and of rows are kernels of their own that do not overlap: POD-Attention (ASPLOS'25), section 2,
shows that of the engines of its time, and builds the one that would.

A run of decode steps with the same rows grows by one token of context a row and step, so its steps' times are an
arithmetic series (`run`): a thousand steps cost what one costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ..common.errors import ConfigError
from ..models.quantization import CARD_ROWS
from .hardware import Gpu
from .shapes import ModelShape

# What the host takes to launch attention layer by layer, in place of a graph, where reading keys and values for each
# drafted token would take longer (`engine/cuda/rows.py`). Not measured on a card.
_LAUNCHED_S = 1.5e-3
_MEMORY_SHARE = 0.9  # of a GPU's memory, as `--gpu-memory-utilization`


@dataclass(slots=True, frozen=True)
class StepWork:
    """The work of one step, as `StepSample` counts it, and drafts."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    draft_tokens: int = 0  # that decode rows verify beside their own next ones


class Terms(NamedTuple):
    """Seconds of a step by what takes them."""

    products: float  # with weights
    weights: float  # to read them, meanwhile
    attention: float  # of prompts
    cache: float  # decode rows' keys and values
    exchange: float  # between the GPUs that share the model
    launches: float

    @property
    def total_s(self) -> float:
        return self.launches + max(self.products, self.weights) + self.attention + self.cache + self.exchange

    @property
    def binding(self) -> str:
        """Return the name of the term that takes most."""
        return max(zip(self._fields, self, strict=True), key=lambda term: term[1])[0]


class StepModel(Protocol):
    """Seconds of steps. Pure: noise is the engine's."""

    @property
    def noise(self) -> float:
        """Standard deviation of a step's time, as a share of it; 0: none."""
        ...

    def step_s(self, work: StepWork) -> float: ...

    def run(self, rows: int, context: int) -> tuple[float, float]:
        """Decode steps of `rows`, the first of which attends to `context` tokens in all: its time, and what each later
        one takes more than the one before it.
        """
        ...


@dataclass(slots=True)
class Roofline:
    """`num_gpus` of one kind share a model by tensor parallelism."""

    gpu: Gpu
    model: ModelShape
    num_gpus: int
    noise: float = 0.0
    memory_share: float = _MEMORY_SHARE
    _reads: dict[int, float] = field(default_factory=dict)  # seconds to read the weights, by tokens of a step
    _s_per_token: float = field(init=False)  # of the products with weights
    _s_per_row: float = field(init=False)  # more, of a row that samples: the head's
    _s_per_pair: float = field(init=False)  # a prompt's token attends to another
    _s_per_context: float = field(init=False)  # a decode row attends to a token: read its KV, multiply meanwhile
    _s_to_widen: float = field(init=False)  # weights in 4 or 8 bits, where a step has many tokens
    _s_per_token_of_many: float = field(init=False)  # of the products, where some are of whole numbers then
    _s_per_exchange: float = field(init=False)  # of a token
    _s_per_row_exchange: float = field(init=False)  # more, of a decode row whose experts are on other GPUs
    _fixed_s: float = field(init=False)  # of a step: launches, and sums over ranks however short

    def __post_init__(self) -> None:
        if self.cache_bytes <= 0:
            need, have = self.model.kept_bytes / 1e9, self.num_gpus * self.gpu.memory_gb
            machine = f"{self.num_gpus} x {self.gpu.name} have {have:,.0f} GB, {self.memory_share:.3g} of it to be used"
            beside = f"what steps need beside takes {self.model.reserve_bytes / 1e9:,.3g} GB of each"
            raise ConfigError(f"{self.model.name} has {need:,.3g} GB of weights; {machine}; {beside}")
        model, gpu = self.model, self.gpu
        flops = self.num_gpus * gpu.flops(model.mfu, float8=model.is_float8)
        attention_flops = self.num_gpus * gpu.flops() * gpu.attention_share  # attention computes in BF16
        self._s_per_token = 2 * (model.active_params - model.head_params) / flops
        in_int8 = self.num_gpus * gpu.flops(model.mfu, int8=True)
        self._s_per_token_of_many = self._s_per_token - 2 * model.int8_params * (1 / flops - 1 / in_int8)
        self._s_per_row = 2 * model.head_params / flops
        self._s_per_pair = model.prefill_flops_per_pair / attention_flops
        read_s = model.kv_bytes_per_token * model.read_share / (self.num_gpus * gpu.bytes_per_s)
        self._s_per_context = max(read_s, model.decode_flops_per_pair / attention_flops)
        self._s_to_widen = model.widened_bytes / (self.num_gpus * gpu.bytes_per_s) if gpu.nibble_rows else 0.0
        self._s_per_exchange = model.exchanged_bytes / (gpu.nvlink_gb_per_s * 1e9)
        self._s_per_row_exchange = model.row_exchange_s / self.num_gpus
        self._fixed_s = model.kernels_s + model.num_sums * gpu.sum_s

    @property
    def cache_bytes(self) -> float:
        """Return the bytes that the weights leave for KV, on all of the worker's GPUs."""
        usable = self.num_gpus * (self.gpu.memory_gb * 1e9 * self.memory_share - self.model.reserve_bytes)
        return usable - self.model.kept_bytes

    def num_blocks(self, block_tokens: int) -> int:
        return int(self.cache_bytes // (self.model.kv_bytes_per_token * block_tokens))

    def _read_s(self, num_tokens: int) -> float:
        read_s = self._reads.get(num_tokens)
        if read_s is None:
            count, model, gpu = self.model.bytes_read(num_tokens), self.model, self.gpu
            if gpu.nibble_rows and num_tokens <= CARD_ROWS:
                count += model.nibble_bytes * (max(1.0, num_tokens / gpu.nibble_rows) / gpu.nibble_share - 1)
            read_s = count / (self.num_gpus * gpu.bytes_per_s)
            self._reads[num_tokens] = read_s
        return read_s

    def _products_s(self, num_tokens: int, num_rows: int) -> float:
        if num_tokens > CARD_ROWS:
            return num_tokens * self._s_per_token_of_many + num_rows * self._s_per_row + self._s_to_widen
        return num_tokens * self._s_per_token + num_rows * self._s_per_row

    def terms(self, work: StepWork) -> Terms:
        rows = work.decode_rows + work.draft_tokens
        tokens = work.prefill_tokens + rows  # prompts' and rows' tokens share one read of the weights
        return Terms(
            products=self._products_s(tokens, rows),
            weights=self._read_s(tokens),
            attention=work.prefill_pairs * self._s_per_pair,
            cache=work.decode_context * self._s_per_context + self._read_again_s(work),
            exchange=self._fixed_s - self.model.kernels_s + self._exchange_s(tokens, rows),
            launches=self.model.kernels_s,
        )

    def step_s(self, work: StepWork) -> float:
        """Return `terms(work).total_s`, in a third of the time: a simulation asks for millions."""
        rows = work.decode_rows + work.draft_tokens
        tokens = work.prefill_tokens + rows
        products_s = max(self._products_s(tokens, rows), self._read_s(tokens))
        attention_s = work.prefill_pairs * self._s_per_pair + work.decode_context * self._s_per_context
        if work.draft_tokens:
            attention_s += self._read_again_s(work)
        return self._fixed_s + products_s + attention_s + self._exchange_s(tokens, rows)

    def _read_again_s(self, work: StepWork) -> float:
        """Return what it takes that drafted tokens read the keys and values of their rows, too."""
        again = work.decode_context * work.draft_tokens / max(1, work.decode_rows)
        return min(again * self._s_per_context, _LAUNCHED_S)

    def _exchange_s(self, tokens: int, rows: int) -> float:
        return tokens * self._s_per_exchange + rows * self._s_per_row_exchange

    def run(self, rows: int, context: int) -> tuple[float, float]:
        return self.step_s(StepWork(decode_rows=rows, decode_context=context)), rows * self._s_per_context


@dataclass(slots=True, frozen=True)
class Linear:
    """Measured: a constant of each kind of step, and so much for each token, pair, row and token of context."""

    step: float
    mixed: float  # more, where a prompt is computed along
    per_token: float
    per_pair: float
    per_row: float
    per_context: float
    noise: float = 0.0

    def step_s(self, work: StepWork) -> float:
        prefill_s = 0.0
        if work.prefill_tokens:
            prefill_s = self.mixed + work.prefill_tokens * self.per_token + work.prefill_pairs * self.per_pair
        rows = work.decode_rows + work.draft_tokens  # a drafted token is multiplied as another row's would be
        return self.step + prefill_s + rows * self.per_row + work.decode_context * self.per_context

    def run(self, rows: int, context: int) -> tuple[float, float]:
        return self.step + rows * self.per_row + context * self.per_context, rows * self.per_context
