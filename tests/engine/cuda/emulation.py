"""CUDA's decode steps on a CPU: a device that does everything as late as a GPU might, and an engine that uses it.

What is uploaded leaves the host's arrays only when it must.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvferry.common.batch import Batch, RowOutput
from kvferry.engine.cuda.pipeline import DecodePipeline
from kvferry.engine.cuda.rows import StepArrays, graph_sizes
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.base import AttentionMetadata, LayerPages
from kvferry.engine.nn.attention.paged_torch import CPUAttention
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.runner import OnLayer
from kvferry.engine.nn.torch_runner import TorchRunner

from ...engine_driver import engine_config
from .torch_kernels import TorchKernels

MAX_ROWS, NUM_BLOCKS, SPARE = 8, 128, 127


class LateDevice:
    """Implements `DecodeDevice` with the engine's own decoder; padding rows are computed like any others."""

    def __init__(self, decoder: Decoder, pages: LayerPages) -> None:
        model = decoder.config
        self._block_size = pages[0].shape[3]
        self.sizes = graph_sizes(MAX_ROWS)
        self.arrays = _arrays(MAX_ROWS * -(-model.max_model_len // self._block_size))
        self.sizes_run: list[tuple[int, int]] = []
        self._decoder = decoder
        self._attention = CPUAttention(pages, model.num_qo_heads, model.sliding_windows)
        self._on_device = _arrays(len(self.arrays.paged_kv_indices))
        self._pending: list[Callable[[], None]] = []

    def reuse_arrays(self) -> None:
        for copy in self._pending:
            copy()
        self._pending.clear()

    def _copy_later(self, name: str, count: int) -> None:
        def copy() -> None:
            getattr(self._on_device, name)[:count] = getattr(self.arrays, name)[:count]

        self._pending.append(copy)

    def upload(self, size: int, num_pages: int) -> None:
        self.upload_pages(num_pages)
        self._copy_later("positions", size)
        self._copy_later("paged_kv_indptr", size + 1)
        self._copy_later("paged_kv_last_page_len", size)

    def upload_pages(self, num_pages: int) -> None:
        self._copy_later("paged_kv_indices", num_pages)

    def upload_token_ids(self, size: int) -> None:
        self._copy_later("input_ids", size)

    def feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        self._pending.append(lambda: self._feed(token_ids, sources))

    def _feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        self._on_device.input_ids[: len(sources)] = token_ids[list(sources), 0].numpy()

    def launch(self, size: int, num_rows: int) -> Tensor:
        self.reuse_arrays()
        self.sizes_run.append((size, num_rows))
        device = self._on_device
        self._attention.plan(self._metadata(size))
        ids = torch.from_numpy(device.input_ids[:size].copy())
        positions = torch.from_numpy(device.positions[:size].astype(np.int64))
        hidden = self._decoder.forward(ids, positions, self._attention)
        return self._decoder.logits(hidden)[:num_rows]

    def _metadata(self, size: int) -> AttentionMetadata:
        device, block = self._on_device, self._block_size
        indptr, last = device.paged_kv_indptr[: size + 1], device.paged_kv_last_page_len[:size]
        pages = device.paged_kv_indices[: indptr[-1]]
        slots = pages[indptr[1:] - 1].astype(np.int64) * block + device.positions[:size] % block
        return AttentionMetadata(
            num_decode_rows=size,
            qo_indptr=torch.arange(size + 1, dtype=torch.int32),
            paged_kv_indptr=torch.from_numpy(indptr.copy()),
            paged_kv_indices=torch.from_numpy(pages.copy()),
            paged_kv_last_page_len=torch.from_numpy(last.copy()),
            kv_lens=tuple((np.diff(indptr) * block - block + last).tolist()),
            slot_mapping=torch.from_numpy(slots),
        )

    def wait(self, queue_more: Callable[[], None]) -> None:
        queue_more()


def _arrays(num_pages: int) -> StepArrays:
    return StepArrays(
        input_ids=np.zeros(MAX_ROWS, np.int64),
        positions=np.zeros(MAX_ROWS, np.int32),
        paged_kv_indptr=np.zeros(MAX_ROWS + 1, np.int32),
        paged_kv_last_page_len=np.zeros(MAX_ROWS, np.int32),
        paged_kv_indices=np.zeros(num_pages, np.int32),
        adapters=np.zeros(MAX_ROWS, np.int32),
    )


class AheadRunner(TorchRunner):
    """Implements `Runner`: decode steps take CUDA's pipeline, all others torch."""

    def __init__(self, decoder: Decoder, pages: Tensor) -> None:
        model = decoder.config
        attention = CPUAttention(pages, model.num_qo_heads, model.sliding_windows)
        super().__init__(decoder, attention, block_size=pages.shape[4])
        self.device = LateDevice(decoder, pages)
        sampler = DeviceSampler(torch.device("cpu"), TorchKernels(), model.eos_token_ids)
        self.pipeline = DecodePipeline(
            self.device, sampler, pages, spare_block=SPARE, max_model_len=model.max_model_len
        )

    def decode(self, batch: Batch, on_layer: OnLayer | None) -> list[RowOutput] | None:
        return self.pipeline.step(batch, on_layer)


class LookingAhead(Engine):
    """An engine whose decode steps take the pipeline. Its pool has one block less than its pages."""

    def __init__(self, model_dir: Path, **fields: object) -> None:
        super().__init__(engine_config(model_dir, **fields), num_blocks=NUM_BLOCKS, native=False)
        assert isinstance(self.runner, TorchRunner)
        self.runner = runner = AheadRunner(self.runner.decoder, self.kv_pages)
        self.device, self.pipeline = runner.device, runner.pipeline
        self.num_blocks = SPARE
