"""The paged attention wrappers: `plan` on the host and its upload, then `run`.

A plan is a number that lies in the integer workspace, uploaded from the wrapper's own pinned memory as the real one's
arrays are: a kernel that runs after another plan was uploaded there is an error, at a graph's replay too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvferry.tests.emulation.memory import DeviceTensor, upload
from kvferry.tests.emulation.stream import forbid_in_capture, launch

from .checks import check, host_ints, rows, whole

_INT_WORKSPACE_BYTES = 8 << 20
_GROUPS = (1, 2, 3, 4, 6, 8, 16)  # query heads of a KV head that decode without tensor cores is compiled for
_HEAD_DIMS = (64, 128, 256, 512)
_OLDER_HEAD_DIM = 512  # kernels of the older kind alone, for numbers of 16 bits
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
ASKED_FOR: set[str] = set()  # kinds of native modules: fa2_64, decode_64_window, fa3_128_fp8 …


@dataclass(frozen=True)
class _Plan:
    """The part of a call of `plan` that `run` and its kernel need."""

    owner: int  # id of the wrapper
    qo_indptr: tuple[int, ...]
    kv_indptr: tuple[int, ...]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    window_left: int
    scale: float
    cap: float | None
    q_dtype: torch.dtype
    kv_dtype: torch.dtype
    o_dtype: torch.dtype


_plans: list[_Plan] = []  # a plan's number is its place here


class _Wrapper:
    """The buffers that both kinds have."""

    kind = ""

    def __init__(self, float_workspace: Tensor, kv_layout: str, buffers: tuple[Tensor | None, ...]) -> None:
        check(kv_layout == "HND", f"layout {kv_layout} is not used")
        self.device = float_workspace.device
        self._buffers = buffers
        self._plan: _Plan | None = None
        int_workspace = torch.empty(_INT_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self.reset_workspace_buffer(float_workspace, int_workspace)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        self._float_workspace = whole("float workspace", float_workspace_buffer, torch.uint8)
        self._int_workspace = whole("int workspace", int_workspace_buffer, torch.uint8)
        check(len(self._int_workspace) >= _INT_WORKSPACE_BYTES, "the int workspace is too small")
        self._pinned = torch.empty(int_workspace_buffer.shape, dtype=torch.uint8, pin_memory=True)

    def _upload(self, plan: _Plan) -> None:
        forbid_in_capture("plan")
        self._plan = plan
        self._pinned[:8].view(torch.int64).fill_(len(_plans))
        _plans.append(plan)
        upload(self._int_workspace[:8], self._pinned[:8], non_blocking=True, what="a plan")

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert isinstance(paged_kv_cache, Tensor) and not args and out is not None and self._plan is not None
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=self.device) if return_lse else None
        scale = self._plan.scale * (q_scale or 1.0) * (k_scale or 1.0)
        self._attend(q, paged_kv_cache, (out, lse), self._buffers, scale)  # type: ignore[arg-type]
        if v_scale not in (None, 1.0):
            out.mul_(v_scale)
        return out if lse is None else (out, lse)

    def _attend(
        self, q: Tensor, pages: Tensor, results: tuple[Tensor, Tensor | None], index: tuple[Tensor, ...], scale: float
    ) -> None:
        """`results`: out, and the logarithms of sums if asked for. `index`: indptr, indices and last_page_len on the
        device.
        """
        out, log_sums = results
        plan = self._plan
        check(plan is not None, "run before plan")
        assert plan is not None
        queries, cache = rows("q", q, plan.q_dtype), rows("pages", pages, plan.kv_dtype)
        result, sums = whole("out", out), None if log_sums is None else whole("lse", log_sums, torch.float32)
        check(out.dtype == plan.o_dtype, f"out is {out.dtype}, planned {plan.o_dtype}")
        check(out.shape == q.shape == (plan.qo_indptr[-1], plan.num_qo_heads, plan.head_dim), f"q {tuple(q.shape)}")
        check(q.stride(0) * q.element_size() % 16 == 0, "rows of q are no multiple of 16 bytes apart")
        check(cache.shape[1:] == (2, plan.num_kv_heads, plan.page_size, plan.head_dim), f"pages {tuple(cache.shape)}")
        indptr, indices, last = (whole(name, each, torch.int32) for name, each in zip("pil", index, strict=True))
        workspace = self._int_workspace

        def kernel() -> None:
            # By the plan that is there now: a replayed graph follows later plans of its wrapper.
            there = _plans[int(workspace[:8].view(torch.int64))]
            check(there.owner == plan.owner, "the workspace holds another wrapper's plan")
            check(len(there.kv_indptr) == len(plan.kv_indptr), "the workspace holds a plan of other rows")
            check(tuple(indptr[: len(there.kv_indptr)].tolist()) == there.kv_indptr, "indptr is not the planned one")
            attend(queries, cache, (result, sums), there, indices, last.tolist(), scale)

        launch(kernel)


def attend(
    q: Tensor,
    pages: Tensor,
    results: tuple[Tensor, Tensor | None],
    plan: _Plan,
    indices: Tensor,
    last_page_len: list[int],
    scale: float,
) -> None:
    """Attend row by row, in float32."""
    out, log_sums = results
    group, first = plan.num_qo_heads // plan.num_kv_heads, plan.kv_indptr[0]
    all_ids = indices[first : plan.kv_indptr[-1]].long()
    raw = pages.view(torch.uint8)[all_ids].view(pages.dtype) if pages.dtype.itemsize == 1 else pages[all_ids]
    taken = raw.float().permute(1, 2, 0, 3, 4).flatten(2, 3)  # [2, kv_heads, keys of all rows, dim]
    for row, last in enumerate(last_page_len[: len(plan.kv_indptr) - 1]):
        begin, end = plan.qo_indptr[row], plan.qo_indptr[row + 1]
        first_page, end_page = plan.kv_indptr[row] - first, plan.kv_indptr[row + 1] - first
        count = (end_page - first_page - 1) * plan.page_size + last
        keys, values = taken.narrow(2, first_page * plan.page_size, count).unbind()  # [kv_heads, keys, dim]
        queries = q[begin:end].float().view(end - begin, plan.num_kv_heads, group, plan.head_dim).permute(1, 2, 0, 3)
        shape = plan.num_kv_heads, group, end - begin
        scores = (queries.flatten(1, 2) @ keys.transpose(1, 2)).view(*shape, count) * scale
        if plan.cap is not None:
            scores = plan.cap * torch.tanh(scores / plan.cap)
        if end - begin > 1 or plan.window_left >= 0:
            distance = torch.arange(count - (end - begin), count).unsqueeze(1) - torch.arange(count)
            hidden = distance < 0
            if plan.window_left >= 0:
                hidden |= distance > plan.window_left
            scores.masked_fill_(hidden, float("-inf"))
        weights = scores.softmax(-1)
        if log_sums is not None:  # to base 2, as the kernels write them
            log_sums[begin:end] = (scores.logsumexp(-1) / math.log(2)).permute(2, 0, 1).flatten(1)
        found = (weights.flatten(1, 2) @ values).view(*shape, plan.head_dim).permute(2, 0, 1, 3)
        out[begin:end] = found.flatten(1, 2)


def _note(kind: str, plan: _Plan) -> None:
    check(plan.head_dim in _HEAD_DIMS, f"no kernels for heads of {plan.head_dim}")
    is_older = plan.head_dim == _OLDER_HEAD_DIM
    check(not is_older or (kind == "fa2" and plan.kv_dtype in _SIXTEEN_BITS), f"heads of 512 on {kind}")
    check(plan.num_qo_heads % plan.num_kv_heads == 0, f"{plan.num_qo_heads} query heads of {plan.num_kv_heads}")
    check(plan.o_dtype in _SIXTEEN_BITS, f"no kernel writes {plan.o_dtype}")
    if plan.q_dtype.itemsize == 1:
        check(kind == "fa3" and plan.kv_dtype == plan.q_dtype, f"8-bit queries on {kind} over {plan.kv_dtype}")
        check(plan.cap is None, "8-bit queries with capped scores")
    flags = {"window": plan.window_left >= 0, "cap": plan.cap is not None, "fp8": plan.kv_dtype.itemsize == 1}
    ASKED_FOR.add("_".join([kind, str(plan.head_dim), *(flag for flag, is_set in flags.items() if is_set)]))


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        check(backend == "fa2" and jit_args is None, f"decode on {backend} is not used")
        buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        check(use_cuda_graph == all(isinstance(each, DeviceTensor) for each in buffers), "buffers of a graph")
        super().__init__(float_workspace_buffer, kv_layout, buffers)
        self._is_for_graph, self._use_tensor_cores = use_cuda_graph, use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        kv_indptr, num_rows = host_ints("indptr", indptr), len(last_page_len)
        check(len(kv_indptr) == num_rows + 1, "indptr and last_page_len are of different rows")
        if self._is_for_graph:
            into_indptr, into_indices, into_last = self._buffers
            assert into_indptr is not None and into_indices is not None and into_last is not None
            check(num_rows == len(into_last), f"{num_rows} rows in a graph of {len(into_last)}")
            check(len(indices) <= len(into_indices), "more pages than the graph has room for")
            into_indptr.copy_(indptr, non_blocking=non_blocking)
            into_last.copy_(last_page_len, non_blocking=non_blocking)
            is_there = isinstance(indices, DeviceTensor)
            into_indices[: len(indices)].copy_(indices, non_blocking=is_there and non_blocking)
        else:
            self._buffers = tuple(
                each.to(self.device, non_blocking=non_blocking) for each in (indptr, indices, last_page_len)
            )
            torch.arange(num_rows + 1, dtype=torch.int32).to(self.device, non_blocking=non_blocking)
        assert isinstance(q_data_type, torch.dtype) and sm_scale is not None, "the product says both"
        plan = _Plan(
            owner=id(self),
            qo_indptr=tuple(range(num_rows + 1)),
            kv_indptr=tuple(kv_indptr),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            causal=False,
            window_left=window_left,
            scale=sm_scale,
            cap=logits_soft_cap,
            q_dtype=q_data_type,
            kv_dtype=kv_data_type or q_data_type,
            o_dtype=o_data_type or q_data_type,
        )
        if not self._use_tensor_cores:
            group = num_qo_heads // num_kv_heads
            check(group in _GROUPS, f"no decode kernel without tensor cores for groups of {group}")
        _note("fa2" if self._use_tensor_cores else "decode", plan)
        self._upload(plan)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
        variant_owns_mask: bool = False,
    ) -> None:
        check(not use_cuda_graph and backend in ("auto", "fa2") and jit_args is None, "no such prefill is used")
        super().__init__(float_workspace_buffer, kv_layout, ())
        self._backend = backend
        self._kv_lens = torch.empty(32768, dtype=torch.int32, device=self.device)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: torch.dtype | None = None,
        o_data_type: torch.dtype | None = None,
        non_blocking: bool = True,
        seq_lens: Tensor | None = None,
    ) -> None:
        queries, kv_indptr = host_ints("qo_indptr", qo_indptr), host_ints("paged_kv_indptr", paged_kv_indptr)
        last = host_ints("paged_kv_last_page_len", paged_kv_last_page_len)
        check(len(queries) == len(kv_indptr) == len(last) + 1, "arrays of different rows")
        lengths = [
            (end - begin - 1) * page_size + n for begin, end, n in zip(kv_indptr, kv_indptr[1:], last, strict=False)
        ]
        kv_lens = torch.tensor(lengths, dtype=torch.int32) if seq_lens is None else seq_lens
        check(host_ints("seq_lens", kv_lens) == lengths, "seq_lens do not go with the pages")
        self._kv_lens[: len(last)].copy_(kv_lens, non_blocking=non_blocking)
        qo_indptr.to(self.device, non_blocking=non_blocking)
        self._buffers = tuple(
            each.to(self.device, non_blocking=non_blocking)
            for each in (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        )
        assert isinstance(q_data_type, torch.dtype) and sm_scale is not None and causal, "the product says all"
        plan = _Plan(
            owner=id(self),
            qo_indptr=tuple(queries),
            kv_indptr=tuple(kv_indptr),
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim_qk,
            page_size=page_size,
            causal=True,
            window_left=window_left,
            scale=sm_scale,
            cap=logits_soft_cap,
            q_dtype=q_data_type,
            kv_dtype=kv_data_type or q_data_type,
            o_dtype=o_data_type or q_data_type,
        )
        is_newest = self._backend == "auto" and plan.kv_dtype == plan.q_dtype
        _note("fa3" if is_newest else "fa2", plan)
        self._upload(plan)
