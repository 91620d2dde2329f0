"""Attention over pages against the textbook formula, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.attention.base import AttentionMetadata
from kvferry.engine.nn.attention.choose import make_attention
from kvferry.engine.nn.attention.paged_torch import CPUAttention

BLOCK = 16


def _pages(*, layers: int = 1, blocks: int = 64, kv_heads: int = 2, head_dim: int = 16) -> Tensor:
    return torch.zeros(layers, blocks, 2, kv_heads, BLOCK, head_dim)


def _metadata(rows: list[tuple[int, int]], num_blocks: int, block: int = BLOCK) -> AttentionMetadata:
    """`rows`: (kv_len before the step, tokens fed). Blocks are scattered over the pool."""
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    qo, kv, indices, last, lens, slots = [0], [0], [], [], [], []
    for start, count in rows:
        end = start + count
        blocks = [free.pop() for _ in range(-(-end // block))]
        indices += blocks
        slots += [blocks[p // block] * block + p % block for p in range(start, end)]
        qo.append(qo[-1] + count)
        kv.append(len(indices))
        last.append((end - 1) % block + 1)
        lens.append(end)
    num_decode = next((i for i, (_, count) in enumerate(rows) if count != 1), len(rows))
    i32 = torch.int32
    return AttentionMetadata(
        num_decode_rows=num_decode,
        qo_indptr=torch.tensor(qo, dtype=i32),
        paged_kv_indptr=torch.tensor(kv, dtype=i32),
        paged_kv_indices=torch.tensor(indices, dtype=i32),
        paged_kv_last_page_len=torch.tensor(last, dtype=i32),
        kv_lens=tuple(lens),
        slot_mapping=torch.tensor(slots),
    )


def _fill_history(pages: Tensor, metadata: AttentionMetadata, generator: torch.Generator) -> None:
    """Random K and V, NaN where no row has a token: an earlier owner may have left that."""
    history = torch.randn(pages.shape, generator=generator)
    pages.fill_(float("nan"))
    for row, kv_len in enumerate(metadata.kv_lens):
        first, last = metadata.paged_kv_indptr[row : row + 2].tolist()
        blocks = metadata.paged_kv_indices[first:last].long()
        for place, block in enumerate(blocks.tolist()):
            owned = slice(0, min(BLOCK, kv_len - place * BLOCK))
            pages[:, block, :, :, owned] = history[:, block, :, :, owned]


def _expected(pages: Tensor, q: Tensor, metadata: AttentionMetadata, layer: int, window: int | None) -> Tensor:
    out = torch.zeros_like(q)
    group = q.shape[1] // pages.shape[3]
    for row, kv_len in enumerate(metadata.kv_lens):
        first, last = metadata.paged_kv_indptr[row : row + 2].tolist()
        blocks = metadata.paged_kv_indices[first:last].long()
        keys, values = (pages[layer, blocks, side].transpose(1, 2).flatten(0, 1)[:kv_len] for side in (0, 1))
        begin, end = metadata.qo_indptr[row : row + 2].tolist()
        for token in range(begin, end):
            position = kv_len - (end - token)
            start = 0 if window is None else max(0, position - window + 1)
            for head in range(q.shape[1]):
                k, v = keys[start : position + 1, head // group], values[start : position + 1, head // group]
                weights = torch.softmax(k @ q[token, head] / math.sqrt(q.shape[2]), 0)
                out[token, head] = weights @ v
    return out


def _run(
    rows: list[tuple[int, int]],
    *,
    window: int | None = None,
    num_qo_heads: int = 4,
    padding: int = 0,
    cache_bytes: int = 1 << 20,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pages = _pages()
    metadata = _metadata(rows, pages.shape[1])
    _fill_history(pages, metadata, generator)
    tokens = metadata.num_tokens + padding
    heads = torch.randn(tokens, num_qo_heads + 4, 16, generator=generator)
    q, k, v = torch.split(heads, [num_qo_heads, 2, 2], 1)
    backend = CPUAttention(pages, num_qo_heads, [window], cache_bytes=cache_bytes)
    backend.plan(metadata)
    out = backend.forward(q, k, v, 0).clone()
    written = metadata.slot_mapping
    stored = pages[0, written // BLOCK, 0, :, written % BLOCK]
    assert torch.equal(stored, k[: metadata.num_tokens])
    return out, _expected(pages, q[: metadata.num_tokens], metadata, 0, window), q


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
@pytest.mark.parametrize(
    "rows",
    [
        [(0, 1)],
        [(15, 1), (16, 1), (200, 1), (31, 1)],
        [(0, 16)],
        [(0, 70)],
        [(37, 90)],
        [(64, 3), (0, 5)],
        [(7, 1), (99, 1), (20, 33), (0, 130), (48, 2)],
    ],
    ids=str,
)
def test_equals_the_formula(rows: list[tuple[int, int]], window: int | None) -> None:
    out, expected, _ = _run(rows, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("num_qo_heads", [2, 6])
def test_query_heads_share_kv_heads_in_order(num_qo_heads: int) -> None:
    out, expected, _ = _run([(20, 1), (3, 40)], num_qo_heads=num_qo_heads)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_attended_with_in_float32() -> None:
    """What comes out is float32's result of what is stored, rounded once."""
    rows = [(20, 1), (99, 1), (3, 40), (0, 130)]
    stored = _pages().bfloat16()
    metadata = _metadata(rows, stored.shape[1])
    generator = torch.Generator().manual_seed(5)
    stored.copy_(torch.randn(stored.shape, generator=generator))
    heads = torch.randn(metadata.num_tokens, 8, 16, generator=generator).bfloat16()
    q, k, v = torch.split(heads, [4, 2, 2], 1)
    wide = stored.float()
    backends = [
        make_attention("cpu", stored, 4, [None], query_dtype=torch.bfloat16, is_wide=True),
        make_attention("cpu", wide, 4, [None]),
    ]
    for backend in backends:
        backend.plan(metadata)
    out, expected = backends[0].forward(q, k, v, 0), backends[1].forward(q.float(), k.float(), v.float(), 0)
    assert out.dtype == torch.bfloat16 and torch.equal(stored[0].float(), wide[0])
    # Queries are multiplied by the scale in their own type.
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=2**-7)


def test_padding_rows_come_back_as_zeros() -> None:
    out, expected, _ = _run([(20, 1)], padding=3)
    torch.testing.assert_close(out[:1], expected, rtol=1e-5, atol=2e-6)
    assert not out[1:].any()


def test_layers_use_their_own_window_and_pages() -> None:
    generator = torch.Generator().manual_seed(0)
    pages = _pages(layers=2)
    metadata = _metadata([(30, 1), (0, 20)], pages.shape[1])
    _fill_history(pages, metadata, generator)
    backend = CPUAttention(pages, 2, [None, 4])
    backend.plan(metadata)
    for layer, window in enumerate((None, 4)):
        q, k, v = torch.split(torch.randn(21, 6, 16, generator=generator), 2, 1)
        out = backend.forward(q, k, v, layer)
        torch.testing.assert_close(out, _expected(pages, q, metadata, layer, window), rtol=1e-5, atol=2e-6)


def test_little_memory_makes_tiles_and_groups_small() -> None:
    """The same result where nothing is done together: one head, few queries, one decode row at a time."""
    out, expected, _ = _run([(300, 1), (20, 1), (200, 50)], cache_bytes=1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_scores_stay_within_their_memory_at_32k_tokens() -> None:
    pages = torch.zeros(1, 2048, 2, 2, BLOCK, 16, dtype=torch.bfloat16)
    backend = CPUAttention(pages, 16, [None])
    backend.plan(_metadata([(32_640, 128)], 2048))
    heads = torch.randn(128, 20, 16).bfloat16()
    backend.forward(heads[:, :16], heads[:, 16:18], heads[:, 18:], 0)
    assert backend._scratch["scores"].nbytes <= 32 << 20


def test_bfloat16_is_close_to_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    pages = _pages()
    metadata = _metadata([(60, 1), (10, 40)], pages.shape[1])
    _fill_history(pages, metadata, generator)
    q, k, v = torch.split(torch.randn(41, 8, 16, generator=generator), [4, 2, 2], 1)
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        backend = CPUAttention(pages.to(dtype).clone(), 4, [None])
        backend.plan(metadata)
        outs.append(backend.forward(q.to(dtype), k.to(dtype), v.to(dtype), 0).float())
    torch.testing.assert_close(outs[0], outs[1], rtol=0.05, atol=0.05)


def test_unknown_combination_of_backend_and_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        make_attention("flashinfer", _pages(), 4, [None])
    assert isinstance(make_attention("auto", _pages(), 4, [None]), CPUAttention)
