"""One tensor-parallel rank's engine: weights, pages, attention and sampling behind `step`.

    Batch -> StepPlan (plain arrays; rank 0 sends it to the other ranks) -> block copies -> forward -> logits of the
    rows that need them -> tokens (rank 0 alone) -> StepOutput

A whole model in bfloat16 on a CPU runs in native code where that can be had, all others in torch; on CUDA
`cuda_runner` runs and samples, decode steps from the batch itself.
The engine reads Sequences and changes none of them: the scheduler does, from the StepOutput. It knows neither
requests' ends nor the network.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import msgspec
import structlog
import torch
from torch import Tensor

from ..common.batch import Batch, BatchRow, Fence, RowOutput, StepOutput, row_output
from ..common.config import NO_DETERMINISTIC_CUDA, CoreSlot, EngineConfig
from ..common.cores import SharedCores, attach
from ..common.errors import ConfigError
from ..common.kv_spec import KVCacheSpec
from ..common.request import SampledToken
from ..kvcache.host_slots import SwapPages, num_host_blocks, num_swap_blocks
from ..kvcache.pages import allocate_pages, cache_dtype, copy_blocks, num_blocks_for_memory, num_spare_blocks
from ..models.config import ModelConfig
from ..models.digest import ModelDigest
from .cpu.build import NativeUnavailable
from .cpu.decoder import NativeDecoder, Step
from .cpu.tiled import TiledDecoder
from .nn.attention.base import AttentionMetadata
from .nn.attention.choose import make_attention
from .nn.decoder import Decoder
from .nn.deterministic import each_row, one_thread, torch_results
from .nn.sampling import SampleRow, prompt_logprobs, sample, sample_each
from .nn.weights import Progress, load_weights, read_kv_scales
from .ranks.group import Communicator, RankGroup, connect

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from .cuda.runner import CudaRunner

log = structlog.get_logger(__name__)

_LOGIT_ROWS = 64  # logits made at once: 64 x 128,256 in float32 is 33 MB
_MIN_CPU_ROWS = 4  # below, the processor's matrix products are slower and round a row differently


class StepPlan(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A batch as arrays, the same on every rank. Bytes hold int32 in this machine's order."""

    input_ids: bytes  # [num_tokens]
    starts: bytes  # [rows] tokens whose KV exists
    lengths: bytes  # [rows] tokens fed
    block_ids: bytes  # [num_pages] of each row as many as its tokens need, row after row
    sample_rows: bytes  # packed tokens whose logits choose the next token
    prompt_rows: bytes  # packed tokens whose logits tell the next prompt token's log-probability
    block_copies: tuple[tuple[int, int], ...]
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()


class Engine:
    """Used by one thread. `kv_pages` is the one allocation that the transfer agent registers."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        tp_rank: int = 0,
        tp_size: int = 1,
        num_blocks: int | None = None,
        progress: Progress | None = None,
        group: RankGroup | None = None,
        store: Store | None = None,
        native: bool = True,
        cores: CoreSlot | None = None,
    ) -> None:
        """With tp_size > 1 rank 0 gets its `group`, the others the `store` to meet it at. `native` False: torch alone.

        Raises ConfigError.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.model_config = _model_config(config)
        self.max_model_len = self.model_config.max_model_len
        digest = ModelDigest(config.model_dir, config.load_format, config.seed)  # beside all that follows
        self._device = _device(config, tp_rank)
        self._dtype = _torch_dtype(config, self.model_config)
        self._cache_dtype = cache_dtype(config, self._dtype, self._device)
        self._group = group
        comm = self._comm = self._connect(tp_rank, tp_size, store)
        with torch.inference_mode():
            self._decoder = Decoder(self.model_config, comm, dtype=self._dtype, device=self._device)
            load_weights(
                self._decoder, config.model_dir, load_format=config.load_format, seed=config.seed, progress=progress
            )
            if self._device.type == "cpu":
                self._decoder.pack()
        self.spec = self._kv_cache_spec()
        self.num_blocks = comm.minimum(num_blocks or self._num_blocks_for_memory(tp_size), self._device)
        # Not under inference mode: whoever moves pages writes to this tensor outside of it.
        self.kv_pages = allocate_pages(
            self.spec,
            self.num_blocks + num_spare_blocks(self._device),
            tp_size=tp_size,
            dtype=self._cache_dtype,
            device=self._device,
        )
        self.num_swap_blocks = num_swap_blocks(
            config, self.spec, self._device, num_blocks=self.num_blocks, tp_size=tp_size
        )
        num_host = num_host_blocks(config, self.spec, self._device, num_blocks=self.num_blocks, tp_size=tp_size)
        self.num_host_blocks = comm.minimum(num_host, self._device)  # of the prefix cache, behind those for swapping
        self.host_slots = SwapPages(self.kv_pages, self.num_swap_blocks + self.num_host_blocks)
        self._attention = make_attention(
            config.attention_backend,
            self.kv_pages,
            self.model_config.num_qo_heads // tp_size,
            self.model_config.sliding_windows,
            query_dtype=self._dtype,
            kv_scales=self._kv_scales(),
            deterministic=config.deterministic,
        )
        wants_native = native and self._device.type == "cpu" and self._dtype == torch.bfloat16 and tp_size == 1
        self._native = self._native_decoder(cores) if wants_native else None
        self._torch: Decoder | TiledDecoder = self._decoder
        self._calculating = one_thread if config.deterministic else nullcontext
        if config.deterministic:
            self._keep_one_order()
        with torch.inference_mode():  # compile now what the first request would wait for
            self._cuda = self._cuda_runner(progress)
            if self._cuda is None:
                self._attention.warm_up()
        self.spec = msgspec.structs.replace(self.spec, model=digest.result())

    def _keep_one_order(self) -> None:
        """Deterministic: in torch by tiles; and which workers' results are the same shows in what they exchange."""
        if self._native is None:
            with torch.inference_mode(), self._calculating():
                self._torch = TiledDecoder(self._decoder)
        results = torch_results(self._dtype, self.tp_size) if self._native is None else self._native.build
        self.spec = msgspec.structs.replace(self.spec, results=results)

    def _native_decoder(self, cores: CoreSlot | None) -> NativeDecoder | None:
        from ..models.default import cache_dir

        num_threads = self.config.num_threads or torch.get_num_threads()
        shared = _shared_cores(cores)
        try:
            return NativeDecoder(
                self._decoder,
                self.kv_pages,
                num_threads=num_threads,
                cache=cache_dir(),
                cores=shared,
                is_exact=self.config.deterministic,
            )
        except NativeUnavailable as reason:
            log.warning("cpu_kernels", used=False, reason=str(reason))
            return None

    def _connect(self, tp_rank: int, tp_size: int, store: Store | None) -> Communicator:
        if tp_size == 1:
            return Communicator()
        if self._group is not None:
            store = self._group.store
        assert store is not None, "a rank of several needs the group or the store"
        return connect(store, tp_rank, tp_size, self._device, in_rank_order=self.config.deterministic)

    def _kv_cache_spec(self) -> KVCacheSpec:
        model = self.model_config
        return KVCacheSpec(
            model="",  # known at the end of the start
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            block_size=self.config.block_size,
            dtype=str(self._cache_dtype).removeprefix("torch."),
        )

    def _kv_scales(self) -> list[tuple[float, float]] | None:
        if self._cache_dtype.itemsize > 1 or self.config.load_format == "dummy":
            return None
        return read_kv_scales(self.config.model_dir, self.model_config.num_layers)

    def _cuda_runner(self, progress: Progress | None) -> CudaRunner | None:
        if self._device.type != "cuda":
            return None
        from .cuda.runner import CudaRunner
        from .nn.attention.flashinfer import FlashInferAttention

        assert isinstance(self._attention, FlashInferAttention)
        return CudaRunner(
            self.config, self._decoder, self._attention, self.kv_pages, tp_size=self.tp_size, progress=progress
        )

    def _num_blocks_for_memory(self, tp_size: int) -> int:
        return num_blocks_for_memory(
            self.config, self.spec, self._device, tp_size=tp_size, max_model_len=self.max_model_len
        )

    @torch.inference_mode()
    def step(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepOutput:
        """Run one step on every rank. `on_layer(i)` is called when layer i's K and V are in the pages (on CUDA:
        when the kernels that write them are queued). Raises WorkerLost if a rank is gone.
        """
        began = time.perf_counter()
        plan = None
        if self._group is not None:
            plan = _plan(batch, self.config.block_size)
            self._group.send_step(msgspec.msgpack.encode(plan))
        self.host_slots.copy(batch.swap_out, batch.swap_in)
        if not batch.rows:
            self._meet()
        with self._calculating():
            rows = self._compute(batch, plan, on_layer)
        return StepOutput(rows, time.perf_counter() - began, batch.num_tokens, self.host_slots.copy_s)

    def _compute(self, batch: Batch, plan: StepPlan | None, on_layer: Callable[[int], None] | None) -> list[RowOutput]:
        """All of a step but swapping. `plan`: the batch's, where it is known already."""
        rows: list[RowOutput] = []
        if batch.rows:
            if self._cuda is not None and (decoded := self._cuda.decode(batch, on_layer)) is not None:
                return decoded
            logits = self._run(plan or _plan(batch, self.config.block_size), on_layer)
            tokens = self._sample(batch, logits)
            prompt_tokens = _read_prompt_logprobs(batch, each_row(logits) if self.config.deterministic else logits)
            rows = [row_output(row, next(tokens) if row.samples else (), next(prompt_tokens)) for row in batch.rows]
        if self._cuda is not None:
            self._cuda.wait()  # neither copies nor a chunk without a sample have waited yet
        return rows

    @property
    def num_disk_slots(self) -> int:
        """Of one rank's disk cache; the same on every rank."""
        return self.config.disk_cache_bytes // self.host_slots.slot_bytes if self.config.disk_cache_dir else 0

    def _meet(self) -> None:
        """After copies alone: what they read may be written to once all ranks have made them, and not before."""
        if self.tp_size > 1:
            self.host_slots.settle()
            self._comm.minimum(0, self._device)

    def layer_fence(self) -> Fence | None:
        """Called from `on_layer`: passed, by its `query` from any thread, when that layer's pages are written.

        None where they are by then, as on a CPU.
        """
        return self._cuda.layer_fence() if self._cuda is not None else None

    @torch.inference_mode()
    def follow(self, plan: bytes, on_layer: Callable[[int], None] | None = None) -> None:
        """A follower's side of `step`: the same collectives in the same order."""
        step = msgspec.msgpack.decode(plan, type=StepPlan)
        self.host_slots.copy(step.swap_out, step.swap_in)
        if not step.lengths:
            self._meet()
        else:
            with self._calculating():
                for _ in self._run(step, on_layer):
                    pass

    def _run(self, plan: StepPlan, on_layer: Callable[[int], None] | None) -> Iterator[Tensor]:
        """The forward pass, at once. Then logits, when asked for: of the sample rows if there are any, then of the
        prompt rows in parts."""
        copy_blocks(self.kv_pages, plan.block_copies)
        if self._native is not None:
            return self._run_native(self._native, plan, on_layer)
        input_ids, positions, metadata = _tensors(plan, self.config.block_size)
        if (cuda := self._cuda) is not None:
            hidden = cuda.forward(input_ids, positions, metadata, on_layer)
            return (cuda.logits(hidden, part) for part in _logit_rows(plan))
        self._attention.plan(metadata)
        hidden = self._torch.forward(self._place(input_ids), self._place(positions), self._attention, on_layer)
        return (self._torch.logits(hidden[self._place(part)])[: len(part)] for part in _logit_rows(plan))

    def _run_native(
        self, native: NativeDecoder, plan: StepPlan, on_layer: Callable[[int], None] | None
    ) -> Iterator[Tensor]:
        wanted = plan.sample_rows + plan.prompt_rows
        step = Step(plan.input_ids, plan.starts, plan.lengths, plan.block_ids, wanted)
        if len(plan.input_ids) > len(plan.lengths) or on_layer is None:
            hidden = native.forward(step, on_layer)
        else:
            hidden = native.forward(step)  # tokens of running answers: too quick to interrupt for each layer
            for layer in range(self.model_config.num_layers):
                on_layer(layer)
        return map(native.logits, torch.split(hidden, [len(rows) for rows in _logit_rows(plan)]))

    def _place(self, index: Tensor) -> Tensor:
        """[n] int32 -> int64, at least _MIN_CPU_ROWS of them: the last ones are computed for nothing."""
        index = index.long()
        missing = _MIN_CPU_ROWS - len(index)
        return index if missing <= 0 else torch.cat((index, index.new_zeros(missing)))

    def _sample(self, batch: Batch, logits: Iterator[Tensor]) -> Iterator[tuple[SampledToken, ...]]:
        rows = [
            SampleRow(row.seq.sampling, row.choices, row.seq.token_ids, row.seq.num_prompt_tokens)
            for row in batch.rows
            if row.samples
        ]
        if rows and self._cuda is not None:
            return self._cuda.sample(next(logits), rows)
        choose = sample_each if self.config.deterministic else sample
        return iter(choose(next(logits), rows, self.model_config.eos_token_ids) if rows else ())


# --- the plan ---------------------------------------------------------------------------------------------------


def _plan(batch: Batch, block_size: int) -> StepPlan:
    input_ids, starts, lengths, block_ids, sample_rows, prompt_rows = (array("i") for _ in range(6))
    for row in batch.rows:
        token = len(input_ids)
        prompt_rows.extend(range(token, token + _num_prompt_logprobs(row)))
        input_ids.extend(row.seq.token_ids[row.start : row.end])
        starts.append(row.start)
        lengths.append(row.num_scheduled_tokens)
        block_ids.extend(row.seq.block_table[: -(-row.end // block_size)])
        if row.samples:
            sample_rows.append(len(input_ids) - 1)
    return StepPlan(
        input_ids=input_ids.tobytes(),
        starts=starts.tobytes(),
        lengths=lengths.tobytes(),
        block_ids=block_ids.tobytes(),
        sample_rows=sample_rows.tobytes(),
        prompt_rows=prompt_rows.tobytes(),
        block_copies=tuple(batch.block_copies),
        swap_out=tuple(batch.swap_out),
        swap_in=tuple(batch.swap_in),
    )


def _logit_rows(plan: StepPlan) -> list[Tensor]:
    """The packed tokens whose logits are needed: the sample rows, if any, then the prompt rows in parts."""
    prompt_rows = _int32(plan.prompt_rows)
    parts = [prompt_rows[i : i + _LOGIT_ROWS] for i in range(0, len(prompt_rows), _LOGIT_ROWS)]
    return [part for part in (_int32(plan.sample_rows), *parts) if len(part)]


def _num_prompt_logprobs(row: BatchRow) -> int:
    """Fed prompt tokens that a prompt token follows."""
    if row.seq.sampling.prompt_logprobs is None:
        return 0
    return max(0, min(row.end, row.seq.num_prompt_tokens - 1) - row.start)


def _int32(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)


def _tensors(plan: StepPlan, block_size: int) -> tuple[Tensor, Tensor, AttentionMetadata]:
    """input_ids and positions [num_tokens], and the batch as the attention backend sees it; all on the host."""
    input_ids, starts, lengths, block_ids = map(_int32, (plan.input_ids, plan.starts, plan.lengths, plan.block_ids))
    ends = starts + lengths
    qo_indptr, kv_indptr = _indptr(lengths), _indptr((ends + block_size - 1) // block_size)
    assert kv_indptr[-1] == len(block_ids), "a block table is shorter than its sequence"
    row_of_token = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    positions = torch.arange(len(input_ids)) - (qo_indptr[:-1] - starts)[row_of_token]
    blocks = block_ids[kv_indptr[:-1][row_of_token] + positions // block_size].long()
    metadata = AttentionMetadata(
        num_decode_rows=int((lengths == 1).long().cumprod(0).sum()),
        qo_indptr=qo_indptr,
        paged_kv_indptr=kv_indptr,
        paged_kv_indices=block_ids,
        paged_kv_last_page_len=(ends - 1) % block_size + 1,
        kv_lens=tuple(ends.tolist()),
        slot_mapping=blocks * block_size + positions % block_size,
    )
    return input_ids, positions, metadata


def _indptr(counts: Tensor) -> Tensor:
    """[rows] -> [rows + 1] int32: where each row's part starts, and the end."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)))


# --- reading and checking ---------------------------------------------------------------------------------------


def _read_prompt_logprobs(batch: Batch, logits: Iterator[Tensor]) -> Iterator[tuple[SampledToken, ...]]:
    """Each row's entries; `logits` has what `prompt_rows` asked for."""
    counts = [_num_prompt_logprobs(row) for row in batch.rows]
    wanted = [
        (row.seq.token_ids[row.start + i + 1], row.seq.sampling.prompt_logprobs or 0)
        for row, count in zip(batch.rows, counts, strict=True)
        for i in range(count)
    ]
    tokens: list[SampledToken] = []
    for part in logits:
        tokens += prompt_logprobs(part, wanted[len(tokens) : len(tokens) + len(part)])
    remaining = iter(tokens)
    return (tuple(islice(remaining, count)) for count in counts)


def _model_config(config: EngineConfig) -> ModelConfig:
    """The checkpoint's, with the length that was asked for."""
    model = ModelConfig.from_dir(config.model_dir)
    asked = config.max_model_len or model.max_model_len
    if asked > model.longest_model_len:
        raise ConfigError(
            f"max_model_len = {asked} is longer than the model's {model.longest_model_len} positions "
            f"({config.model_dir})"
        )
    return replace(model, max_model_len=asked)


def _shared_cores(slot: CoreSlot | None) -> SharedCores | None:
    if slot is None:
        return None
    try:
        return attach(slot)
    except OSError as error:
        log.warning("shared_cores", used=False, reason=f"{slot.path}: {error.strerror}")
        return None


def _torch_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    name = config.dtype
    if name == "auto":  # float16 weights run in bfloat16: no half-precision products on CPUs, no overflow anywhere
        name = "float32" if model.dtype == "float32" else "bfloat16"
    return getattr(torch, name)  # type: ignore[no-any-return]


def _device(config: EngineConfig, tp_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not has_cuda):
        return torch.device("cpu")
    if config.deterministic:
        raise ConfigError(NO_DETERMINISTIC_CUDA)
    if not has_cuda:
        raise ConfigError("device = cuda: torch finds no CUDA device; use --device cpu")
    if tp_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"tensor-parallel rank {tp_rank} has no device: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    return device
