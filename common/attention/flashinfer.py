"""Attention on CUDA by FlashInfer's paged wrappers. The one attention module that imports flashinfer.

A step's rows stand in the order decode, then prefill; each part has a wrapper for each sliding window that the model
uses, planned once per step from host arrays and run once per layer. A layer's view of the page tensor is what the
wrappers take as it is. The first plan of a variant compiles its kernel, so `warm_up` is for start-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import AttentionMetadata, check_pages, softmax_scale

if TYPE_CHECKING:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

_WORKSPACE_BYTES = 256 << 20
_TENSOR_CORE_GROUP = 4  # query heads per KV head from which decode is faster on tensor cores


class FlashInferAttention:
    """Owned by the engine's thread. One float workspace serves all wrappers: they run one after another."""

    name = "flashinfer"

    def __init__(self, pages: Tensor, num_qo_heads: int, sliding_windows: Sequence[int | None]) -> None:
        check_pages(pages, num_qo_heads)
        if pages.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"flashinfer does not attend in {pages.dtype}; use --dtype bfloat16 on CUDA")
        try:
            import flashinfer
        except ImportError as error:
            raise ConfigError("attention on CUDA needs flashinfer: pip install 'kvferry[gpu]'") from error
        self._pages = pages
        self._num_qo_heads = num_qo_heads
        _, _, _, self._num_kv_heads, self._block_size, self._head_dim = pages.shape
        self._windows = tuple(sliding_windows)
        self._scale = softmax_scale(self._head_dim)
        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=pages.device)  # must start as zeros
        use_tensor_cores = num_qo_heads // self._num_kv_heads >= _TENSOR_CORE_GROUP
        self._decode: dict[int | None, BatchDecodeWithPagedKVCacheWrapper] = {
            window: flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=use_tensor_cores)
            for window in set(self._windows)
        }
        self._prefill: dict[int | None, BatchPrefillWithPagedKVCacheWrapper] = {
            window: flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND") for window in set(self._windows)
        }
        self._num_tokens = self._num_decode_rows = 0
        self._blocks = self._offsets = torch.empty(0, dtype=torch.int64, device=pages.device)

    def plan(self, metadata: AttentionMetadata) -> None:
        device = self._pages.device
        self._num_tokens = metadata.num_tokens
        self._num_decode_rows = metadata.num_decode_rows
        slots = metadata.slot_mapping.to(device, non_blocking=True)
        self._blocks, self._offsets = slots // self._block_size, slots % self._block_size
        indices = metadata.paged_kv_indices.to(device, non_blocking=True)
        if metadata.num_decode_rows:
            self._plan_decode(metadata, indices)
        if metadata.num_decode_rows < metadata.num_rows:
            self._plan_prefill(metadata, indices)

    def _plan_decode(self, metadata: AttentionMetadata, indices: Tensor) -> None:
        rows = metadata.num_decode_rows
        indptr = metadata.paged_kv_indptr[: rows + 1]
        for window, wrapper in self._decode.items():
            wrapper.plan(
                indptr,
                indices[: int(indptr[-1])],
                metadata.paged_kv_last_page_len[:rows],
                self._num_qo_heads,
                self._num_kv_heads,
                self._head_dim,
                self._block_size,
                window_left=_window_left(window),
                q_data_type=self._pages.dtype,
                kv_data_type=self._pages.dtype,
                sm_scale=self._scale,
            )

    def _plan_prefill(self, metadata: AttentionMetadata, indices: Tensor) -> None:
        rows = metadata.num_decode_rows
        qo_indptr = metadata.qo_indptr[rows:] - metadata.qo_indptr[rows]
        kv_indptr = metadata.paged_kv_indptr[rows:] - metadata.paged_kv_indptr[rows]
        for window, wrapper in self._prefill.items():
            wrapper.plan(
                qo_indptr,
                kv_indptr,
                indices[int(metadata.paged_kv_indptr[rows]) :],
                metadata.paged_kv_last_page_len[rows:],
                self._num_qo_heads,
                self._num_kv_heads,
                self._head_dim,
                self._block_size,
                causal=True,
                window_left=_window_left(window),
                q_data_type=self._pages.dtype,
                kv_data_type=self._pages.dtype,
                sm_scale=self._scale,
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        num_tokens, rows = self._num_tokens, self._num_decode_rows
        layer = self._pages[layer_id]  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
        layer[:, 0][self._blocks, :, self._offsets] = k[:num_tokens]
        layer[:, 1][self._blocks, :, self._offsets] = v[:num_tokens]
        window = self._windows[layer_id]
        q = q.contiguous()  # [tokens, num_qo_heads, head_dim]
        out = torch.empty_like(q)
        out[num_tokens:].zero_()
        if rows:
            self._decode[window].run(q[:rows], layer, out=out[:rows])
        if rows < num_tokens:
            self._prefill[window].run(q[rows:num_tokens], layer, out=out[rows:num_tokens])
        return out

    def warm_up(self) -> None:
        """Compile the kernels of this model's variants: one decode row and one prefill row on block 0."""
        indptr, page = torch.arange(3, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        metadata = AttentionMetadata(
            num_decode_rows=1,
            qo_indptr=torch.tensor([0, 1, 3], dtype=torch.int32),
            paged_kv_indptr=indptr,
            paged_kv_indices=page,
            paged_kv_last_page_len=torch.tensor([1, 2], dtype=torch.int32),
            kv_lens=(1, 2),
            slot_mapping=torch.zeros(3, dtype=torch.int64),
        )
        self.plan(metadata)
        shape = (3, self._num_qo_heads + 2 * self._num_kv_heads, self._head_dim)
        heads = torch.zeros(shape, dtype=self._pages.dtype, device=self._pages.device)
        q, k, v = torch.split(heads, [self._num_qo_heads, self._num_kv_heads, self._num_kv_heads], 1)
        for window in set(self._windows):
            self.forward(q, k, v, self._windows.index(window))
        torch.cuda.synchronize(self._pages.device)


def _window_left(window: int | None) -> int:
    """FlashInfer counts the keys to the left of a query, itself excluded; -1 is all of them."""
    return -1 if window is None else window - 1
