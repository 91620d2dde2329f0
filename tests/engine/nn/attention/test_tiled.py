"""Attention in tiles: what `CPUAttention` computes, and to the bit the same however tokens come."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from kvferry.engine.nn.attention.base import AttentionMetadata
from kvferry.engine.nn.attention.choose import make_attention
from kvferry.engine.nn.attention.tiled import TiledAttention

HEADS, KV_HEADS, DIM, NUM_BLOCKS = 6, 2, 16, 300


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _metadata(rows: list[tuple[int, int]], block: int) -> AttentionMetadata:
    """`rows`: (tokens before the step, tokens fed). Row i always has the same blocks, scattered over the pool."""
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [order[row :: len(rows)][: -(-(start + count) // block)] for row, (start, count) in enumerate(rows)]
    slots = [
        table[p // block] * block + p % block
        for table, (start, count) in zip(tables, rows, strict=True)
        for p in range(start, start + count)
    ]

    def indptr(counts: list[int]) -> Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int()

    return AttentionMetadata(
        num_decode_rows=next((i for i, (_, count) in enumerate(rows) if count != 1), len(rows)),
        qo_indptr=indptr([count for _, count in rows]),
        paged_kv_indptr=indptr([len(table) for table in tables]),
        paged_kv_indices=torch.tensor([block for table in tables for block in table], dtype=torch.int32),
        paged_kv_last_page_len=torch.tensor([(start + count - 1) % block + 1 for start, count in rows]).int(),
        kv_lens=tuple(start + count for start, count in rows),
        slot_mapping=torch.tensor(slots),
    )


def _heads(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q * 3, k, v


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("window", [None, 20, 300])
def test_results_are_those_of_the_other_backend(window: int | None, block: int) -> None:
    rows = [(0, 1), (255, 1), (256, 1), (300, 1), (0, 270), (13, 9), (250, 20)]
    metadata = _metadata(rows, block)
    q, k, v = _heads(metadata.num_tokens + 3)
    pages = torch.randn(2, NUM_BLOCKS, 2, KV_HEADS, block, DIM, generator=torch.Generator().manual_seed(2))
    _forget_the_rest(pages, metadata)
    results = []
    for deterministic in (True, False):
        own = pages.clone()
        backend = make_attention("cpu", own, HEADS, [window, None], deterministic=deterministic)
        backend.plan(metadata)
        results += [(backend.forward(q, k, v, layer).clone(), own) for layer in (0, 1)]
    for (ours, our_pages), (theirs, pages) in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert ours.isfinite().all() and not ours[metadata.num_tokens :].any()
        assert torch.equal(our_pages.nan_to_num(9e9), pages.nan_to_num(9e9))


def _forget_the_rest(pages: Tensor, metadata: AttentionMetadata) -> None:
    """NaN behind each row's last token: an earlier owner of its last page may have left that."""
    lasts = metadata.paged_kv_indices[metadata.paged_kv_indptr[1:].long() - 1].tolist()
    for block, length in zip(lasts, metadata.paged_kv_last_page_len.tolist(), strict=True):
        pages[:, block, :, :, length:] = float("nan")


@pytest.mark.parametrize("window", [None, 20, 300])
def test_a_tokens_result_is_that_of_the_whole_prompt_to_the_bit(window: int | None) -> None:
    length, rng = 560, random.Random(4)
    q, k, v = _heads(length)
    pages = torch.zeros(1, NUM_BLOCKS, 2, KV_HEADS, 16, DIM)
    attention = TiledAttention(pages, HEADS, [window])
    attention.plan(_metadata([(0, length)], 16))
    expected = attention.forward(q, k, v, 0)
    pages.zero_()
    start = 0
    while start < length:
        count = min(length - start, rng.choice([1, 3, 8, 50, 200]))
        attention.plan(_metadata([(start, count)], 16))
        chunk = slice(start, start + count)
        assert torch.equal(attention.forward(q[chunk], k[chunk], v[chunk], 0), expected[chunk]), (start, count)
        start += count


def test_layers_whose_pages_lie_between_others_give_the_same() -> None:
    rows = [(0, 1), (300, 1), (13, 9)]
    metadata = _metadata(rows, 16)
    q, k, v = _heads(metadata.num_tokens)
    whole = torch.randn(2, NUM_BLOCKS, 2, KV_HEADS, 16, DIM, generator=torch.Generator().manual_seed(2))
    mixed = torch.full((NUM_BLOCKS, 3, 2, KV_HEADS, 16, DIM), 7.0)
    apart = [mixed[:, 2], mixed[:, 0]]
    for ours, theirs in zip(apart, whole, strict=True):
        ours.copy_(theirs)
    alone, between = TiledAttention(whole, HEADS, [None, 20]), TiledAttention(apart, HEADS, [None, 20])
    for layer in (0, 1):
        for attention in (alone, between):
            attention.plan(metadata)
        assert torch.equal(between.forward(q, k, v, layer), alone.forward(q, k, v, layer))
        assert torch.equal(apart[layer], whole[layer])
    assert (mixed[:, 1] == 7.0).all()
