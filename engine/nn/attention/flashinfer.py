"""Attention on CUDA by FlashInfer's paged wrappers.

    FlashInferAttention     any batch: rows of one token, then chunks; planned once per step, run once per layer
    DecodeGraphAttention    one padded number of one-token rows, with buffers that never move: for a CUDA graph

A layer's view of the page tensor is what the wrappers take as it is. All layers have one window; of a model with
several, each has attention of its own (`flashinfer_parts.py`). All run one after another on one stream, so one float
workspace serves them all, and under graphs one integer workspace serves all numbers of rows: whoever runs was planned
right before. The first plan of a variant compiles its kernel, so `warm_up` is for start-up.

Pages in 8 bits (e4m3) hold k / k_scale and v / v_scale of each layer, cut off at the largest number there is. Chunks
then run on FlashInfer's older kernels (fa2), for its newest multiply numbers of one size alone; with queries in 8 bits
too (`narrow_queries`) they run on those (fa3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....models.parts.gpu_attention import OLDER_HEAD_DIM, check_heads
from .base import PLAIN_SCORES, AttentionMetadata, LayerPages, Scores, check_pages
from .flashinfer_package import check_narrow, heed_sinks_, import_flashinfer, to_e4m3, window_left
from .page_index import PageIndex, StepIndex, smallest_step, upload_step

if TYPE_CHECKING:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

# FlashInfer's scratch memory, shared by all layers. A step whose plan does not fit into it fails.
_WORKSPACE_BYTES = 256 << 20
_INT_WORKSPACE_BYTES = 8 << 20
_TENSOR_CORE_GROUP = 4  # query heads per KV head from which decode is faster on tensor cores

KVScales = Sequence[tuple[float, float]]  # of each layer: k_scale, v_scale


class FlashInferAttention:
    """Implements `DeviceAttention`. Owned by the engine's thread."""

    keeps_values = True
    value_dim: int | None = None

    def __init__(
        self,
        pages: LayerPages,
        num_qo_heads: int,
        window: int | None = None,
        *,
        query_dtype: torch.dtype | None = None,
        kv_scales: KVScales | None = None,
        narrow_queries: bool = False,
        scores: Scores = PLAIN_SCORES,
        workspace: Tensor | None = None,
    ) -> None:
        """`window`: tokens that each sees; None: all before it. `query_dtype`: where pages are in 8 bits and queries
        are not; `narrow_queries`: chunks' are made so, too.
        `workspace`: of other attention, which does not run at once; None: one of its own.

        Raises ConfigError.
        """
        if isinstance(pages, Tensor):
            check_pages(pages, num_qo_heads)
        first = pages[0]
        if narrow_queries:
            check_narrow(first, scores)
        self._narrows = narrow_queries
        self._kv_dtype, self.device = first.dtype, first.device
        self.dtype = query_dtype or first.dtype
        _, _, self._num_kv_heads, self.block_size, self._head_dim = first.shape
        self._num_blocks = min(layer.shape[0] for layer in pages)
        check_heads([self._head_dim], *(str(each).removeprefix("torch.") for each in (self.dtype, self._kv_dtype)))
        self.heads_size = (num_qo_heads + 2 * self._num_kv_heads) * self._head_dim
        self.result_size = num_qo_heads * self._head_dim
        self._scale, self._cap = scores.scale_of(self._head_dim), scores.cap
        self._sinks = None if scores.sinks is None else [sinks.float() for sinks in scores.sinks]
        self._flashinfer = flashinfer = import_flashinfer("attention")
        self._pages = pages
        self._scales = list(kv_scales or [(1.0, 1.0)] * len(pages))
        self._num_qo_heads = num_qo_heads
        self._window = window
        if workspace is None:  # must start as zeros
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=first.device)
        self.workspace = workspace
        self._int_workspace: Tensor | None = None
        self._decode = self._decode_wrapper()
        self._prefill: BatchPrefillWithPagedKVCacheWrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self.workspace, "HND", backend="fa2" if self._head_dim == OLDER_HEAD_DIM else "auto"
        )
        self._num_tokens = self._num_decode_rows = 0
        self._index: PageIndex | None = None

    def _decode_wrapper(self, **buffers: object) -> BatchDecodeWithPagedKVCacheWrapper:
        is_wide = self._head_dim == OLDER_HEAD_DIM
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace,
            "HND",
            use_tensor_cores=is_wide or self._num_qo_heads // self._num_kv_heads >= _TENSOR_CORE_GROUP,
            backend="fa2",
            **buffers,
        )

    # --- any batch --------------------------------------------------------------------------------------------

    def plan(self, metadata: AttentionMetadata) -> None:
        self.plan_with(metadata, ())

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        step = upload_step(metadata, self.device, more)
        self.plan_step(metadata, step)
        return step.more

    def plan_step(self, metadata: AttentionMetadata, step: StepIndex) -> None:
        """Plan a step that is uploaded."""
        self._num_tokens = metadata.num_tokens
        self._num_decode_rows = rows = metadata.num_decode_rows
        self._index = index = step.index
        first_page = int(metadata.paged_kv_indptr[rows])  # of the chunks
        if rows:
            indptr, last = step.paged_kv_indptr[: rows + 1], step.paged_kv_last_page_len[:rows]
            self._plan_wrapper(self._decode, indptr, index.paged_kv_indices[:first_page], last)
        if rows < metadata.num_rows:
            self._plan_prefill(step, index.paged_kv_indices[first_page:], step.paged_kv_last_page_len[rows:])

    @property
    def positions(self) -> Tensor:
        assert self._index is not None, "nothing is planned"
        return self._index.positions

    def _plan_wrapper(
        self,
        wrapper: BatchDecodeWithPagedKVCacheWrapper,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
    ) -> None:
        wrapper.plan(
            indptr,
            indices,
            last_page_len,
            self._num_qo_heads,
            self._num_kv_heads,
            self._head_dim,
            self.block_size,
            window_left=window_left(self._window),
            q_data_type=self.dtype,
            kv_data_type=self._kv_dtype,
            sm_scale=self._scale,
            logits_soft_cap=self._cap,
        )

    def _plan_prefill(self, step: StepIndex, indices: Tensor, last_page_len: Tensor) -> None:
        self._prefill.plan(
            step.chunk_qo_indptr,
            step.chunk_kv_indptr,
            indices,
            last_page_len,
            self._num_qo_heads,
            self._num_kv_heads,
            self._head_dim,
            self.block_size,
            causal=True,
            window_left=window_left(self._window),
            q_data_type=self._kv_dtype if self._narrows else self.dtype,
            kv_data_type=self._kv_dtype,
            o_data_type=self.dtype,
            sm_scale=self._scale,
            logits_soft_cap=self._cap,
            seq_lens=step.chunk_kv_lens,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        assert self._index is not None, "forward before plan"
        num_tokens, rows = self._num_tokens, self._num_decode_rows
        if num_tokens:
            self._write(k[:num_tokens], v[:num_tokens], layer_id, self._index)
        out = q.new_empty(q.shape) if out is None else out
        out[num_tokens:].zero_()
        if rows:
            self._run(self._decode, q[:rows], out[:rows], layer_id)
        if rows < num_tokens:
            queries = to_e4m3(q[rows:num_tokens], 1.0) if self._narrows else q[rows:num_tokens]
            self._run(self._prefill, queries, out[rows:num_tokens], layer_id)
        return out

    def _run(
        self,
        wrapper: BatchDecodeWithPagedKVCacheWrapper | BatchPrefillWithPagedKVCacheWrapper,
        q: Tensor,
        out: Tensor,
        layer_id: int,
    ) -> None:
        k_scale, v_scale = self._scales[layer_id]
        pages, sinks = self._pages[layer_id], None if self._sinks is None else self._sinks[layer_id]
        found = wrapper.run(q, pages, k_scale=k_scale, v_scale=v_scale, out=out, return_lse=sinks is not None)
        if sinks is not None:
            heed_sinks_(out, found[1], sinks)

    def _write(self, k: Tensor, v: Tensor, layer_id: int, index: PageIndex) -> None:
        """Write K and V [num_tokens, num_kv_heads, head_dim] into the layer's pages, if they have heads."""
        if not k.shape[1]:
            return
        if self._kv_dtype == torch.float8_e4m3fn:
            k, v = (to_e4m3(x, scale) for x, scale in zip((k, v), self._scales[layer_id], strict=True))
        self._flashinfer.append_paged_kv_cache(
            k,
            v,
            index.row_of_token,
            index.positions,
            self._pages[layer_id],
            index.paged_kv_indices,
            index.paged_kv_indptr,
            index.paged_kv_last_page_len,
            "HND",
        )

    def plan_nothing(self) -> None:
        self._num_tokens = self._num_decode_rows = 0
        self._index = PageIndex.of_nothing(self.device)

    def warm_up(self) -> None:
        """Compile the kernels: one decode row and one prefill row on the last block."""
        self.plan(smallest_step(self._num_blocks - 1))
        sizes = [self._num_qo_heads, self._num_kv_heads, self._num_kv_heads]
        heads = torch.zeros(3, sum(sizes), self._head_dim, dtype=self.dtype, device=self.device)
        q, k, v = torch.split(heads, sizes, 1)
        self.forward(q, k, v, 0)
        torch.cuda.synchronize(self.device)

    # --- graphs -----------------------------------------------------------------------------------------------

    def for_graph(self, index: PageIndex) -> DecodeGraphAttention:
        if self._int_workspace is None:
            self._int_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        return DecodeGraphAttention(self, index, self._int_workspace)


class DecodeGraphAttention:
    """Implements `GraphAttention`."""

    def __init__(self, attention: FlashInferAttention, index: PageIndex, int_workspace: Tensor) -> None:
        self._attention = attention
        self._index = index
        self._wrapper = attention._decode_wrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=index.paged_kv_indptr,
            paged_kv_indices_buffer=index.paged_kv_indices,
            paged_kv_last_page_len_buffer=index.paged_kv_last_page_len,
        )
        self._wrapper.reset_workspace_buffer(attention.workspace, int_workspace)

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        indices = self._index.paged_kv_indices[:num_pages]
        self._attention._plan_wrapper(self._wrapper, indptr, indices, last_page_len)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        owner = self._attention
        owner._write(k, v, layer_id, self._index)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        owner._run(self._wrapper, q, out, layer_id)
        return out
