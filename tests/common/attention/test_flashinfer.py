"""FlashInfer against the CPU backend, on a CUDA device."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kvferry.common.attention.base import AttentionMetadata
from kvferry.common.attention.cpu import CPUAttention
from kvferry.common.errors import ConfigError

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
    from kvferry.common.attention.flashinfer import FlashInferAttention

    generator = torch.Generator().manual_seed(0)
    pages = torch.randn(2, 16, 2, 2, 16, 64, generator=generator).bfloat16()
    heads = torch.randn(12, num_qo_heads + 4, 64, generator=generator).bfloat16()
    cpu = CPUAttention(pages.float(), num_qo_heads, [None, window])
    gpu = FlashInferAttention(pages.cuda(), num_qo_heads, [None, window])
    cpu.plan(_metadata())
    gpu.plan(_metadata())
    for layer in range(2):
        q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
        expected = cpu.forward(q.float(), k.float(), v.float(), layer)
        out = gpu.forward(q.cuda(), k.cuda(), v.cuda(), layer).cpu().float()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(has_flashinfer, reason="flashinfer is installed")
def test_missing_flashinfer_names_the_extra() -> None:
    from kvferry.common.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[gpu\]'"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 64, dtype=torch.bfloat16), 4, [None])


def test_float32_is_refused() -> None:
    from kvferry.common.attention.flashinfer import FlashInferAttention

    with pytest.raises(ConfigError, match="use --dtype bfloat16"):
        FlashInferAttention(torch.zeros(1, 4, 2, 2, 16, 64), 4, [None])
