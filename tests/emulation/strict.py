"""What the emulated device refuses, as a real one would or should: run by test_gpu_tests.py, on that device."""

from __future__ import annotations

import flashinfer
import pytest
import torch

from kvferry.tests.emulation import stream
from kvferry.tests.emulation.stream import COUNTS, Race

CUDA = torch.device("cuda")


def test_tensors_of_two_devices_do_not_go_together() -> None:
    with pytest.raises(RuntimeError, match="is on cpu"):
        torch.ones(3, device=CUDA) + torch.ones(3)
    assert (torch.ones(3, device=CUDA) + torch.tensor(2.0)).tolist() == [3.0] * 3
    with pytest.raises(TypeError, match="can't convert"):
        torch.ones(3, device=CUDA).numpy()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_are_torchs(device: str) -> None:
    x = torch.arange(12, device=device).view(3, 4).float()
    x[1] = 0
    x[:, [0, 2]] += 1
    x[x > 9] = -1
    index = torch.tensor([2, 0], device=device)
    found = torch.cat((x[index], x.softmax(-1)[:2].mul_(2)), 0).cpu()
    assert found.shape == (4, 4) and found.dtype == torch.float32
    expected = torch.tensor([[9.0, 9.0, -1.0, -1.0], [1.0, 1.0, 3.0, 3.0]])
    torch.testing.assert_close(found[:2], expected)
    torch.testing.assert_close(found[2:].sum(-1), torch.full((2,), 2.0))


def test_pinned_memory_stays_as_it_is_until_its_upload_is_waited_for() -> None:
    pinned, target = torch.ones(4, pin_memory=True), torch.zeros(4, device=CUDA)
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    pinned.fill_(2.0)
    target.copy_(pinned, non_blocking=True)
    pinned[1] = 3.0
    with pytest.raises(Race, match="before its upload"):
        torch.cuda.synchronize()


def test_what_was_not_waited_for_is_garbage() -> None:
    result = torch.empty(4, pin_memory=True).copy_(torch.ones(4, device=CUDA), non_blocking=True)
    event = stream.Event()
    event.record()
    assert not event.query() and not bool((result == 1).any())
    event.synchronize()
    assert event.query() and bool((result == 1).all())
    assert bool(torch.empty(3, device=CUDA).isnan().all())
    with pytest.raises(Race, match="non_blocking=True"):
        torch.ones(3, device=CUDA).to("cpu", non_blocking=True)


def test_pageable_uploads_are_counted() -> None:
    before = COUNTS["pageable uploads"]
    torch.ones(3).to(CUDA, non_blocking=True)
    torch.tensor([1, 2], device=CUDA)
    assert COUNTS["pageable uploads"] == before + 2


def test_a_graph_is_run_again_over_the_same_memory() -> None:
    source, total, index = (
        torch.ones(3, device=CUDA),
        torch.zeros(3, device=CUDA),
        torch.arange(2, -1, -1, device=CUDA),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = source * 2
        total += doubled[index]
    source.fill_(5.0)
    graph.replay()
    graph.replay()
    assert doubled.tolist() == [10.0] * 3 and total.tolist() == [22.0] * 3


def test_a_graph_makes_copies_again_that_a_reshape_made() -> None:
    source = torch.arange(6.0, device=CUDA).view(3, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turned = source.t().reshape(-1)
    source.mul_(2)
    graph.replay()
    assert turned.tolist() == [0.0, 4.0, 8.0, 2.0, 6.0, 10.0]


@pytest.mark.parametrize("what", ["upload", "read", "wait", "index", "replay"])
def test_a_capture_neither_waits_nor_copies(what: str) -> None:
    x, pinned, captured = torch.ones(3, device=CUDA), torch.ones(3, pin_memory=True), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        pass
    acts = {
        "upload": lambda: x.copy_(pinned, non_blocking=True),
        "read": lambda: float(x[0]),
        "wait": torch.cuda.synchronize,
        "index": lambda: x[[0, 1]],
        "replay": captured.replay,
    }
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            acts[what]()


def test_a_product_in_8_bits_has_cudas_layout() -> None:
    a, b = (torch.randn(n, 32).to(torch.float8_e4m3fn).to(CUDA) for n in (4, 48))
    rows, columns = torch.rand(4, 1, device=CUDA), torch.rand(1, 48, device=CUDA)
    found = torch._scaled_mm(a, b.t(), rows, columns, out_dtype=torch.bfloat16)
    expected = (a.float() @ b.float().t() * rows * columns).cpu()
    torch.testing.assert_close(found.float().cpu(), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="column-major"):
        torch._scaled_mm(a, b.t().contiguous(), rows, columns, out_dtype=torch.bfloat16)


def test_a_product_of_whole_numbers_takes_what_cudas_takes() -> None:
    a, b = (torch.randint(-127, 128, (n, 32), dtype=torch.int8).to(CUDA) for n in (17, 48))
    assert torch.equal(torch._int_mm(a, b.t()).cpu(), a.cpu().int() @ b.cpu().int().t())
    for rows, columns in ((a[:16], b.t()), (a, b[:44].t()), (a[:, :12], b[:, :12].t()), (a, b.t().contiguous())):
        with pytest.raises(RuntimeError, match="_int_mm"):
            torch._int_mm(rows, columns)


def test_a_grouped_product_takes_what_cudas_takes() -> None:
    a, b = (torch.randn(*shape).bfloat16().to(CUDA) for shape in ((6, 32), (2, 16, 32)))
    ends = torch.tensor([2, 5], dtype=torch.int32, device=CUDA)
    found = torch._grouped_mm(a, b.transpose(1, 2), offs=ends).float().cpu()
    torch.testing.assert_close(found[2:5], (a[2:5] @ b[1].t()).float().cpu(), rtol=1e-2, atol=1e-2)
    assert bool(found[5:].isnan().all()), "rows of no group are any numbers"
    for rows, groups, offs in (
        (a.float(), b.transpose(1, 2), ends),
        (a, b.transpose(1, 2), ends.long()),
        (a, b.transpose(1, 2), ends[:1]),
        (a, b.transpose(1, 2), ends + 2),
        (a, b[:, :10].transpose(1, 2).contiguous(), ends),
    ):
        with pytest.raises(RuntimeError, match="_grouped_mm"):
            torch._grouped_mm(rows, groups, offs=offs)


def test_a_grouped_product_in_8_bits_takes_what_cudas_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.randn(*shape).to(torch.float8_e4m3fn).to(CUDA) for shape in ((6, 32), (2, 16, 32)))
    rows, columns = torch.rand(6, device=CUDA), torch.rand(2, 16, device=CUDA)
    ends, turned = torch.tensor([2, 5], dtype=torch.int32, device=CUDA), b.transpose(1, 2)
    found = torch._scaled_grouped_mm(a, turned, rows, columns, offs=ends).float().cpu()
    expected = (a.float()[2:5] @ b.float()[1].t() * rows[2:5].unsqueeze(1) * columns[1]).cpu()
    torch.testing.assert_close(found[2:5], expected, rtol=1e-2, atol=1e-2)
    assert bool(found[5:].isnan().all()), "rows of no group are any numbers"
    for numbers, groups, row_scales, column_scales, offs in (
        (a.bfloat16(), turned.bfloat16(), rows, columns, ends),
        (a, turned.contiguous(), rows, columns, ends),
        (a[:, :24], b[:, :, :24].transpose(1, 2), rows, columns, ends),
        (a, turned, rows.unsqueeze(1), columns, ends),
        (a, turned, rows, columns[:1], ends),
        (a, turned, rows, columns, ends.long()),
    ):
        with pytest.raises(RuntimeError, match="grouped_mm"):
            torch._scaled_grouped_mm(numbers, groups, row_scales, column_scales, offs=offs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    with pytest.raises(RuntimeError, match="no kernel for this card"):
        torch._scaled_grouped_mm(a, turned, rows, columns, offs=ends)


def test_norms_of_another_library_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says which norms are meant before it imports the package; nobody has here."""
    monkeypatch.setattr(flashinfer.norm, "_USE_CUDA_NORM", False)
    x = torch.ones(2, 16, dtype=torch.bfloat16, device=CUDA)
    with pytest.raises(RuntimeError, match="FLASHINFER_USE_CUDA_NORM"):
        flashinfer.norm.rmsnorm(x, x[0])


LATENTS = {"num_heads": 4, "head_dim_ckv": 512, "head_dim_kpe": 64, "page_size": 16, "causal": True, "sm_scale": 0.1}
BFLOAT16 = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


def _latents() -> flashinfer.BatchMLAPagedAttentionWrapper:
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=CUDA)
    return flashinfer.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")


def _csr(queries: list[int], pages: list[int], kv_lens: list[int]) -> flashinfer.mla.MLAPlanMetadata:
    queries_, pages_, kv_lens_ = (torch.tensor(each, dtype=torch.int32) for each in (queries, pages, kv_lens))
    indices = torch.arange(pages[-1], dtype=torch.int32, device=CUDA)
    return flashinfer.mla.MLAPlanMetadata.csr(queries_, pages_, indices, kv_lens_)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metadata": ([0, 1], [0, 1], [17])}, "page counts"),
        ({"metadata": ([0, 1], [0, 1, 2], [17])}, "of other rows"),
        ({"head_dim_ckv": 96}, "no kernels"),
        ({"q_data_type": torch.float32, "kv_data_type": torch.float32}, "no kernel attends in"),
        ({"kv_data_type": torch.float8_e4m3fn}, "need scales"),
        ({"num_heads": 128, "metadata": ([0, 16384 + 1], [0, 1025], [16400])}, "work items"),
        ({"num_heads": 6, "metadata": ([0, 64], [0, 7], [107])}, "lose a key"),
    ],
)
def test_plans_over_latents_are_refused_that_no_kernel_carries_out(changes: dict[str, object], reason: str) -> None:
    arrays = changes.pop("metadata", ([0, 2], [0, 2], [17]))
    metadata = _csr(*arrays)  # type: ignore[misc]
    with pytest.raises(RuntimeError, match=reason):
        _latents().plan(**(LATENTS | BFLOAT16 | {"metadata": metadata} | changes))


def test_latents_are_attended_to_as_planned() -> None:
    wrapper = _latents()
    q = torch.zeros(2, 4, 576, dtype=torch.bfloat16, device=CUDA)
    pages = torch.zeros(2, 16, 576, dtype=torch.bfloat16, device=CUDA)
    with pytest.raises(RuntimeError, match="before plan"):
        wrapper.run(query=q, kv_cache=pages, out=q[..., :512].contiguous())
    wrapper.plan(**LATENTS, **BFLOAT16, metadata=_csr([0, 2], [0, 2], [17]))
    for query, cache in ((q[:1], pages), (q, pages[..., :512]), (q.float(), pages), (q[:, :3], pages)):
        with pytest.raises(RuntimeError):
            wrapper.run(query=query, kv_cache=cache, out=query[..., :512].contiguous())
    assert not wrapper.run(query=q, kv_cache=pages, out=q[..., :512].contiguous()).any()
    index = torch.zeros(2, dtype=torch.int32, device=CUDA)
    with pytest.raises(RuntimeError, match="512"):
        flashinfer.append_paged_mla_kv_cache(
            *(q[:, 0, :256], q[:, 0, :64], index, index, pages[..., :256], pages[..., :64], index, index, index[:1])
        )


INT4 = torch.ops.aten._weight_int4pack_mm


def _packed(num_inputs: int = 128, tiles: int = 8) -> torch.Tensor:
    numbers = torch.zeros(16, num_inputs // 2, dtype=torch.uint8, device=CUDA)
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack(numbers, tiles)
    return packed


def test_nibbles_are_multiplied_by() -> None:
    packed = _packed()
    assert packed.shape == (2, 1, 32, 4) and packed.dtype == torch.int32
    factors = torch.tensor([0.5, 1.0], device=CUDA).bfloat16().expand(4, 16, 2).contiguous()
    x = torch.ones(3, 128, dtype=torch.bfloat16, device=CUDA)
    assert INT4(x, packed, 32, factors).tolist() == [[128 * (0.5 * -8 + 1)] * 16] * 3


@pytest.mark.parametrize(
    "what", ["float32", "turned", "group", "inputs", "scales", "order of scales", "no rows", "card"]
)
def test_products_of_nibbles_are_refused_that_cuda_refuses(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, factors = _packed(), torch.ones(4, 16, 2, dtype=torch.bfloat16, device=CUDA)
    x, group_size = torch.ones(3, 128, dtype=torch.bfloat16, device=CUDA), 32
    match what:
        case "float32":
            x = x.float()
        case "turned":
            x = torch.ones(128, 3, dtype=torch.bfloat16, device=CUDA).t()
        case "group":
            group_size = 16
        case "inputs":
            x = torch.ones(3, 256, dtype=torch.bfloat16, device=CUDA)
        case "scales":
            factors = factors.float()
        case "order of scales":
            factors = torch.ones(16, 4, 2, dtype=torch.bfloat16, device=CUDA).transpose(0, 1)
        case "no rows":
            x = x[:0]
        case "card":
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(RuntimeError, match="int4"):
        INT4(x, packed, group_size, factors)


@pytest.mark.parametrize(
    ("shape", "dtype", "tiles"),
    [((16, 64), torch.int32, 8), ((12, 64), torch.uint8, 8), ((16, 48), torch.uint8, 4), ((16, 64), torch.uint8, 1)],
)
def test_numbers_are_not_packed_that_cuda_does_not_pack(shape: tuple[int, int], dtype: torch.dtype, tiles: int) -> None:
    with pytest.raises(RuntimeError, match="int4"):
        torch.ops.aten._convert_weight_to_int4pack(torch.zeros(shape, dtype=dtype, device=CUDA), tiles)
