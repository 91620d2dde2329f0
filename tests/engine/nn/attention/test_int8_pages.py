"""Torch's attention over pages of whole numbers: the formula over what those mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvferry.engine.nn.attention.choose import make_attention
from kvferry.engine.nn.attention.int8_rows import widened

from .test_tiled import HEADS, KV_HEADS, NUM_BLOCKS, _heads, _metadata

DIM = 16


def _garbage(block: int) -> Tensor:
    """Whatever an earlier owner left, scales that are no numbers among it."""
    pages = torch.randint(-128, 128, (2, NUM_BLOCKS, 2, KV_HEADS, block, DIM + 4), generator=torch.Generator())
    pages = pages.to(torch.int8)
    pages.flatten(-2)[..., block * DIM :].view(torch.float32).fill_(float("nan"))
    return pages


def _elements(pages: Tensor, dtype: torch.dtype) -> Tensor:
    layers, blocks, parts, heads, block, _ = pages.shape
    rows = pages.reshape(-1, block * (DIM + 4))
    return widened(rows, block, dtype).view(layers, blocks, parts, heads, block, DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("window", "block"), [(None, 16), (20, 8), (300, 128)])
def test_results_are_those_over_what_the_numbers_mean(
    window: int | None, block: int, deterministic: bool, dtype: torch.dtype
) -> None:
    torch.set_num_threads(1)
    pages = _garbage(block)
    make = {"deterministic": deterministic, "query_dtype": dtype}
    ours = make_attention("cpu", pages, HEADS, [window, None], **make)  # type: ignore[arg-type]
    lengths = [(0, 300), (0, 270), (0, 21), (0, 1)]
    steps = [[(0, count) for _, count in lengths], [(count, 1) for _, count in lengths[:3]] + [(1, 40)]]
    for step, rows in enumerate(steps):
        metadata = _metadata(rows, block)
        q, k, v = (part.to(dtype) for part in _heads(metadata.num_tokens + 2))
        for layer in (0, 1):
            ours.plan(metadata)
            found = ours.forward(q, k + step, v, layer).float()
            known = _elements(pages, dtype)
            slots = metadata.slot_mapping
            theirs = make_attention("cpu", known, HEADS, [window, None], deterministic=deterministic)
            theirs.plan(metadata)
            stored = [known[layer, slots // block, part, :, slots % block].clone() for part in (0, 1)]
            for rows_of, wanted in zip(stored, (k + step, v), strict=True):
                torch.testing.assert_close(rows_of.float(), wanted[: len(slots)].float(), atol=0.03, rtol=0.02)
            expected = theirs.forward(q, stored[0], stored[1], layer).float()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert found.isfinite().all() and not found[metadata.num_tokens :].any()
