"""Rows that are cut to what a window or a chunk reads see what whole rows see, and no other page is theirs."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engine.nn.attention.base import AttentionMetadata
from kvferry.engine.nn.attention.cut_rows import ChunkCut, Cut, WindowCut
from kvferry.engine.nn.attention.paged_torch import CPUAttention
from kvferry.models.parts.chunks import Chunk

from .test_paged_torch import BLOCK, _fill_history, _metadata, _pages

ROWS = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 70)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_attention_is_the_same(rows: list[tuple[int, int]], blocks_of_chunk: int) -> None:
    """Of keys that a row leaves out, and of those that nobody has written, a cut row reads none."""
    rows, chunk = sorted(rows, key=lambda row: row[1] != 1), BLOCK * blocks_of_chunk
    metadata, generator = _metadata(rows, 128), torch.Generator().manual_seed(0)
    pages = _pages(blocks=128)
    _fill_history(pages, metadata, generator)
    q, k, v = (torch.randn(metadata.num_tokens, heads, 16, generator=generator) for heads in (4, 2, 2))
    found, cut = [], ChunkCut(chunk, BLOCK)
    for window, plan in ((Chunk(chunk), metadata), (None, cut.rows(metadata))):
        attention = CPUAttention(pages.clone(), 4, [window])
        attention.plan(plan)
        found.append(attention.forward(q, k, v, 0).clone())
    torch.testing.assert_close(found[1], found[0])
    _check_pages(cut, metadata)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 60))
def test_attention_of_windows_is_the_same(rows: list[tuple[int, int]], window: int) -> None:
    """What a row leaves out may be anything, were it no number."""
    rows = sorted(rows, key=lambda row: row[1] != 1)
    metadata, generator = _metadata(rows, 128), torch.Generator().manual_seed(0)
    cut, pages = WindowCut(window, BLOCK), _pages(blocks=128)
    _fill_history(pages, metadata, generator)
    q, k, v = (torch.randn(metadata.num_tokens, heads, 16, generator=generator) for heads in (4, 2, 2))
    found = []
    for plan in (metadata, cut.rows(metadata)):
        attention = CPUAttention(pages.clone(), 4, [window])
        attention.plan(plan)
        found.append(attention.forward(q, k, v, 0).clone())
    torch.testing.assert_close(found[1], found[0])
    _check_pages(cut, metadata)


def _check_pages(cut: Cut, metadata: AttentionMetadata) -> None:
    """Check that rows of one token have as many pages as a graph works out."""
    counts = cut.rows(metadata).paged_kv_indptr.diff()
    assert (counts[: metadata.num_decode_rows] <= cut.max_pages).all() and (counts > 0).all()
    positions = torch.tensor(metadata.kv_lens[: metadata.num_decode_rows], dtype=torch.int32) - 1
    expected = positions // BLOCK + 1 - cut.first_page(positions)
    assert torch.equal(counts[: metadata.num_decode_rows], expected)


def test_rows_of_one_token_lead_and_tokens_go_where_they_went() -> None:
    metadata = _metadata([(0, 1), (95, 1), (96, 1), (30, 40)], 64)
    cut = ChunkCut(32, BLOCK).rows(metadata)
    assert cut.num_decode_rows == 3 and cut.kv_lens == (1, 32, 1, 32, 32, 6)
    assert cut.qo_indptr.diff().tolist() == [1, 1, 1, 2, 32, 6]
    assert cut.paged_kv_indptr.diff().tolist() == [1, 2, 1, 2, 2, 1]
    assert cut.paged_kv_last_page_len.tolist() == [1, 16, 1, 16, 16, 6]
    assert torch.equal(cut.slot_mapping, metadata.slot_mapping)
    [of_third] = metadata.paged_kv_indices[int(metadata.paged_kv_indptr[3]) - 1 :][:1]
    assert cut.paged_kv_indices[3] == of_third, "the last of seven blocks, which its chunk begins with"
    _check_pages(ChunkCut(32, BLOCK), metadata)  # at the first and the last token of a chunk, too
