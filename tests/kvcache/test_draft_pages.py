"""A draft model's layers in the pages of its target: each has its own numbers, and a block has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.attention.int8_rows import widened, write_rows
from kvferry.kvcache.draft_pages import draft_layers, num_draft_pages
from kvferry.kvcache.pages import copy_blocks
from kvferry.models.config import ModelConfig

from ..checkpoints import Shape, write_checkpoint

NUM_BLOCKS, BLOCK_SIZE = 5, 4
TARGET = Shape(num_layers=2, num_kv_heads=4, num_qo_heads=4, head_dim=16)
DRAFTS = {  # the pages of a block for it
    "the target itself": (TARGET, 2),
    "one layer to a page": (Shape(num_layers=3, num_kv_heads=3, num_qo_heads=3, head_dim=16), 3),
    "five layers to a page": (Shape(num_layers=7, num_kv_heads=3, num_qo_heads=3, head_dim=8), 4),
    "a head of another size": (Shape(num_layers=3, num_kv_heads=1, num_qo_heads=2, head_dim=32), 2),
}


def config_of(shape: Shape, path: Path) -> ModelConfig:
    return ModelConfig.from_dir(write_checkpoint(path, shape=shape, tokenizer=False))


@pytest.mark.parametrize("name", DRAFTS)
def test_every_number_of_a_draft_has_a_place_of_its_own_in_its_block(name: str, tmp_path: Path) -> None:
    shape, expected = DRAFTS[name]
    target, draft = config_of(TARGET, tmp_path / "target"), config_of(shape, tmp_path / "draft")
    assert num_draft_pages(target, draft) == expected
    pages = torch.zeros(2 + expected, NUM_BLOCKS, 2, 4, BLOCK_SIZE, 16)
    layers = draft_layers(pages, target, draft)
    count = layers[0][0].numel()
    assert [tuple(layer.shape) for layer in layers] == [
        (NUM_BLOCKS, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim)
    ] * shape.num_layers
    for number, layer in enumerate(layers):
        layer[:] = torch.arange(1, count + 1).view(layer[0].shape) + number * count
    for number, layer in enumerate(layers):
        assert torch.equal(layer[3].flatten(), torch.arange(1, count + 1).float() + number * count)
    assert not pages[:2].any()
    whole = sorted(pages[:, 3].flatten()[pages[:, 3].flatten() != 0].tolist())
    assert whole == list(range(1, 1 + len(layers) * count))
    layers[0][1] = 0
    copy_blocks(pages, [(3, 1)], len(pages))
    assert all(torch.equal(layer[1], layer[3]) for layer in layers)


@pytest.mark.parametrize("shape", [Shape(num_kv_heads=8, num_qo_heads=8), Shape(head_dim=24, num_kv_heads=1)])
def test_heads_that_do_not_fit_into_a_page_are_refused(shape: Shape, tmp_path: Path) -> None:
    target, draft = config_of(TARGET, tmp_path / "target"), config_of(shape, tmp_path / "draft")
    with pytest.raises(ConfigError, match="draft model do not fit into pages of the model, which has 4 of 16"):
        num_draft_pages(target, draft)


@pytest.mark.parametrize("name", ["the target itself", "one layer to a page", "a head of another size"])
def test_whole_numbers_of_a_draft_have_their_scales_beside_them(name: str, tmp_path: Path) -> None:
    target, draft = config_of(TARGET, tmp_path / "target"), config_of(DRAFTS[name][0], tmp_path / "draft")
    if name == "a head of another size":
        with pytest.raises(ConfigError, match="which has 4 of 16; in int8, with scales, heads"):
            num_draft_pages(target, draft, "int8")
        return
    num_pages = num_draft_pages(target, draft, "int8")
    pages = torch.zeros(2 + num_pages, NUM_BLOCKS, 2, 4, BLOCK_SIZE, 20, dtype=torch.int8)
    layers = draft_layers(pages, target, draft)
    generator = torch.Generator().manual_seed(3)
    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    drawn = [torch.randn(len(slots), draft.num_kv_heads, draft.head_dim, generator=generator) for _ in layers]
    for layer, rows in zip(layers, drawn, strict=True):
        for part in (0, 1):
            write_rows(layer, part, slots // BLOCK_SIZE, slots % BLOCK_SIZE, rows * (1 + part))
    for layer, rows in zip(layers, drawn, strict=True):
        cells = layer.reshape(-1, BLOCK_SIZE * layer.shape[-1])
        found = widened(cells, BLOCK_SIZE, torch.float32).view(NUM_BLOCKS, 2, -1, BLOCK_SIZE, draft.head_dim)
        for part in (0, 1):
            written = found[:, part].transpose(1, 2).reshape(rows.shape)
            torch.testing.assert_close(written, rows * (1 + part), atol=0.05, rtol=0.02)
