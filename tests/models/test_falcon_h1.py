"""Falcon-H1's config.json, as published: each layer attends and keeps a state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.native import not_in_native
from kvferry.models.parts.mamba import MambaConfig
from kvferry.models.parts.side_by_side import Multipliers
from kvferry.sizing.work import num_sums, num_whole_layers

from ..sizing.models import CONFIGS, model_of

SMALL, LARGE = "falcon-h1-0.5b", "falcon-h1-34b"


def test_each_layer_keeps_keys_and_a_state(tmp_path: Path) -> None:
    model = model_of(tmp_path, SMALL)
    assert model.kv_layers == tuple(range(36)) and all(map(model.has_state, range(36)))
    assert [model.page_of(layer) for layer in (0, 35)] == [0, 35]
    states = model.states
    assert isinstance(states, MambaConfig) and states.norm == "none" and states.module == "mamba"
    assert (states.num_values, states.num_keys, states.num_shares) == (24 * 64, 128, 2)
    assert {name: shape for name, shape in tensor_shapes(model).items() if ".layers.7." in name} == {
        "model.layers.7.input_layernorm.weight": (1024,),
        "model.layers.7.pre_ff_layernorm.weight": (1024,),
        "model.layers.7.mamba.in_proj.weight": (2 * 1536 + 2 * 128 + 24, 1024),
        "model.layers.7.mamba.conv1d.weight": (1536 + 2 * 128, 1, 4),
        "model.layers.7.mamba.conv1d.bias": (1536 + 2 * 128,),
        "model.layers.7.mamba.A_log": (24,),
        "model.layers.7.mamba.D": (24,),
        "model.layers.7.mamba.dt_bias": (24,),
        "model.layers.7.mamba.out_proj.weight": (1024, 1536),
        "model.layers.7.self_attn.q_proj.weight": (512, 1024),
        "model.layers.7.self_attn.k_proj.weight": (128, 1024),
        "model.layers.7.self_attn.v_proj.weight": (128, 1024),
        "model.layers.7.self_attn.o_proj.weight": (1024, 512),
        "model.layers.7.feed_forward.gate_proj.weight": (2048, 1024),
        "model.layers.7.feed_forward.up_proj.weight": (2048, 1024),
        "model.layers.7.feed_forward.down_proj.weight": (1024, 2048),
    }


def test_factors_are_those_of_its_parts(tmp_path: Path) -> None:
    model = model_of(tmp_path, SMALL)
    assert model.multipliers == Multipliers(
        attention_out=0.9375,
        state_in=1.25,
        state_out=0.23570226039551587,
        projected=(0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738),
        gate=0.8838834764831844,
        fed=0.5859375,
    )
    assert (model.embedding_multiplier, model.logits_divisor) == (5.656854249492381, 25.6)
    assert model.score_scale == 64**-0.5 * 0.390625
    of_others = model_of(tmp_path, "8b", attention_out_multiplier=0.5, mlp_multipliers=[2.0, 3.0])
    assert of_others.multipliers == Multipliers() and of_others.score_scale is None


@pytest.mark.parametrize(("name", "params"), [(SMALL, 521e6), (LARGE, 33.6e9)])  # their model cards
def test_parameters_are_as_many_as_published(tmp_path: Path, name: str, params: float) -> None:
    assert sum(map(math.prod, tensor_shapes(model_of(tmp_path, name)).values())) == pytest.approx(params, rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "norm"),
    [
        ({}, "behind gates"),
        ({"mamba_norm_before_gate": True}, "before gates"),
        ({"mamba_norm_before_gate": None}, "before gates"),
        ({"mamba_rms_norm": None}, "none"),
    ],
)
def test_a_norm_stands_where_it_is_told(tmp_path: Path, changes: dict[str, object], norm: str) -> None:
    model = model_of(tmp_path, LARGE, **changes)
    assert isinstance(model.states, MambaConfig) and model.states.norm == norm
    assert ("model.layers.0.mamba.norm.weight" in tensor_shapes(model)) is (norm != "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_layer_indices": [0, 8]}, r"attn_layer_indices = \[0, 8\]: layers that keep a state and do not attend"),
        ({"mamba_use_mlp": False}, "mamba_use_mlp = False: layers without a feed-forward are not supported"),
        ({"projectors_bias": True}, "mamba_proj_bias and projectors_bias: a bias of one product of a state is"),
        ({"ssm_multipliers": [1.0] * 4}, "ssm_multipliers must be a list of 5 numbers above 0"),
        ({"mlp_multipliers": [1.0, 0.0]}, "mlp_multipliers = 0.0: must be a number above 0"),
        ({"time_step_limit": [0.1, 0.001]}, "time_step_limit = .*: must be two numbers from 0 on, the smaller first"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(tmp_path, SMALL, **changes)


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_c_has_code_for_all_of_it(tmp_path: Path, name: str) -> None:
    for is_float32 in (True, False):
        assert not_in_native(model_of(tmp_path, name), None, is_float32=is_float32, num_ranks=2) == []


def test_what_both_yield_is_summed_over_ranks_at_once(tmp_path: Path) -> None:
    model = model_of(tmp_path, SMALL)
    assert (num_whole_layers(model), num_sums(model)) == (36, 2 * 36 + 1)
    normed_whole = model_of(tmp_path, SMALL, mamba_rms_norm=True)
    assert num_sums(normed_whole) == 3 * 36 + 1
    assert CONFIGS[LARGE]["mamba_n_groups"] == 2 and num_sums(model_of(tmp_path, LARGE)) == 2 * 72 + 1
