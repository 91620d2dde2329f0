"""FlashInfer against the CPU backend, on a CUDA device."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.attention.base import AttentionMetadata, Scores
from kvferry.engine.nn.attention.choose import make_attention
from kvferry.engine.nn.attention.latent_flashinfer import FlashInferLatentAttention
from kvferry.engine.nn.attention.paged_torch import CPUAttention

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
has_flashinfer = importlib.util.find_spec("flashinfer") is not None


def _metadata() -> AttentionMetadata:
    """Two decode rows (20 and 33 tokens) and a chunk of 10 tokens after 7."""
    i32 = torch.int32
    return AttentionMetadata(
        num_decode_rows=2,
        qo_indptr=torch.tensor([0, 1, 2, 12], dtype=i32),
        paged_kv_indptr=torch.tensor([0, 2, 5, 7], dtype=i32),
        paged_kv_indices=torch.tensor([9, 4, 1, 7, 3, 12, 0], dtype=i32),
        paged_kv_last_page_len=torch.tensor([4, 1, 1], dtype=i32),
        kv_lens=(20, 33, 17),
        slot_mapping=torch.tensor([4 * 16 + 3, 3 * 16, *range(12 * 16 + 7, 12 * 16 + 16), 0]),
    )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize("num_qo_heads", [2, 8, 16])
@pytest.mark.parametrize("window", [None, 5])
def test_flashinfer_agrees_with_the_cpu_backend(num_qo_heads: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 16, 2, 2, 16, 64, generator=generator).bfloat16()
    heads = torch.randn(12, num_qo_heads + 4, 64, generator=generator).bfloat16()
    cpu = CPUAttention(pages.float(), num_qo_heads, [None, window])
    gpu = make_attention("flashinfer", pages.cuda(), num_qo_heads, [None, window])
    cpu.plan(_metadata())
    gpu.plan(_metadata())
    on_gpu = heads.cuda()
    for layer in range(2):
        q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
        expected = cpu.forward(q.float(), k.float(), v.float(), layer)
        ours = torch.split(on_gpu, [num_qo_heads, 2, 2], 1)  # parts of one tensor, as the model gives them
        out = gpu.forward(ours[0], ours[1], ours[2], layer).cpu().float()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize("num_qo_heads", [2, 8])
def test_sinks_are_heeded_and_scores_capped(num_qo_heads: int) -> None:
    """Capped low enough to matter, and with sinks that take next to nothing, some, and nearly all."""
    generator = torch.Generator().manual_seed(3)
    pages = torch.randn(2, 16, 2, 2, 16, 64, generator=generator).bfloat16()
    heads = torch.randn(12, num_qo_heads + 4, 64, generator=generator).bfloat16()
    sinks = [torch.linspace(-9, 9, num_qo_heads).bfloat16(), torch.linspace(7, -7, num_qo_heads).bfloat16()]
    q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
    cap = 1.5 if num_qo_heads == 8 else None  # kernels for both: of tensor cores alone
    both = Scores(scale=0.3, cap=cap, sinks=sinks)
    for window, own in ((5, Scores(sinks=sinks)), (5, Scores(cap=cap)), (None, both)):
        there = [sink.cuda() for sink in own.sinks or ()]
        cpu = CPUAttention(pages.float(), num_qo_heads, [None, window], own)
        on_gpu = Scores(scale=own.scale, cap=own.cap, sinks=there or None)
        gpu = make_attention("flashinfer", pages.cuda(), num_qo_heads, [None, window], scores=on_gpu)
        cpu.plan(_metadata())
        gpu.plan(_metadata())
        for layer in range(2):
            expected = cpu.forward(q.float(), k.float(), v.float(), layer)
            out = gpu.forward(q.cuda(), k.cuda(), v.cuda(), layer).cpu().float()
            torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def _e4m3(x: Tensor, scale: float) -> Tensor:
    return x.float().div(scale).clamp(-448, 448).to(torch.float8_e4m3fn).float().mul(scale)


is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize(
    "narrow", [False, pytest.param(True, marks=pytest.mark.skipif(not is_hopper, reason="Hopper's"))]
)
@pytest.mark.parametrize("num_qo_heads", [2, 8])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.02, 0.5)])
def test_pages_in_8_bits_are_attended_to_as_what_they_stand_for(
    num_qo_heads: int, scales: tuple[float, float], narrow: bool
) -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    generator = torch.Generator().manual_seed(1)
    heads = torch.randn(12, num_qo_heads + 4, 64, generator=generator).bfloat16()
    q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
    stored = torch.randn(1, 16, 2, 2, 16, 64, generator=generator).to(torch.float8_e4m3fn)
    factors = torch.tensor(scales).view(1, 1, 2, 1, 1, 1)
    cpu = CPUAttention(stored.float() * factors, num_qo_heads, [None])
    pages = stored.cuda()
    gpu = FlashInferAttention(
        pages, num_qo_heads, query_dtype=torch.bfloat16, kv_scales=[scales], narrow_queries=narrow
    )
    cpu.plan(_metadata())
    gpu.plan(_metadata())
    queries = q.float()
    if narrow:
        queries[2:] = _e4m3(queries[2:], 1.0)  # of the chunk alone
    expected = cpu.forward(queries, _e4m3(k, scales[0]), _e4m3(v, scales[1]), 0)
    out = gpu.forward(q.cuda(), k.cuda(), v.cuda(), 0).cpu().float()
    tolerance = 6e-2 if narrow else 3e-2  # Hopper's kernel rounds probabilities to 8 bits, too
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))
    written = pages[0, 4, 0, :, 3].float().cpu() * scales[0]  # the first row's token
    assert torch.equal(written, _e4m3(k[0], scales[0]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize("is_uneven", [False, True])
def test_each_layer_has_its_window_and_its_scales_whatever_part_it_is_in(is_uneven: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    dims = (64, 128, 64, 128) if is_uneven else (64,) * 4
    windows, scales = [5, None, 20, None], [(0.5, 0.02), (1.0, 0.25), (0.1, 2.0), (2.0, 0.5)]
    stored = [torch.randn(16, 2, 2, 16, dim, generator=generator).to(torch.float8_e4m3fn) for dim in dims]
    wide = [
        pages.float() * torch.tensor(scale).view(1, 2, 1, 1, 1) for pages, scale in zip(stored, scales, strict=True)
    ]
    there = [pages.cuda() for pages in stored]
    gpu = make_attention(
        "flashinfer",
        there if is_uneven else torch.stack(there),
        8,
        windows,
        query_dtype=torch.bfloat16,
        kv_scales=scales,
    )
    gpu.plan(_metadata())
    for layer, dim in enumerate(dims):
        cpu = CPUAttention([wide[layer]], 8, [windows[layer]])
        cpu.plan(_metadata())
        q, k, v = torch.split(torch.randn(12, 12, dim, generator=generator).bfloat16(), [8, 2, 2], 1)
        keys, values = (_e4m3(x, scale) for x, scale in zip((k, v), scales[layer], strict=True))
        expected = cpu.forward(q.float(), keys, values, 0)
        out = gpu.forward(q.cuda(), k.cuda(), v.cuda(), layer).cpu().float()
        torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize("num_qo_heads", [2, 8])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_captured_decode_follows_new_plans(num_qo_heads: int, window: int | None, dtype: torch.dtype) -> None:
    """One graph, captured on short rows, replayed on long ones: what a plan changes must not be in the graph."""
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention
    from kvferry.engine.nn.attention.page_index import PageIndex

    size, block, num_blocks, capacity = 4, 16, 600, 2000
    generator = torch.Generator().manual_seed(2)
    pages = torch.randn(1, num_blocks, 2, 2, block, 64, generator=generator).cuda().to(dtype)
    heads = torch.randn(size, num_qo_heads + 4, 64, generator=generator).cuda().bfloat16()
    attention = FlashInferAttention(pages, num_qo_heads, window, query_dtype=torch.bfloat16)
    index = PageIndex(
        row_of_token=torch.arange(size, dtype=torch.int32, device="cuda"),
        positions=torch.zeros(size, dtype=torch.int32, device="cuda"),
        paged_kv_indptr=torch.zeros(size + 1, dtype=torch.int32, device="cuda"),
        paged_kv_indices=torch.zeros(capacity, dtype=torch.int32, device="cuda"),
        paged_kv_last_page_len=torch.ones(size, dtype=torch.int32, device="cuda"),
    )
    captured = attention.for_graph(index)

    def prepare(lens: list[int]) -> AttentionMetadata:
        counts = torch.tensor([-(-n // block) for n in lens])
        indptr = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
        indices = torch.randperm(num_blocks, generator=generator)[: int(indptr[-1])].int()
        last = torch.tensor([(n - 1) % block + 1 for n in lens], dtype=torch.int32)
        index.positions.copy_(torch.tensor(lens) - 1)
        index.paged_kv_indices[: len(indices)].copy_(indices)
        captured.plan(indptr.pin_memory(), last.pin_memory(), len(indices))
        return AttentionMetadata(
            num_decode_rows=size,
            qo_indptr=torch.arange(size + 1, dtype=torch.int32),
            paged_kv_indptr=indptr,
            paged_kv_indices=indices,
            paged_kv_last_page_len=last,
            kv_lens=tuple(lens),
            slot_mapping=indices[indptr[1:] - 1].long() * block + last - 1,
        )

    q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
    with torch.inference_mode():
        prepare([1, 2, 1, 3])
        captured.forward(q, k, v, 0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = captured.forward(q, k, v, 0)
        for lens in ([1, 1, 1, 1], [17, 300, 5, 64], [3000, 2000, 1, 700], [4000, 1, 1, 1], [9, 8, 7, 6]):
            metadata = prepare(lens)
            graph.replay()
            torch.cuda.synchronize()
            found = out.clone()
            attention.plan(metadata)
            torch.testing.assert_close(found, attention.forward(q, k, v, 0), rtol=1e-2, atol=1e-2, msg=str(lens))


@pytest.mark.skipif(has_flashinfer, reason="flashinfer is installed")
def test_missing_flashinfer_names_the_extra() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match="pip install 'flashinfer-python"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 64, dtype=torch.bfloat16), 4)


def test_heads_of_another_size_are_refused() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match="heads of 64, 128, 256, 512 numbers, the model's have 80"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 80, dtype=torch.bfloat16), 4)


def test_pages_in_8_bits_need_queries_that_are_not() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    pages = torch.zeros(1, 4, 2, 2, 16, 64, dtype=torch.uint8).view(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match="attend in 16 bits, not in float8_e4m3fn"):
        FlashInferAttention(pages, 4)


def test_queries_in_8_bits_need_pages_in_8_bits() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match="needs pages in 8 bits: --kv-cache-dtype fp8"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 64, dtype=torch.bfloat16), 4, narrow_queries=True)


def test_queries_in_8_bits_do_not_go_with_sinks_and_caps() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    pages = torch.zeros(1, 4, 2, 2, 16, 64, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for scores, what in ((Scores(cap=50.0), "capped scores"), (Scores(sinks=[torch.zeros(4)]), "sinks")):
        with pytest.raises(ConfigError, match=f"attends without {what}, which the model has; use auto"):
            FlashInferAttention(pages, 4, query_dtype=torch.bfloat16, narrow_queries=True, scores=scores)


def test_numbers_too_large_for_8_bits_are_cut_off() -> None:
    from kvferry.engine.nn.attention.flashinfer_package import to_e4m3

    x = torch.tensor([0.0, 1.0, 450.0, 1e4, -1e30]).bfloat16()
    assert to_e4m3(x, 1.0).float().tolist() == [0.0, 1.0, 448.0, 448.0, -448.0]
    assert to_e4m3(x, 100.0).float().tolist() == [0.0, pytest.approx(0.01, rel=0.1), 4.5, 96.0, -448.0]


def test_each_token_knows_its_row_and_position() -> None:
    from kvferry.engine.nn.attention.page_index import upload_step

    step = upload_step(_metadata(), torch.device("cpu"), [torch.tensor([7, 8, 9], dtype=torch.int32)])
    index = step.index
    assert [part.tolist() for part in step.more] == [[7, 8, 9]]
    assert (step.chunk_qo_indptr.tolist(), step.chunk_kv_indptr.tolist()) == ([0, 10], [0, 2])
    assert (step.chunk_kv_lens.tolist(), index.paged_kv_indices.tolist()) == ([17], [9, 4, 1, 7, 3, 12, 0])
    assert index.row_of_token.tolist() == [0, 1] + [2] * 10
    assert index.positions.tolist() == [19, 32, *range(7, 17)]
    assert {part.dtype for part in (index.row_of_token, index.positions, index.paged_kv_indptr)} == {torch.int32}


def test_float32_is_refused() -> None:
    from kvferry.engine.nn.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match="not in float32; use bfloat16"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 64), 4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")
@pytest.mark.parametrize(("num_heads", "latent_dim"), [(1, 512), (4, 512), (16, 512), (4, 256)])
def test_latents_are_attended_to_as_on_the_cpu(num_heads: int, latent_dim: int) -> None:
    generator, size = torch.Generator().manual_seed(2), latent_dim + 64
    pages = torch.randn(2, 16, 1, 1, 16, size, generator=generator).bfloat16()
    heads = torch.randn(12, num_heads + 1, size, generator=generator).bfloat16()
    scores = Scores(scale=0.05, value_dim=latent_dim)
    wide, there = pages.float(), pages.cuda()
    cpu = CPUAttention(wide, num_heads, [None, None], scores)
    gpu = FlashInferLatentAttention(there, num_heads, scores)
    cpu.plan(_metadata())
    gpu.plan(_metadata())
    on_gpu = heads.cuda()
    for layer in range(2):
        q, kept = torch.split(heads.float(), [num_heads, 1], 1)
        expected = cpu.forward(q, kept, kept[..., :latent_dim], layer)
        asked, shown = torch.split(on_gpu, [num_heads, 1], 1)
        out = gpu.forward(asked, shown, shown[:, :0], layer).cpu().float()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(there.cpu().float(), wide), "both have written the same"
    with pytest.raises(ConfigError, match="latents in float32"):
        FlashInferLatentAttention(pages.float().cuda(), num_heads, scores)
