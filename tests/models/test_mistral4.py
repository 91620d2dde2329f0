"""Mistral 4's config.json, as published: latents, queries that grow, experts in stacks, beside what sees."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.families.experts import Stacks
from kvferry.models.native import not_in_native
from kvferry.models.parts.expert_stacks import Block, Shape, StackPart
from kvferry.sizing.work import count_params

from ..sizing.models import model_of, model_of_text

NAME = "mistral-small-4"


def test_it_is_read_as_its_language_model(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert model.family.name == "mistral4" and model.latent is not None
    assert (model.latent.kv_rank, model.latent.q_rank, model.latent.rope_dim) == (256, 1024, 64)
    assert math.isclose(model.latent.score_scale, 128**-0.5 * (0.1 * math.log(128) + 1) ** 2)
    rope = model.rope
    assert (rope.kind, rope.fraction, rope.attention_factor) == ("yarn", 1.0, 1.0)
    assert (rope.query_beta, rope.query_len) == (0.1, 8192)
    experts = model.experts
    assert experts is not None and (experts.scoring, experts.normalised, experts.stacks) == ("softmax", True, Stacks())
    assert all(model.sparse_layers) and model.longest_model_len == 2**20
    assert not_in_native(model, model.quantization, is_float32=False) == []


def test_parameters_are_as_many_as_published(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert sum(map(math.prod, tensor_shapes(model).values())) == pytest.approx(119e9, rel=2e-3)
    counted, experts = count_params(model), model.experts
    assert experts is not None
    active = counted.layers + counted.experts * experts.num_chosen / experts.num_experts + counted.head
    assert active == pytest.approx(6.1e9, rel=0.05)  # 6.5 billion with the vectors of tokens, which are looked up


def _parts(tmp_path: Path, shapes: Mapping[str, Shape], block: Block | None = None) -> dict[str, list[StackPart]]:
    """Return the parts of a layer's stacks, by the ends of their names."""
    experts, layer = model_of(tmp_path, NAME).experts, "model.layers.3.mlp.experts"
    assert experts is not None
    found = experts.parts_in({f"{layer}.{name}": shape for name, shape in shapes.items()}, 4096, lambda module: block)
    return {name.removeprefix(f"{layer}."): parts for name, parts in found.items()}


def test_stacks_in_8_bits_have_scales_of_each_expert(tmp_path: Path) -> None:
    layer = "model.layers.3.mlp.experts"
    stacks = {
        "gate_up_proj_scale_inv": (128, 1, 1),
        "down_proj_activation_scale": (128,),
        "down_proj": (128, 4096, 2048),
    }
    parts = _parts(tmp_path, stacks)
    scales = parts["gate_up_proj_scale_inv"]
    assert len(scales) == 256 and scales[5] == StackPart(f"{layer}.2.up_proj.weight_scale_inv", (), 2, 0, False)
    assert parts["down_proj_activation_scale"][0].name == f"{layer}.0.down_proj.activation_scale"
    matrices = parts["down_proj"]
    assert len(matrices) == 128 and matrices[7].name == f"{layer}.7.down_proj.weight"
    assert not _parts(tmp_path, {"gate_up_proj_scale_inv": (128, 32, 32)})  # of blocks, of which config.json tells none


@pytest.mark.parametrize("is_transposed", [False, True])
def test_scales_of_blocks_stand_as_the_stacks_numbers_do(tmp_path: Path, is_transposed: bool) -> None:
    """Gate's are before up's. Of blocks alone it could not be told: here they are as many one way as the other."""
    whole, scales = (4096, 2048), (128, 8, 8)
    stacks = {"down_proj": (128, *(whole[::-1] if is_transposed else whole)), "down_proj_scale_inv": scales}
    first = _parts(tmp_path, stacks, (512, 256))["down_proj_scale_inv"][0]
    assert (first.shape, first.start, first.is_transposed) == ((8, 8), 0, is_transposed)
    both = {"gate_up_proj": (128, 4096, 4096), "gate_up_proj_scale_inv": (128, 16, 64)}
    gate, up = _parts(tmp_path, both, (256, 64))["gate_up_proj_scale_inv"][:2]
    assert (gate.shape, gate.start, up.shape, up.start) == ((8, 64), 0, (8, 64), 8)
    assert "gate_up_proj_scale_inv" not in _parts(tmp_path, both, (128, 64))  # as many as other blocks would have
    with pytest.raises(
        ConfigError, match="gate_up_proj_scale_inv: a block of 384 outputs is of two matrices: each has 2"
    ):
        _parts(tmp_path, both, (384, 64))


def test_groups_of_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_group = 4: groups of experts are not supported in this family"):
        model_of_text(tmp_path, NAME, n_group=4, topk_group=2)


def test_another_part_of_heads_than_latents_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5: only rotary positions over the whole head"):
        model_of_text(tmp_path, NAME, qk_nope_head_dim=128)
