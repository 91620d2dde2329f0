"""Mistral 4's config.json, as published: latents, queries that grow, experts in stacks, beside what sees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.families.experts import Stacks
from kvferry.models.native import not_in_native
from kvferry.models.parts.expert_stacks import StackPart
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


def test_stacks_in_8_bits_have_scales_of_each_expert(tmp_path: Path) -> None:
    experts, layer = model_of(tmp_path, NAME).experts, "model.layers.3.mlp.experts"
    assert experts is not None
    scales = experts.parts_of(f"{layer}.gate_up_proj_scale_inv", (128, 1, 1), 4096)
    assert len(scales) == 256 and scales[5] == StackPart(f"{layer}.2.up_proj.weight_scale_inv", (), 2, 0, False)
    [first, *_] = experts.parts_of(f"{layer}.down_proj_activation_scale", (128,), 4096)
    assert first.name == f"{layer}.0.down_proj.activation_scale"
    matrices = experts.parts_of(f"{layer}.down_proj", (128, 4096, 2048), 4096)
    assert len(matrices) == 128 and matrices[7].name == f"{layer}.7.down_proj.weight"
    assert experts.parts_of(f"{layer}.gate_up_proj_scale_inv", (128, 32, 32), 4096) == []  # of blocks: unknown names


def test_groups_of_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n_group = 4: groups of experts are not supported in this family"):
        model_of_text(tmp_path, NAME, n_group=4, topk_group=2)


def test_another_part_of_heads_than_latents_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partial_rotary_factor = 0\.5: only rotary positions over the whole head"):
        model_of_text(tmp_path, NAME, qk_nope_head_dim=128)
