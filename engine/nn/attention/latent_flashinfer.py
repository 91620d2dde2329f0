"""Attention over latents on CUDA, by FlashInfer's wrapper for them, in absorbed form (`nn/latent.py`).

    FlashInferLatentAttention     any batch in one plan, rows of one token and chunks alike
    LatentGraphAttention          one padded number of one-token rows, with buffers that never move: for a CUDA graph

A layer's view of the page tensor, [blocks, block_size, latent and turned key], is what the wrapper takes as it is. For
which latents and how many heads there are kernels stands in `models/parts/latent.py`: to other numbers some heads are
added, of zeros.

Not run on a card: shown on an emulated device, which takes the arguments that FlashInfer takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....common.errors import ConfigError
from .base import AttentionMetadata, Scores
from .flashinfer_package import import_flashinfer
from .page_index import PageIndex, smallest_step, upload_step

_WRITTEN = (512, 64)  # sizes that FlashInfer has a kernel for that writes them into pages
_WORKSPACE_BYTES = 128 << 20  # FlashInfer's scratch memory, shared by all layers and sizes
_NEWEST_CAPABILITY = (9, 0)  # of the cards that FlashInfer's newest kernels for latents run on (fa3); others take fa2


class FlashInferLatentAttention:
    """Implements `DeviceAttention`. Owned by the engine's thread."""

    keeps_values = False

    def __init__(self, pages: Tensor, num_heads: int, scores: Scores) -> None:
        """`pages`: [num_layers, num_blocks, 1, 1, block_size, latent and turned key] in 16 bits. Raises ConfigError."""
        assert pages.dim() == 6 and pages.is_contiguous() and scores.value_dim is not None, pages.shape
        if pages.dtype not in (torch.bfloat16, torch.float16):
            kind = str(pages.dtype).removeprefix("torch.")
            raise ConfigError(f"flashinfer does not attend to latents in {kind}; use bfloat16, and kv_cache_dtype auto")
        self._flashinfer = import_flashinfer("attention")
        self._layers = pages[:, :, 0, 0]  # [num_layers, num_blocks, block_size, latent and turned key]
        self._num_heads = num_heads
        self.dtype = pages.dtype
        self._token_size = pages.shape[-1]
        self._latent_dim, self._rope_dim = scores.value_dim, self._token_size - scores.value_dim
        self.value_dim: int | None = self._latent_dim
        self.heads_size, self.result_size = (num_heads + 1) * self._token_size, num_heads * self._latent_dim
        self._num_run = 1 << (num_heads - 1).bit_length()  # as `cuda_heads` has it
        self._scale = scores.scale_of(self._token_size)
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=pages.device)
        self._wrapper = self._make_wrapper()
        self._num_tokens = 0
        self._index: PageIndex | None = None

    def _make_wrapper(self, **buffers: object) -> Any:  # FlashInfer's wrapper
        is_newest = torch.cuda.get_device_capability(self._workspace.device) == _NEWEST_CAPABILITY
        return self._flashinfer.mla.BatchMLAPagedAttentionWrapper(
            self._workspace, backend="fa3" if is_newest else "fa2", **buffers
        )

    def _plan_wrapper(
        self,
        wrapper: Any,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_lens: Tensor,
        *,
        causal: bool,
    ) -> None:
        """Plan rows whose arrays are on the host, in pinned memory, but for the page ids."""
        wrapper.plan(
            metadata=self._flashinfer.mla.MLAPlanMetadata.csr(qo_indptr, kv_indptr, kv_indices, kv_lens),
            num_heads=self._num_run,
            head_dim_ckv=self._latent_dim,
            head_dim_kpe=self._rope_dim,
            page_size=self._layers.shape[2],
            causal=causal,
            sm_scale=self._scale,
            q_data_type=self._layers.dtype,
            kv_data_type=self._layers.dtype,
        )

    # --- any batch --------------------------------------------------------------------------------------------

    def plan(self, metadata: AttentionMetadata) -> None:
        self.plan_with(metadata, ())

    def plan_with(self, metadata: AttentionMetadata, more: Sequence[Tensor]) -> list[Tensor]:
        self._num_tokens = metadata.num_tokens
        step = upload_step(replace(metadata, num_decode_rows=0), self._layers.device, more)  # every row as a chunk
        self._index = step.index
        self._plan_wrapper(
            self._wrapper,
            step.chunk_qo_indptr,
            step.chunk_kv_indptr,
            step.index.paged_kv_indices,
            step.chunk_kv_lens,
            causal=True,
        )
        return step.more

    def plan_nothing(self) -> None:
        self._num_tokens = 0
        self._index = PageIndex.of_nothing(self._layers.device)

    @property
    def positions(self) -> Tensor:
        assert self._index is not None, "nothing is planned"
        return self._index.positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int, out: Tensor | None = None) -> Tensor:
        assert self._index is not None, "forward before plan"
        count = self._num_tokens
        out = self._empty_result(len(q)) if out is None else out
        out[count:].zero_()
        if count:
            self._write(k[:count], layer_id, self._index)
            self._run(self._wrapper, q[:count], out[:count], layer_id)
        return out

    def _run(self, wrapper: Any, q: Tensor, out: Tensor, layer_id: int) -> None:
        pages, num_more = self._layers[layer_id], self._num_run - self._num_heads
        if not num_more:
            wrapper.run(query=q, kv_cache=pages, out=out)
            return
        wider = out.new_empty(len(out), self._num_run, self._latent_dim)
        wrapper.run(query=torch.nn.functional.pad(q, (0, 0, 0, num_more)), kv_cache=pages, out=wider)
        out.copy_(wider[:, : self._num_heads])

    def _write(self, k: Tensor, layer_id: int, index: PageIndex) -> None:
        """Write what is kept of tokens, [num_tokens, 1, latent and turned key], into the layer's pages."""
        pages, size = self._layers[layer_id], self._latent_dim
        if (size, self._rope_dim) != _WRITTEN:
            places, block_size = index.positions, pages.shape[1]
            pages_of_rows = index.paged_kv_indptr[index.row_of_token] + places // block_size
            pages[index.paged_kv_indices[pages_of_rows], places % block_size] = k[:, 0]
            return
        self._flashinfer.append_paged_mla_kv_cache(
            k[:, 0, :size],
            k[:, 0, size:],
            index.row_of_token,
            index.positions,
            pages[..., :size],
            pages[..., size:],
            index.paged_kv_indices,
            index.paged_kv_indptr,
            index.paged_kv_last_page_len,
        )

    def _empty_result(self, num_tokens: int) -> Tensor:
        shape = (num_tokens, self._num_heads, self._latent_dim)
        return torch.empty(shape, dtype=self.dtype, device=self._layers.device)

    def warm_up(self) -> None:
        """Compile the kernels: one row of one token and one of two on the last block."""
        self.plan(smallest_step(self._layers.shape[1] - 1))
        heads = torch.zeros(3, self._num_heads + 1, self._token_size, dtype=self.dtype, device=self._layers.device)
        q, kept = torch.split(heads, [self._num_heads, 1], 1)
        self.forward(q, kept, kept[:, :0], 0)
        torch.cuda.synchronize(self._layers.device)

    # --- graphs -----------------------------------------------------------------------------------------------

    def for_graph(self, index: PageIndex) -> LatentGraphAttention:
        return LatentGraphAttention(self, index)


class LatentGraphAttention:
    """Implements `GraphAttention`. FlashInfer keeps 8 MiB on the device for each."""

    def __init__(self, attention: FlashInferLatentAttention, index: PageIndex) -> None:
        self._attention = attention
        self._index = index
        num_rows, device = len(index.positions), index.positions.device
        self._qo_indptr = torch.arange(num_rows + 1, dtype=torch.int32).pin_memory()
        self._kv_lens = torch.empty(num_rows, dtype=torch.int32, pin_memory=True)
        self._wrapper = attention._make_wrapper(
            use_cuda_graph=True,
            qo_indptr=torch.zeros(num_rows + 1, dtype=torch.int32, device=device),
            kv_indptr=index.paged_kv_indptr,
            kv_indices=index.paged_kv_indices,
            kv_len_arr=torch.zeros(num_rows, dtype=torch.int32, device=device),
        )

    def plan(self, indptr: Tensor, last_page_len: Tensor, num_pages: int) -> None:
        owner, index = self._attention, self._index
        torch.sub(indptr.diff(), 1, out=self._kv_lens)
        self._kv_lens.mul_(owner._layers.shape[2]).add_(last_page_len)
        index.paged_kv_last_page_len.copy_(last_page_len, non_blocking=True)  # the kernel that writes pages takes it
        pages = index.paged_kv_indices[:num_pages]
        owner._plan_wrapper(self._wrapper, self._qo_indptr, indptr, pages, self._kv_lens, causal=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        owner = self._attention
        owner._write(k, layer_id, self._index)
        out = owner._empty_result(len(q))
        owner._run(self._wrapper, q, out, layer_id)
        return out
