"""A draft model's layers in the pages of its target: each has its own numbers, and a block has them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.engine.nn.attention.int8_rows import widened, write_rows
from kvferry.kvcache.draft_pages import draft_pages
from kvferry.kvcache.pages import copy_blocks
from kvferry.models.config import ModelConfig
from kvferry.transfer.protocol.shards import pieces

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
    laid_out = draft_pages(target, draft)
    assert laid_out.num_pages == expected
    pages = torch.zeros(2 + expected, NUM_BLOCKS, 2, 4, BLOCK_SIZE, 16)
    layers = laid_out.layers(pages)
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
        draft_pages(target, draft)


@pytest.mark.parametrize("name", ["the target itself", "one layer to a page", "a head of another size"])
def test_whole_numbers_of_a_draft_have_their_scales_beside_them(name: str, tmp_path: Path) -> None:
    target, draft = config_of(TARGET, tmp_path / "target"), config_of(DRAFTS[name][0], tmp_path / "draft")
    if name == "a head of another size":
        with pytest.raises(ConfigError, match="which has 4 of 16; in int8, with scales, heads"):
            draft_pages(target, draft, "int8")
        return
    laid_out = draft_pages(target, draft, "int8")
    pages = torch.zeros(2 + laid_out.num_pages, NUM_BLOCKS, 2, 4, BLOCK_SIZE, 20, dtype=torch.int8)
    layers = laid_out.layers(pages)
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


def spec_of(target: Shape, num_pages: int) -> KVCacheSpec:
    return KVCacheSpec(
        model="",
        num_layers=target.num_layers + num_pages,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        block_size=BLOCK_SIZE,
        dtype="float32",
    )


def shipped(sources: list[torch.Tensor], targets: list[torch.Tensor], spec: KVCacheSpec) -> None:
    """Write block 2 of each source rank's pages where the target ranks want it, as block 4."""
    for rank, source in enumerate(sources):
        for number, target in enumerate(targets):
            shards = spec.shard(rank, len(sources)), spec.shard(number, len(targets))
            for piece in pieces(*shards, spec) or ():
                for layer in range(spec.num_layers):
                    run = source[layer, 2].flatten().view(torch.uint8)[piece.local_offset :][: piece.num_bytes]
                    target[layer, 4].view(-1).view(torch.uint8)[piece.remote_offset :][: piece.num_bytes] = run


@pytest.mark.parametrize(
    ("kv_heads", "shape", "sizes"),
    [
        (4, Shape(num_layers=3, num_kv_heads=4, num_qo_heads=4, head_dim=16), (1, 2, 4)),
        (4, Shape(num_layers=5, num_kv_heads=4, num_qo_heads=4, head_dim=8), (1, 2, 4)),
        (4, Shape(num_layers=9, num_kv_heads=2, num_qo_heads=4, head_dim=8), (1, 2)),
        (2, Shape(num_layers=3, num_kv_heads=2, num_qo_heads=4, head_dim=8), (1, 2, 4)),  # heads that two ranks have
    ],
)
def test_a_handoff_between_unlike_numbers_of_ranks_brings_each_its_heads_of_the_draft(
    kv_heads: int, shape: Shape, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    served = Shape(num_layers=2, num_kv_heads=kv_heads, num_qo_heads=4, head_dim=16)
    target, draft = config_of(served, tmp_path / "target"), config_of(shape, tmp_path / "draft")
    laid_out = {size: draft_pages(target, draft, num_ranks=size) for size in sizes}
    [num_pages] = {each.num_pages for each in laid_out.values()}
    assert {each.name for each in laid_out.values()} == {"by heads"}
    spec = spec_of(served, num_pages)

    def ranks(size: int) -> list[torch.Tensor]:
        return [torch.zeros(2 + num_pages, NUM_BLOCKS, *spec.page_shape(size)) for _ in range(size)]

    def heads(rank: int, size: int) -> slice:
        first = rank * draft.num_kv_heads // size
        return slice(first, first + max(1, draft.num_kv_heads // size))

    whole = torch.arange(1.0, 1 + draft.num_layers * 2 * draft.num_kv_heads * BLOCK_SIZE * draft.head_dim)
    numbers = whole.view(draft.num_layers, 2, draft.num_kv_heads, BLOCK_SIZE, draft.head_dim)
    for ours in sizes:
        for theirs in sizes:
            sources, targets = ranks(ours), ranks(theirs)
            for rank, pages in enumerate(sources):
                for layer, wanted in zip(laid_out[ours].layers(pages), numbers, strict=True):
                    layer[2] = wanted[:, heads(rank, ours)]
            shipped(sources, targets, spec)
            for rank, pages in enumerate(targets):
                for layer, wanted in zip(laid_out[theirs].layers(pages), numbers, strict=True):
                    assert torch.equal(layer[4], wanted[:, heads(rank, theirs)]), (ours, theirs, rank)


@pytest.mark.parametrize(
    ("shape", "num_ranks", "name"),
    [
        (Shape(num_kv_heads=2, num_qo_heads=4, head_dim=16), 4, "of 4 ranks"),  # a head of the draft's on two of them
        (Shape(num_kv_heads=3, num_qo_heads=3, head_dim=16), 1, "of 1 ranks"),  # a head's part left empty
        (Shape(num_kv_heads=2, num_qo_heads=4, head_dim=16), 2, "by heads"),
    ],
)
def test_a_layout_that_other_numbers_of_ranks_do_not_share_is_named_after_its_own(
    shape: Shape, num_ranks: int, name: str, tmp_path: Path
) -> None:
    target, draft = config_of(TARGET, tmp_path / "target"), config_of(shape, tmp_path / "draft")
    laid_out = draft_pages(target, draft, num_ranks=num_ranks)
    assert laid_out.name == name
    pages = torch.zeros(2 + laid_out.num_pages, NUM_BLOCKS, 2, 4 // num_ranks, BLOCK_SIZE, 16)
    for number, layer in enumerate(laid_out.layers(pages), 1):
        layer[:] = number
    for number, layer in enumerate(laid_out.layers(pages), 1):
        assert (layer == number).all(), "no layer lies where another one does"
