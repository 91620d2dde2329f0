"""Decode steps as CUDA graphs, one for each padded number of rows, captured when the engine starts.

A graph holds embedding to final norm; its inputs are buffers that never move, shared by all graphs because one runs at
a time. Logits and sampling follow as ordinary launches: the host queues them while the graph runs. Host arrays are
pinned, so their uploads do not wait for the device, and an event tells when they may be written to again.
Without graphs (`--enforce-eager`) the same buffers are read by kernels that Python launches one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...common.adapter import NO_ADAPTER
from ..nn.attention.device import DeviceAttention, GraphAttention
from ..nn.attention.page_index import PageIndex
from ..nn.loading import Progress
from .decoder import FusedDecoder
from .rows import StepArrays
from .states import DeviceStates

_WARM_UPS = 2  # before a capture: kernels are compiled and libraries take their workspaces


class CudaDecodeDevice:
    """Implements `pipeline.DecodeDevice`. Owned by the engine's thread."""

    def __init__(
        self,
        decoder: FusedDecoder,
        attention: DeviceAttention,
        device: torch.device,
        *,
        sizes: tuple[int, ...],
        max_pages_per_row: int,
        spare_block: int,
        states: DeviceStates | None = None,
    ) -> None:
        """`states`: of the model's layers; None: all keep keys and values."""
        self.sizes = sizes
        self._decoder = decoder
        self._attention = attention
        self._device = device
        max_rows = sizes[-1]
        num_pages = max_rows * max_pages_per_row
        self._host = _Buffers(max_rows, num_pages, torch.device("cpu"))
        self._buffers = _Buffers(max_rows, num_pages, device)
        self._row_of_token = torch.arange(max_rows, dtype=torch.int32, device=device)
        self.arrays = self._host.arrays()
        self._buffers.paged_kv_indices.fill_(spare_block)
        self._uploaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._attentions = {size: attention.for_graph(self._index(size)) for size in sizes}
        # By size, and whether rows have adapters: graph, hidden states.
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._is_adapted = False  # the step that was uploaded last
        self._spare_block = spare_block
        self._states = states

    def _index(self, size: int) -> PageIndex:
        buffers = self._buffers
        return PageIndex(
            row_of_token=self._row_of_token[:size],
            positions=buffers.positions[:size],
            paged_kv_indptr=buffers.paged_kv_indptr[: size + 1],
            paged_kv_indices=buffers.paged_kv_indices,
            paged_kv_last_page_len=buffers.paged_kv_last_page_len[:size],
        )

    # --- capture ----------------------------------------------------------------------------------------------

    def capture(self, progress: Progress | None = None) -> None:
        """Capture every size, the largest first: the others then fit into its memory."""
        pool = torch.cuda.graph_pool_handle()
        steps = [(size, each) for size in sorted(self.sizes, reverse=True) for each in self._decoder.adapter_choices]
        for count, (size, self._is_adapted) in enumerate(steps, 1):
            self._upload_padding(size, is_adapted=self._is_adapted)
            for _ in range(_WARM_UPS):
                self._run(size)
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # Other threads may ask about their events meanwhile: only this thread's calls are watched.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                hidden = self._run(size)
            self._graphs[size, self._is_adapted] = graph, hidden
            if progress is not None:
                progress("capturing CUDA graphs", count / len(steps))
        torch.cuda.synchronize(self._device)

    def _upload_padding(self, size: int, *, is_adapted: bool) -> None:
        """Upload a step of padding rows alone."""
        self.reuse_arrays()
        arrays = self.arrays
        arrays.input_ids[:size] = arrays.positions[:size] = 0
        arrays.paged_kv_indptr[: size + 1] = range(size + 1)
        arrays.paged_kv_last_page_len[:size] = 1
        arrays.paged_kv_indices[:size] = self._spare_block
        arrays.adapters[:size] = 0 if is_adapted else NO_ADAPTER
        self.upload_token_ids(size)
        self.upload(size, size)

    def _run(self, size: int) -> Tensor:
        buffers, attention = self._buffers, self._attentions[size]
        adapters = buffers.adapters[:size] if self._is_adapted else None
        if self._states is not None:
            self._states.begin_rows(self._index(size))
        return self._decoder.forward(buffers.input_ids[:size], buffers.positions[:size], attention, None, adapters)

    # --- steps ------------------------------------------------------------------------------------------------

    def reuse_arrays(self) -> None:
        self._uploaded.synchronize()

    def upload(self, size: int, num_pages: int) -> None:
        self.upload_pages(num_pages)
        host, buffers = self._host, self._buffers
        buffers.positions[:size].copy_(host.positions[:size], non_blocking=True)
        self._is_adapted = bool((self.arrays.adapters[:size] != NO_ADAPTER).any())
        if self._is_adapted:
            buffers.adapters[:size].copy_(host.adapters[:size], non_blocking=True)
        self._plan(self._attentions[size], size, num_pages)
        self._uploaded.record()

    def _plan(self, attention: GraphAttention, size: int, num_pages: int) -> None:
        host = self._host
        attention.plan(host.paged_kv_indptr[: size + 1], host.paged_kv_last_page_len[:size], num_pages)

    def upload_pages(self, num_pages: int) -> None:
        host, buffers = self._host, self._buffers
        buffers.paged_kv_indices[:num_pages].copy_(host.paged_kv_indices[:num_pages], non_blocking=True)
        self._uploaded.record()

    def upload_token_ids(self, size: int) -> None:
        self._buffers.input_ids[:size].copy_(self._host.input_ids[:size], non_blocking=True)
        self._uploaded.record()

    def feed(self, token_ids: Tensor, sources: Sequence[int]) -> None:
        column = token_ids[:, 0]
        if len(sources) < len(token_ids):
            index = torch.tensor(sources, pin_memory=True).to(self._device, non_blocking=True)
            column = column.index_select(0, index)
        self._buffers.input_ids[: len(sources)].copy_(column)

    def launch(self, size: int, num_rows: int) -> Tensor:
        self._decoder.note(num_rows)
        captured = self._graphs.get((size, self._is_adapted))
        if captured is None:
            hidden = self._run(size)
        else:
            graph, hidden = captured
            graph.replay()
        if self._states is not None:
            self._states.report()
        return self._decoder.logits(hidden[:num_rows])

    def wait(self, queue_more: Callable[[], None]) -> None:
        self._done.record()
        queue_more()
        self._done.synchronize()
        if self._states is not None:
            self._states.check()


class _Buffers:
    """The arrays of `StepArrays` as tensors, pinned where they are the host's."""

    def __init__(self, max_rows: int, num_pages: int, device: torch.device) -> None:
        def zeros(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device, pin_memory=device.type == "cpu")

        self.input_ids = zeros(max_rows, torch.int64)
        self.positions = zeros(max_rows)
        self.paged_kv_indptr = zeros(max_rows + 1)
        self.paged_kv_last_page_len = zeros(max_rows)
        self.paged_kv_indices = zeros(num_pages)
        self.adapters = zeros(max_rows)

    def arrays(self) -> StepArrays:
        """Return the buffers as arrays over the same memory."""
        return StepArrays(
            input_ids=self.input_ids.numpy(),
            positions=self.positions.numpy(),
            paged_kv_indptr=self.paged_kv_indptr.numpy(),
            paged_kv_last_page_len=self.paged_kv_last_page_len.numpy(),
            paged_kv_indices=self.paged_kv_indices.numpy(),
            adapters=self.adapters.numpy(),
        )
