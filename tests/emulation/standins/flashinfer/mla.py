"""Attention over latents: planned on the host with what CSR arrays say, then run over pages of latents.

Of the real wrapper's backends the two that the product names are here, fa2 and fa3, as is what their plan checks. Each
plan stages its upload in pinned memory of its own, which the next but one may get: nobody waits for the upload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvferry.tests.emulation.memory import DeviceTensor, upload
from kvferry.tests.emulation.stream import forbid_in_capture, launch

from .attention import ASKED_FOR
from .checks import check, host_ints, rows, whole

_INT_WORKSPACE_BYTES = 8 << 20
_MAX_WORK_ITEMS = 16384
_NUM_SM = 132
_TILE, _KEY_TILE = 64, 64  # of a Hopper card's kernels
_SIZES = (128, 256, 512)  # of latents


@dataclass(frozen=True)
class MLAPlanMetadata:
    qo_indptr: Tensor | None = None
    kv_indptr: Tensor | None = None
    kv_indices: Tensor | None = None
    kv_len_arr: Tensor | None = None

    @classmethod
    def csr(cls, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor) -> MLAPlanMetadata:
        return cls(qo_indptr, kv_indptr, kv_indices, kv_len_arr)


@dataclass(frozen=True)
class _Plan:
    qo_indptr: list[int]
    kv_indptr: list[int]
    kv_lens: list[int]
    num_heads: int
    widths: tuple[int, int]
    page_size: int
    causal: bool
    scale: float
    dtype: torch.dtype


_plans: list[_Plan] = []  # a plan's number is its place here
_free_pinned: list[Tensor] = []


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        wanted = "fa3" if torch.cuda.get_device_capability() == (9, 0) else "fa2"
        check(backend == wanted, f"latents on {backend} are not used")
        self._workspace = whole("float workspace", float_workspace_buffer, torch.uint8)
        self.device = float_workspace_buffer.device
        self._backend, self._is_for_graph = backend, use_cuda_graph
        self._buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        is_there = [isinstance(each, DeviceTensor) and each.is_contiguous() for each in self._buffers]
        check(all(is_there) if use_cuda_graph else not any(is_there), "a graph's buffers are reserved, all of them")
        self._int_workspace: Tensor | None = None
        self._pinned: Tensor | None = None
        self._plan: _Plan | None = None

    def plan(
        self,
        *,
        num_heads: int | None = None,
        head_dim_ckv: int | None = None,
        head_dim_kpe: int | None = None,
        page_size: int | None = None,
        causal: bool | None = None,
        sm_scale: float | None = None,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
        use_profiler: bool = False,
        metadata: MLAPlanMetadata | None = None,
        query_layout: Literal["packed", "split"] | None = None,
        kv_cache_layout: Literal["packed", "split"] | None = None,
        lse_mode: Literal["none", "base2", "basee"] = "none",
    ) -> None:
        forbid_in_capture("plan")
        assert metadata is not None and head_dim_ckv is not None and head_dim_kpe is not None
        assert num_heads is not None and page_size is not None and sm_scale is not None and causal is not None
        assert query_layout is kv_cache_layout is None and lse_mode == "none", "packed queries and pages, no sums"
        arrays = (metadata.qo_indptr, metadata.kv_indptr, metadata.kv_indices, metadata.kv_len_arr)
        for array in arrays:
            assert array is not None
            check(array.dtype == torch.int32 and array.dim() == 1 and array.is_contiguous(), "arrays of int32")
        qo_indptr, kv_indptr, indices, kv_len_arr = arrays
        assert qo_indptr is not None and kv_indptr is not None and indices is not None and kv_len_arr is not None
        plan = _Plan(
            qo_indptr=host_ints("qo_indptr", qo_indptr),
            kv_indptr=host_ints("kv_indptr", kv_indptr),
            kv_lens=host_ints("kv_len_arr", kv_len_arr),
            num_heads=num_heads,
            widths=(head_dim_ckv, head_dim_kpe),
            page_size=page_size,
            causal=causal,
            scale=sm_scale,
            dtype=q_data_type or torch.float16,
        )
        _check_arrays(plan, len(indices))
        check(q_data_type == kv_data_type, "pages of another type than queries need scales, which are not used")
        check(plan.dtype in (torch.bfloat16, torch.float16), f"no kernel attends in {plan.dtype}")
        check(head_dim_ckv in _SIZES and head_dim_kpe % 64 == 0, f"no kernels for {plan.widths}")
        _check_work(plan)
        clusters = _NUM_SM // _cluster(plan)
        partial_bytes = 2 * (2 * head_dim_ckv + 4)  # of each packed query of a tile on each cluster
        check(len(self._workspace) >= clusters * _cluster(plan) * _TILE * partial_bytes, "the workspace is too small")
        if self._int_workspace is None or not self._is_for_graph:
            empty = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
            self._int_workspace = whole("int workspace", empty)
        pinned = _free_pinned.pop() if _free_pinned else torch.empty(8, dtype=torch.uint8, pin_memory=True)
        pinned.view(torch.int64).fill_(len(_plans))
        _plans.append(plan)
        upload(self._int_workspace[:8], pinned, non_blocking=True, what="a plan of latents")
        self._stage((qo_indptr, kv_indptr, indices, kv_len_arr))
        if self._pinned is not None:
            _free_pinned.append(self._pinned)
        self._pinned, self._plan = pinned, plan
        ASKED_FOR.add(f"{self._backend}mla_{head_dim_ckv}_{head_dim_kpe}")

    def _stage(self, arrays: tuple[Tensor, ...]) -> None:
        if not self._is_for_graph:
            self._buffers = tuple(each.to(self.device, non_blocking=True) for each in arrays)  # type: ignore[assignment]
            return
        for place, (reserved, array) in enumerate(zip(self._buffers, arrays, strict=True)):
            assert reserved is not None
            is_longer = place == 2 and len(reserved) >= len(array)
            check(is_longer or reserved.shape == array.shape, f"a graph's array of {len(reserved)} gets {len(array)}")
            reserved[: len(array)].copy_(array, non_blocking=True)

    def run(
        self,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        query: object = None,
        kv_cache: object = None,
    ) -> Tensor:
        plan, workspace = self._plan, self._int_workspace
        check(plan is not None, "run before plan")
        assert plan is not None and workspace is not None and out is not None and lse is None and not return_lse
        assert isinstance(query, DeviceTensor) and isinstance(kv_cache, DeviceTensor), "packed ones"
        queries, pages = rows("query", query, plan.dtype), rows("pages", kv_cache, plan.dtype)
        result = rows("out", out, plan.dtype)
        size = sum(plan.widths)
        check(query.dim() == kv_cache.dim() == 3, "queries and pages of three dimensions")
        check(query.shape == (plan.qo_indptr[-1], plan.num_heads, size), f"queries {tuple(query.shape)}")
        check(out.shape == (*query.shape[:2], plan.widths[0]), f"out {tuple(out.shape)}")
        check(kv_cache.shape[1:] == (plan.page_size, size), f"pages {tuple(kv_cache.shape)}")
        for each in (query, kv_cache, out):
            check(all(step * 2 % 16 == 0 for step in each.stride()[:-1]), f"rows apart by {each.stride()}")
        indices = whole("kv_indices", self._buffers[2], torch.int32)  # type: ignore[arg-type]

        def kernel() -> None:
            there = _plans[int(workspace[:8].view(torch.int64))]
            check(len(there.kv_lens) == len(plan.kv_lens), "the workspace holds a plan of other rows")
            _attend(queries, pages, result, there, indices)

        launch(kernel)
        return out


def _check_arrays(plan: _Plan, num_pages: int) -> None:
    """As the real wrapper does before any backend sees them."""
    for name, indptr in (("qo_indptr", plan.qo_indptr), ("kv_indptr", plan.kv_indptr)):
        check(len(indptr) == len(plan.kv_lens) + 1, f"{name} of other rows")
        check(indptr[0] == 0 and indptr == sorted(indptr), f"{name} does not rise from 0")
    pages = [-(-length // plan.page_size) for length in plan.kv_lens]
    found = [end - begin for begin, end in zip(plan.kv_indptr, plan.kv_indptr[1:], strict=False)]
    check(found == pages and plan.kv_indptr[-1] <= num_pages, "page counts do not go with lengths")
    check(len(plan.kv_lens) > 0, "a plan of no rows")


def _lengths(plan: _Plan) -> list[int]:
    return [end - begin for begin, end in zip(plan.qo_indptr, plan.qo_indptr[1:], strict=False)]


def _cluster(plan: _Plan) -> int:
    return 2 if plan.qo_indptr[-1] * plan.num_heads // len(plan.kv_lens) > _TILE else 1


def _check_work(plan: _Plan) -> None:
    """Refuse what fills the plan's arrays, and heads that leave a tile's last query without its last key."""
    tile, effective = _TILE * _cluster(plan), []
    for count, length in zip(_lengths(plan), plan.kv_lens, strict=True):
        num_tiles = -(-count * plan.num_heads // tile)
        for index in range(num_tiles):
            seen = min(length - count - (-(index + 1) * tile // plan.num_heads), length)
            effective.append(max(seen, 0) if plan.causal and index + 1 < num_tiles else length)
        for end in range(tile, count * plan.num_heads, tile) if plan.causal else ():
            query, rest = divmod(end, plan.num_heads)
            key = length - count + query
            check(not (rest and key % _KEY_TILE == 0), f"{plan.num_heads} heads lose a key at a tile's end")
    average = max(-(-sum(effective) // (_NUM_SM // _cluster(plan))), 1)
    steps = {8: 32, 16: 64, 32: 128, 64: 192}
    limit = next((size for most, size in steps.items() if average <= most), -(-average // 256) * 256)
    count = sum(max(1, -(-length // limit)) for length in effective)
    check(count <= _MAX_WORK_ITEMS, f"{count} work items; a plan has room for {_MAX_WORK_ITEMS}")


def _attend(q: Tensor, pages: Tensor, out: Tensor, plan: _Plan, indices: Tensor) -> None:
    """Attend row by row, in float32; pages are those that the arrays name now."""
    for row, length in enumerate(plan.kv_lens):
        begin, end = plan.qo_indptr[row], plan.qo_indptr[row + 1]
        ids = indices[plan.kv_indptr[row] : plan.kv_indptr[row + 1]].long()
        keys = pages[ids].flatten(0, 1)[:length].float()
        scores = torch.einsum("qhd,kd->hqk", q[begin:end].float(), keys) * plan.scale
        if plan.causal:
            place = torch.arange(length - (end - begin), length).unsqueeze(1)
            scores.masked_fill_(torch.arange(length) > place, float("-inf"))
        latents = keys[:, : plan.widths[0]]
        out[begin:end] = torch.einsum("hqk,kd->qhd", scores.softmax(-1), latents).to(out.dtype)
