"""One tensor-parallel rank's engine: weights, pages and a runner behind `step`.

    Batch -> StepPlan (plain arrays; rank 0 sends it to the other ranks) -> block copies -> forward -> logits of the
    rows that need them -> tokens (rank 0 alone) -> StepOutput

Which hardware computes, and in which order its sums are taken, is the runner's business (`nn/runner.py`); on CUDA it
carries out decode steps from the batch itself.
The engine reads Sequences and changes none of them: the scheduler does, from the StepOutput. It knows neither
requests' ends nor the network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import islice, repeat
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

from ..common.batch import Batch, GpuEvent, RowOutput, StepOutput, drawn_output, stopped_output
from ..common.config import CoreSlot, EngineConfig
from ..common.request import SampledToken
from ..kvcache.frames import frames_of, layer_pages
from ..kvcache.host_slots import SwapPages, num_host_blocks, num_swap_blocks
from ..kvcache.pages import allocate_pages, cache_dtype, copy_blocks, num_blocks_for_memory, num_spare_blocks
from ..models.digest import ModelDigest
from ..models.parts.experts import expert_plan
from ..wire.workers import ExpertLoads
from .choose import check_kernels, choose_device, choose_dtype, choose_runner, make_adapters, pack_weights
from .draft import DraftModel
from .expert_counts import ExpertCounters
from .mask_thread import MaskThread
from .masks import with_forced, with_masks_heeded
from .nn.decoder import Decoder
from .nn.loading import Progress, load_weights
from .nn.plan import StepPlan, plan_step, prompt_targets
from .nn.runner import OnLayer, StepStopped
from .other_ranks import OtherRanks
from .page_spec import block_spec, with_block_size
from .pooling import with_pooled
from .ranks.communicator import Communicator, connect
from .ranks.group import RankGroup
from .sampling.sampling import sample_rows
from .served_model import served_model

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


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
        """Rank 0 of several gets its `group`, the others the `store` to meet it at. `native` False: no C++.

        Raises ConfigError.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self.model_config = served_model(config)
        self.max_model_len = self.model_config.max_model_len
        # Beside all that follows.
        digest = ModelDigest(
            config.model_dir, config.load_format, config.seed, config.quantization, config.mixed_quantization
        )
        self._device = choose_device(config, tp_rank)
        dtype = choose_dtype(config, self.model_config, self._device)
        check_kernels(config, self.model_config, self._device, dtype)
        kv_dtype = cache_dtype(config, dtype, self._device)
        config = self.config = with_block_size(config, self.model_config, kv_dtype)
        self._others = OtherRanks(group, config.block_tokens)
        self._check_ranks = group.check if group is not None else lambda: None
        self._masks = MaskThread()
        comm = self._comm = self._connect(tp_rank, tp_size, group.store if group is not None else store)
        decoder = self._loaded_decoder(dtype, progress)
        native_model = pack_weights(decoder, self._device, native=native, isa=config.cpu_isa)
        self.adapters = decoder.adapters = make_adapters(config, decoder, native_model, self._device)
        self._draft: DraftModel | None = None
        if config.speculative_config is not None and config.speculative_config.model is not None:
            self._draft = DraftModel(
                config, self.model_config, comm, dtype=dtype, device=self._device, native=native, progress=progress
            )
        self.spec = block_spec(self.model_config, config.block_tokens, kv_dtype, self._draft)
        comm.meet("loaded", self._check_ranks)
        if num_blocks is None:
            num_blocks = num_blocks_for_memory(
                config, self.spec, self._device, tp_size=tp_size, max_model_len=self.max_model_len
            )
        self.num_blocks = comm.minimum(num_blocks, self._device)
        # Not under inference mode: whoever moves pages writes to this tensor outside of it.
        self.kv_pages = allocate_pages(
            self.spec,
            self.num_blocks + num_spare_blocks(self._device),
            tp_size=tp_size,
            dtype=kv_dtype,
            device=self._device,
        )
        # What the machine has free differs from rank to rank, and all copy to the slots that rank 0 names.
        num_swap = num_swap_blocks(config, self.spec, self._device, num_blocks=self.num_blocks, tp_size=tp_size)
        self.num_swap_blocks = comm.minimum(num_swap, self._device)
        num_host = num_host_blocks(config, self.spec, self._device, num_blocks=self.num_blocks, tp_size=tp_size)
        self.num_host_blocks = comm.minimum(num_host, self._device)  # of the prefix cache, behind those for swapping
        self.host_slots = SwapPages(self.kv_pages, self.spec, self.num_swap_blocks + self.num_host_blocks)
        self._experts = ExpertCounters(decoder)
        self._num_full = frames_of(self.spec).num_full
        self._num_layer_pages = self.model_config.num_kv_pages
        pages = layer_pages(self.kv_pages, self.spec)[: self._num_layer_pages]
        if decoder.states is not None:
            decoder.states.attach(self.kv_pages[self._num_layer_pages :])
        self._states = decoder.states
        self.runner = choose_runner(
            config, decoder, native_model, pages, whole=self.kv_pages, cores=cores, progress=progress
        )
        if self._draft is not None:
            self._draft.attach(self.kv_pages, cores)
            self.spec = msgspec.structs.replace(self.spec, draft=self._draft.digest)
        name = digest.result() + (" turned for length" if self.model_config.rope.is_long(self.max_model_len) else "")
        self.spec = msgspec.structs.replace(self.spec, model=name, results=self.runner.results)

    def _connect(self, tp_rank: int, tp_size: int, store: Store | None) -> Communicator:
        if tp_size == 1:
            return Communicator()
        assert store is not None, "a rank of several needs the group or the store"
        in_rank_order = self.config.is_exact_on(self._device.type)
        return connect(store, tp_rank, tp_size, self._device, in_rank_order=in_rank_order, check=self._check_ranks)

    def _loaded_decoder(self, dtype: torch.dtype, progress: Progress | None) -> Decoder:
        config, model = self.config, self.model_config
        plan = expert_plan(config, model.experts, model.sparse_layers)
        with torch.inference_mode():
            decoder = Decoder(model, self._comm, dtype=dtype, device=self._device, expert_plan=plan)
            load_weights(decoder, config.model_dir, load_format=config.load_format, seed=config.seed, progress=progress)
        return decoder

    @torch.inference_mode()
    def step(self, batch: Batch, on_layer: OnLayer | None = None) -> StepOutput:
        """Run one step on every rank. `on_layer(i)` is called when layer i's K and V are in the pages (on CUDA:
        when the kernels that write them are queued). Raises WorkerLost if a rank is gone.
        """
        began = time.perf_counter()
        self._draft_s = 0.0
        if self._states is not None:  # computed once more, a token would be in the state twice
            batch = replace(batch, may_postpone=False)
        if self._draft is None:
            self._masks.begin(batch)
        is_measured = self._states is not None and not self._states.are_checked
        plan = self._others.tell(batch, is_measured=is_measured, is_drafting=self._draft is not None)
        self.host_slots.copy(batch.swap_out, batch.swap_in)
        if not batch.rows:
            self._meet()
        with self.runner.calculating():
            try:
                rows = with_forced(batch, with_masks_heeded(batch, self._compute(batch, plan, on_layer)))
            except StepStopped:
                return stopped_output(batch, time.perf_counter() - began, self.host_slots.copy_s)
            self._experts.end_step()
        step_s = time.perf_counter() - began
        return StepOutput(rows, step_s, batch.num_tokens, self.host_slots.copy_s, self._draft_s)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Let steps begin behind tokens that no step has computed: how long they take is all that is wanted."""
        if self._states is not None:
            self._states.are_checked = False
        yield
        if self._states is not None:
            self._states.are_checked = True

    def stop(self) -> None:
        """Have the running step end soon, if it can: none of its rows is wanted any more. From any thread."""
        self.runner.stop()

    def _compute(self, batch: Batch, plan: StepPlan | None, on_layer: OnLayer | None) -> list[RowOutput]:
        """Do all of a step but swapping. `plan`: the batch's, where it is known already."""
        rows: list[RowOutput] = []
        if batch.rows:
            copy_blocks(self.kv_pages, batch.block_copies, self._num_full)
            behind = None
            if self._draft is not None:
                self._draft_s = self._draft.propose(batch, self._others.send)
                self._masks.begin(batch)  # which look at what is drafted
                behind = self._draft.rest(batch)
                plan = self._others.tell_drafted(batch, behind)
            tell = on_layer if self._draft is None else None  # else told of once all pages are written
            if not batch.has_pooled and (decoded := self.runner.decode(batch, tell)) is not None:
                if self._draft is not None:
                    self._draft_s += self._draft.keep_up(behind)
                    self._tell_pages(on_layer, 0)
                    self.runner.wait()  # for that, and for the events that were made of these
                return decoded
            plan = plan or plan_step(batch, self.config.block_tokens)
            logits = self.runner.forward(plan, on_layer)
            states = next(logits) if plan.pooled_rows else None
            if self._draft is not None:
                self._draft_s += self._draft.keep_up(behind)
            self._tell_pages(on_layer, self._num_layer_pages)
            sampling = sample_rows(batch)
            tokens = iter(self.runner.sample(next(logits), sampling) if sampling else ())
            prompt_tokens = self._prompt_logprobs(batch, logits) if plan.prompt_rows else repeat(())
            rows = [drawn_output(row, tokens, next(prompt_tokens)) for row in batch.rows]
            if states is not None:
                rows = with_pooled(batch, rows, states)
        self.runner.wait()
        return rows

    def _tell_pages(self, on_layer: OnLayer | None, first: int) -> None:
        """Tell of pages that are complete all at once: a draft model's, those of states, or all."""
        if on_layer is not None:
            for page in range(first, self.spec.num_layers):
                on_layer(page)

    def _prompt_logprobs(self, batch: Batch, logits: Iterator[Tensor]) -> Iterator[tuple[SampledToken, ...]]:
        """Yield each row's entries; `logits` has what `prompt_rows` asked for."""
        of_rows = list(prompt_targets(batch))
        targets = [target for of_row in of_rows for target in of_row]
        tokens: list[SampledToken] = []
        for part in logits:
            tokens += self.runner.prompt_logprobs(part, targets[len(tokens) : len(tokens) + len(part)])
        remaining = iter(tokens)
        return (tuple(islice(remaining, len(of_row))) for of_row in of_rows)

    def expert_loads(self) -> ExpertLoads:
        """Return how often each sparse layer's experts were chosen so far. Any thread may ask, while a step runs."""
        return self._experts.loads()

    @property
    def num_disk_slots(self) -> int:
        """Count the slots of one rank's disk cache; all ranks have equally many."""
        return self.config.disk_cache_bytes // self.host_slots.slot_bytes if self.config.disk_cache_dir else 0

    def _meet(self) -> None:
        """Wait for all ranks after copies alone: what these read may be written to once every rank has made them."""
        if self.tp_size > 1:
            self.host_slots.settle()
            self._comm.minimum(0, self._device)

    def use_device(self) -> None:
        """Make this rank's GPU the calling thread's own: touching it would open a context on the first GPU too."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def prepare_thread(self) -> None:
        """Ready the thread that steps: products have a handle and a workspace of their own in each."""
        self.use_device()
        if self._device.type == "cuda":
            torch.mm(*torch.zeros(2, 16, 16, dtype=torch.bfloat16, device=self._device).unbind())

    def layer_event(self) -> GpuEvent | None:
        """Return, from within `on_layer`, an event that has passed when that layer's pages are written.

        None where they are by then, as on a CPU.
        """
        return self.runner.layer_event()

    @torch.inference_mode()
    def follow(self, plan: bytes, on_layer: OnLayer | None = None) -> None:
        """Carry out a follower's side of `step`: the same collectives in the same order."""
        step = msgspec.msgpack.decode(plan, type=StepPlan)
        self.host_slots.copy(step.swap_out, step.swap_in)
        if not step.lengths and not step.is_begin:
            self._meet()
            return
        copy_blocks(self.kv_pages, step.block_copies, self._num_full)
        if not step.lengths:
            return
        with self.runner.calculating(), self.measuring() if step.is_measured else nullcontext():
            if step.is_draft and self._draft is not None:
                self._draft.follow(step)
                self._draft.runner.wait()
                return
            logits = self.runner.forward(step, on_layer)
            if self._draft is not None:
                self._draft.keep_up(step.behind)
            for _ in logits:
                pass
            self.runner.wait()  # for what ends the step here and nowhere else
        self._tell_pages(on_layer, self._num_layer_pages)
