"""Whole numbers in pages: what was written is read within half a step, and nothing else of a page changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.engine.nn.attention.int8_rows import quantized, stored_head_dim, widened, write_rows
from kvferry.kvcache.pages import allocate_pages

BLOCK, DIM = 8, 16
SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=DIM, block_size=BLOCK, dtype="int8")


def _pages(tp_size: int = 1) -> Tensor:
    return allocate_pages(SPEC, 6, tp_size=tp_size, dtype=torch.int8, device=torch.device("cpu"))


@given(st.integers(-40, 35), st.integers(0, 2**31))
def test_a_number_is_read_within_half_a_step(power: int, seed: int) -> None:
    rows = torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    numbers, scales = quantized(rows)
    found = numbers.float() * scales.unsqueeze(-1)
    assert ((found - rows).abs() <= scales.unsqueeze(-1) * 0.5001 + 127 * torch.finfo(torch.float32).tiny).all()
    assert numbers.abs().max() <= 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    rows = torch.ones(2, DIM)
    rows[1, 5] = bad
    numbers, scales = quantized(rows)
    assert scales[0].isfinite() and (numbers[1].float() * scales[1]).isnan().all()


def test_zeros_stay_zeros() -> None:
    numbers, scales = quantized(torch.zeros(2, DIM))
    assert not numbers.any() and not scales.any()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_each_row_has_a_place_of_its_own(tp_size: int) -> None:
    pages = _pages(tp_size)
    heads = 4 // tp_size
    assert pages.nbytes == 6 * SPEC.block_bytes(tp_size) and stored_head_dim(pages) == DIM
    layer, generator = pages[1], torch.Generator().manual_seed(1)
    every = [(block, offset) for block in range(6) for offset in range(BLOCK)]
    blocks, offsets = (torch.tensor(column) for column in zip(*every, strict=True))
    keys, values = (torch.randn(len(every), heads, DIM, generator=generator) for _ in range(2))
    for part, rows in enumerate((keys, values)):
        write_rows(layer, part, blocks, offsets, rows)
    before = pages.clone()
    write_rows(layer, 0, torch.tensor([3]), torch.tensor([5]), keys[:1] * 9)
    changed = (pages != before).nonzero()
    assert {tuple(place[:3].tolist()) for place in changed} == {(1, 3, 0)}
    heads_of_blocks = layer.reshape(6 * 2 * heads, -1)
    found = widened(heads_of_blocks, BLOCK, torch.float32).view(6, 2, heads, BLOCK, DIM)
    for part, rows in enumerate((keys, values)):
        expected = rows.view(6, BLOCK, heads, DIM).transpose(1, 2).clone()
        if part == 0:
            expected[3, :, 5] = keys[0] * 9
        torch.testing.assert_close(found[:, part], expected, atol=0.2, rtol=0.01)
    assert not pages[0].any()


def test_a_page_is_a_little_more_than_half_of_bfloat16s() -> None:
    wide = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=DIM, block_size=BLOCK, dtype="bfloat16")
    assert SPEC.page_bytes() * 2 * DIM == wide.page_bytes() * (DIM + 4)
    assert SPEC.fingerprint != wide.fingerprint
