"""Steps on CUDA: fused kernels for every batch, graphs and forecasts for decode steps of one rank.

    decode    answers' tokens and drafts, one rank: `DecodePipeline` over `graphs`; None where the batch is another
    forward   any batch, on every rank: a small one by `pieces`, of a larger one kernels are launched one by one
    sample    on the device, then wait for the tokens

With several ranks every step takes `forward`: rank 0 sends each step's plan to the others anyway.
A step has ended when its call returns: whoever ships or publishes pages of earlier steps need not ask the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from ...common.batch import Batch, GpuEvent, RowOutput
from ...common.config import EngineConfig
from ...common.request import SampledToken, SamplingParams
from ..nn.attention.device import DeviceAttention
from ..nn.decoder import Decoder
from ..nn.loading import Progress
from ..nn.plan import StepPlan, logit_rows, pooled_rows, step_tensors, token_adapters
from ..nn.runner import OnLayer
from ..sampling.logprobs import prompt_logprobs
from ..sampling.sampling import SampleRow
from . import coded
from .decoder import FusedDecoder
from .drafting import GraphDrafts
from .graphs import CudaDecodeDevice
from .kernels import FusedKernels
from .pieces import PieceGraphs
from .pipeline import DecodePipeline
from .rows import graph_sizes
from .sampling import DeviceSampler
from .states import DeviceStates


class CudaRunner:
    """Implements `nn.runner.Runner`; everything is queued on the current stream of the engine's thread."""

    results = ""

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        attention: DeviceAttention,
        pages: Tensor,
        progress: Progress | None = None,
    ) -> None:
        """Compile kernels and capture graphs: minutes where nothing is in FlashInfer's cache.

        `pages`: all of a block. The last block is owned by no sequence: padding rows and warm-ups write there.
        """
        model, self._comm = decoder.config, decoder.head.rows.comm
        self._device = pages.device
        self._attention = attention
        kernels = FusedKernels()
        self._decoder = FusedDecoder(decoder, kernels)
        self._block_size, self._spare_block = pages.shape[4], pages.shape[1] - 1
        states = decoder.states
        self._states = None if states is None else DeviceStates(states, self._device, self._block_size)
        self._sampler = DeviceSampler(self._device, kernels, model.eos_token_ids)
        self._warm_up(progress)
        self._decode_device: CudaDecodeDevice | None = None
        self.decode_pipeline: DecodePipeline | None = None
        if self._comm.size == 1:
            self._decode_device = device = self._make_device(config, model.max_model_len, progress)
            self.decode_pipeline = DecodePipeline(
                device, self._sampler, pages, spare_block=self._spare_block, max_model_len=model.max_model_len
            )
        self.pieces: PieceGraphs | None = None
        if not config.enforce_eager and self._decoder.can_be_captured:
            self.pieces = PieceGraphs(self._decoder, attention, self._device, self._states)
            self.pieces.capture(progress)

    def _warm_up(self, progress: Progress | None) -> None:
        """Run everything that is compiled at first use, in the order in which all ranks do it."""
        steps: list[Callable[[], None]] = [self._attention.warm_up, self._warm_up_model, self._warm_up_sampling]
        for count, step in enumerate(steps):
            if progress is not None:
                progress("compiling kernels", count / len(steps))
            step()
        torch.cuda.synchronize(self._device)

    def _warm_up_model(self) -> None:
        """Run the model while attention is still planned for its own warm-up: three tokens on the spare block.

        Longer steps take other tiles of rows, and what is compiled for each must be there before a request comes, and
        before pieces of steps are captured.
        """
        tokens = torch.zeros(3, dtype=torch.int64, device=self._device)
        for is_adapted in self._decoder.adapter_choices:
            for num_rows in coded.TILES:
                if self._states is not None:
                    self._states.begin_smallest()
                with coded.in_tiles_of(num_rows) as tile:
                    adapters = tokens.int() if is_adapted else None
                    hidden = self._decoder.forward(tokens, tokens.int(), self._attention, None, adapters)
                # A rank to whose experts no token goes has taken none, and computes with the others all the same.
                if self._comm.minimum(int(not tile.is_taken), self._device):
                    break
        self._decoder.logits(hidden)

    def _warm_up_sampling(self) -> None:
        params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.1, logprobs=1)
        rows = [SampleRow(params, (0,), [0, 1], 1)]
        self._sampler.launch(torch.zeros(1, 1024, device=self._device), rows)

    def _make_device(self, config: EngineConfig, max_model_len: int, progress: Progress | None) -> CudaDecodeDevice:
        drafts = config.speculative_config
        device = CudaDecodeDevice(
            self._decoder,
            self._attention,
            self._device,
            sizes=graph_sizes(config.max_num_seqs, 0 if drafts is None else drafts.num_speculative_tokens),
            max_pages_per_row=-(-max_model_len // config.block_tokens),
            spare_block=self._spare_block,
            states=self._states,
        )
        if not config.enforce_eager and self._decoder.can_be_captured:
            device.capture(progress)
        return device

    def calculating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decode(self, batch: Batch, on_layer: OnLayer | None) -> list[RowOutput] | None:
        """Run the whole step, if it is one of answers' tokens and this is the only rank."""
        return self.decode_pipeline.step(batch, on_layer) if self.decode_pipeline is not None else None

    def drafts(self, num_choices: int) -> GraphDrafts | None:
        """Draft by this runner's graphs; it then runs no steps of answers itself. None: several ranks have none."""
        if self._decode_device is None:
            return None
        size, spare = self._block_size, self._spare_block
        return GraphDrafts(self._decode_device, num_choices=num_choices, block_size=size, spare_block=spare)

    def forward(self, plan: StepPlan, on_layer: OnLayer | None) -> Iterator[Tensor]:
        """Queue everything; hidden states are behind the final norm already."""
        input_ids, _, metadata = step_tensors(plan, self._block_size)
        slots = token_adapters(plan)
        more = [input_ids, pooled_rows(plan), *logit_rows(plan), *([] if slots is None else [slots])]
        step = None
        if self._states is not None:
            step, singles = self._states.step(plan)
            more.append(singles)
        arrays = self._attention.plan_with(metadata, more)
        if self._states is not None and step is not None:
            self._states.begin(step, arrays.pop())
        adapters = None if slots is None else arrays.pop()
        ids, pooled, *parts = (array.long() for array in arrays)
        hidden = self._hidden(ids, on_layer, adapters)
        logits = (self._decoder.logits(hidden[part]) for part in parts)
        return chain((hidden[pooled].float(),), logits) if len(pooled) else logits

    def _hidden(self, ids: Tensor, on_layer: OnLayer | None, adapters: Tensor | None) -> Tensor:
        positions = self._attention.positions
        self._decoder.note(len(ids))
        if self.pieces is not None and self.pieces.fits(len(ids)):
            hidden = self.pieces.run(ids, positions, on_layer, adapters)
        else:
            hidden = self._decoder.forward(ids, positions, self._attention, on_layer, adapters)
        if self._states is not None:
            self._states.report()
        return hidden

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sequence[tuple[SampledToken, ...]]:
        draws = self._sampler.launch(logits, rows)
        self.wait()
        return draws.read()

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        return prompt_logprobs(logits, targets)

    def wait(self) -> None:
        """Return when everything queued so far is done: copies, and chunks without a sample, have not waited yet.

        Raises ForeignStateError.
        """
        torch.cuda.current_stream(self._device).synchronize()
        if self._states is not None:
            self._states.check()

    def stop(self) -> None:
        """A step runs to its end, which is milliseconds away."""

    def layer_event(self) -> GpuEvent:
        """Return an event that has passed when what is queued now is done."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        queued: GpuEvent = event
        return queued
