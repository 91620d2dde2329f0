"""A rank's model on CUDA: fused kernels for every batch, graphs and forecasts for decode steps of one rank.

    decode    rows of one token, tp 1: `decode_runner` over `cuda_graphs`; None where the batch is another
    forward   any batch, on every rank: kernels launched one by one
    sample    on the device, then wait for the tokens

With several ranks every step takes `forward`: a collective inside a captured graph would have to be proven safe
against a rank that fails, and rank 0 sends each step's plan to the others anyway.
A step has ended when its call returns: whoever ships or publishes pages of earlier steps need not ask the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import structlog
import torch
from torch import Tensor

from ...common.batch import Batch, Fence, RowOutput
from ...common.config import EngineConfig
from ...common.request import SampledToken, SamplingParams
from ..nn.attention.base import AttentionMetadata
from ..nn.attention.flashinfer import FlashInferAttention
from ..nn.decoder import Decoder
from ..nn.sampling import SampleRow
from ..nn.weights import Progress
from .decoder import FusedDecoder
from .graphs import CudaDecodeDevice
from .kernels import FusedKernels
from .pipeline import DecodeRunner
from .rows import graph_sizes
from .sampling import DeviceSampler

log = structlog.get_logger(__name__)


class CudaRunner:
    """Owned by the engine's thread; everything is queued on its current stream."""

    def __init__(
        self,
        config: EngineConfig,
        decoder: Decoder,
        attention: FlashInferAttention,
        pages: Tensor,
        *,
        tp_size: int,
        progress: Progress | None = None,
    ) -> None:
        """Compiles kernels and captures graphs: minutes where nothing is in FlashInfer's cache.

        The last block of `pages` is owned by no sequence: padding rows and warm-ups write there.
        """
        model = decoder.config
        self._device = pages.device
        self._pages = pages
        self._attention = attention
        kernels = FusedKernels()
        self._decoder = FusedDecoder(decoder, kernels)
        self._sampler = DeviceSampler(self._device, kernels, model.eos_token_ids)
        self._warm_up(progress)
        self.decode_runner = self._decode_runner(config, model.max_model_len, progress) if tp_size == 1 else None
        if tp_size > 1 and not config.enforce_eager:
            log.info("cuda_graphs", used=False, reason=f"{tp_size} tensor-parallel ranks launch every kernel")

    def _warm_up(self, progress: Progress | None) -> None:
        """Everything that is compiled at first use, in the order in which all ranks do it."""
        steps: list[Callable[[], None]] = [self._attention.warm_up, self._warm_up_model, self._warm_up_sampling]
        for count, step in enumerate(steps):
            if progress is not None:
                progress("compiling kernels", count / len(steps))
            step()
        torch.cuda.synchronize(self._device)

    def _warm_up_model(self) -> None:
        """Attention is still planned for its own warm-up: three tokens on the spare block."""
        tokens = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._decoder.logits(self._decoder.forward(tokens, tokens.int(), self._attention))

    def _warm_up_sampling(self) -> None:
        params = SamplingParams(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.1, logprobs=1)
        rows = [SampleRow(params, (0,), [0, 1], 1)]
        self._sampler.launch(torch.zeros(1, 1024, device=self._device), rows)

    def _decode_runner(self, config: EngineConfig, max_model_len: int, progress: Progress | None) -> DecodeRunner:
        spare_block = self._pages.shape[1] - 1
        device = CudaDecodeDevice(
            self._decoder,
            self._attention,
            self._device,
            sizes=graph_sizes(config.max_num_seqs),
            max_pages_per_row=-(-max_model_len // config.block_size),
            spare_block=spare_block,
        )
        if not config.enforce_eager:
            device.capture(progress)
        return DecodeRunner(device, self._sampler, self._pages, spare_block=spare_block, max_model_len=max_model_len)

    def decode(self, batch: Batch, on_layer: Callable[[int], None] | None) -> list[RowOutput] | None:
        """The whole step, if it is one of single tokens and this is the only rank."""
        return self.decode_runner.step(batch, on_layer) if self.decode_runner is not None else None

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        """Hidden states behind the final norm, queued. The arguments are the host's."""
        self._attention.plan(metadata)
        return self._decoder.forward(
            input_ids.to(self._device, torch.int64, non_blocking=True),
            positions.to(self._device, torch.int32, non_blocking=True),
            self._attention,
            on_layer,
        )

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Of the tokens `rows` [n], which are the host's. A collective with several ranks."""
        return self._decoder.logits(hidden[rows.to(self._device, torch.int64, non_blocking=True)])

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Iterator[tuple[SampledToken, ...]]:
        draws = self._sampler.launch(logits, rows)
        self.wait()
        return iter(draws.read())

    def wait(self) -> None:
        """Return when everything queued so far is done."""
        torch.cuda.current_stream(self._device).synchronize()

    def layer_fence(self) -> Fence:
        """Passed, by its `query`, when what is queued now is done."""
        fence = torch.cuda.Event()  # type: ignore[no-untyped-call]
        fence.record()
        passed: Fence = fence
        return passed
