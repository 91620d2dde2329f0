"""The page tensor: its types and copies of whole blocks."""

from __future__ import annotations

import pytest
import torch

from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.pages import allocate_pages, copy_blocks

CPU = torch.device("cpu")


def _spec(dtype: str) -> KVCacheSpec:
    return KVCacheSpec(model="m", num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_pages_take_the_bytes_that_the_spec_says(dtype: str) -> None:
    spec = _spec(dtype)
    pages = allocate_pages(spec, 5, tp_size=1, dtype=getattr(torch, dtype), device=CPU)
    assert pages[0, 0].numel() * pages.element_size() == spec.page_bytes()
    assert pages.numel() * pages.element_size() == 5 * spec.block_bytes()
    assert not pages.view(torch.uint8).any()


def test_workers_whose_pages_differ_in_type_do_not_fit() -> None:
    assert _spec("float8_e4m3fn").fingerprint != _spec("bfloat16").fingerprint


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_whole_blocks_are_copied_in_all_layers(dtype: str) -> None:
    pages = allocate_pages(_spec(dtype), 5, tp_size=1, dtype=getattr(torch, dtype), device=CPU)
    raw = pages.view(torch.uint8)
    raw.copy_(torch.randint(0, 60, raw.shape, dtype=torch.uint8))
    before = raw.clone()
    copy_blocks(pages, [(1, 3), (0, 4)], len(pages))
    assert torch.equal(raw[:, [3, 4]], before[:, [1, 0]])
    assert torch.equal(raw[:, :3], before[:, :3])
