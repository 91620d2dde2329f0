"""Nemotron-H's config.json, as NVIDIA publishes it and as transformers saves it: each layer is one block."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import KV_SCALE, tensor_shapes
from kvferry.models.families.module_names import full_name
from kvferry.models.native import not_in_native
from kvferry.models.parts.mamba import MambaConfig
from kvferry.models.quantization import quantized_at_load
from kvferry.sizing.work import count_params, mixers, num_feed_forwards, num_sums, num_whole_layers

from ..sizing.models import CONFIGS, model_of

DENSE, SPARSE = "nano-9b", "nano-30b-a3b"
PATTERN = "hybrid_override_pattern"
TYPES = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def test_layers_are_mixers_or_feed_forwards(tmp_path: Path) -> None:
    model, pattern = model_of(tmp_path, DENSE), str(CONFIGS[DENSE][PATTERN])
    assert "".join("-" if model.has_feed_forward(layer) else "M*"[layer in model.kv_layers] for layer in range(56)) == (
        pattern
    )
    assert [model.has_mixer(layer) for layer in range(56)] == [kind != "-" for kind in pattern]
    assert model.kv_layers == (14, 21, 30, 39) and model.page_of(21) == 1
    assert (model.page_of(0), model.page_of(1)) == (None, None)
    assert isinstance(model.states, MambaConfig) and model.states.num_layers == 27
    assert (model.states.num_values, model.states.num_keys, model.states.kernel_size) == (128 * 80, 8 * 128, 4)
    assert (len(mixers(model)), num_feed_forwards(model)) == (31, 25)
    assert (model.experts, model.activation, model.rope.kind) == (None, "relu2", "none")
    assert model.shared_counts() == {
        "num_attention_heads": 40,
        "shares of a state": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 15680,
    }


def test_experts_have_no_gate_and_one_that_is_shared(tmp_path: Path) -> None:
    model, pattern = model_of(tmp_path, SPARSE), str(CONFIGS[SPARSE][PATTERN])
    assert "".join("E" if is_sparse else "." for is_sparse in model.sparse_layers) == re.sub("[^E]", ".", pattern)
    experts = model.experts
    assert experts is not None and (experts.scale, experts.normalised, experts.scoring) == (2.5, True, "sigmoid")
    assert "intermediate_size" not in model.shared_counts()  # no layer is dense
    shapes = tensor_shapes(model)
    assert {name: shape for name, shape in shapes.items() if ".layers.1." in name and ".experts." not in name} == {
        "model.layers.1.norm.weight": (2688,),
        "model.layers.1.mixer.gate.weight": (128, 2688),
        "model.layers.1.mixer.gate.e_score_correction_bias": (128,),
        "model.layers.1.mixer.shared_experts.up_proj.weight": (3712, 2688),
        "model.layers.1.mixer.shared_experts.down_proj.weight": (2688, 3712),
    }
    assert {name: shape for name, shape in shapes.items() if ".layers.1.mixer.experts.127." in name} == {
        "model.layers.1.mixer.experts.127.up_proj.weight": (1856, 2688),
        "model.layers.1.mixer.experts.127.down_proj.weight": (2688, 1856),
    }


def test_experts_may_see_narrower_rows(tmp_path: Path) -> None:
    model = model_of(tmp_path, SPARSE, moe_latent_size=1024)
    shapes = tensor_shapes(model)
    assert shapes["model.layers.1.mixer.fc1_latent_proj.weight"] == (1024, 2688)
    assert shapes["model.layers.1.mixer.fc2_latent_proj.weight"] == (2688, 1024)
    assert shapes["model.layers.1.mixer.experts.0.up_proj.weight"] == (1856, 1024)
    assert shapes["model.layers.1.mixer.experts.0.down_proj.weight"] == (1024, 1856)
    assert shapes["model.layers.1.mixer.shared_experts.up_proj.weight"] == (3712, 2688)
    with pytest.raises(ConfigError, match="moe_latent_size = 1024: experts of narrower rows with biases"):
        model_of(tmp_path, SPARSE, moe_latent_size=1024, mlp_bias=True)


@pytest.mark.parametrize(
    ("name", "params", "active"),
    [(DENSE, 8.89e9, 8.89e9), (SPARSE, 31.6e9, 3.6e9)],  # their model cards
)
def test_parameters_are_as_many_as_published(tmp_path: Path, name: str, params: float, active: float) -> None:
    model = model_of(tmp_path, name)
    shapes = tensor_shapes(model)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(params, rel=2e-3)
    chosen = 1.0 if model.experts is None else model.experts.num_chosen / model.experts.num_experts
    counted = count_params(model)
    assert counted.layers + counted.experts * chosen + 2 * counted.head == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("name", [DENSE, SPARSE])
@pytest.mark.parametrize("words", [TYPES, OLDER])
def test_a_list_of_types_says_what_the_pattern_says(tmp_path: Path, name: str, words: dict[str, str]) -> None:
    pattern = str(CONFIGS[name][PATTERN])
    listed = {PATTERN: None, "num_hidden_layers": None, "n_routed_experts": 128}  # as transformers saves it
    types = [words[kind] for kind in pattern]
    assert model_of(tmp_path, name, layers_block_type=types, **listed) == model_of(tmp_path, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PATTERN: "M-x*"}, r"hybrid_override_pattern = 'M-x\*': each layer must be one of M \* - E"),
        ({PATTERN: None}, "layers_block_type = None: each layer must be one of"),
        ({PATTERN: "M-*-"}, "num_hidden_layers = 56: 4 layers have a type"),
        ({PATTERN: "M-" * 28}, "a model without a layer that keeps keys and values is not supported"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act = 'gelu': only silu is supported"),
        ({"mlp_hidden_act": "relu"}, "hidden_act = 'relu': only silu and swish and gelu_pytorch_tanh and relu2 are"),
        ({"n_groups": 7}, "mamba_n_groups = 7: must divide mamba_n_heads = 128"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit = .*: bounds of time steps are not supported in this"),
        ({"mamba_num_heads": None}, "mamba_num_heads = None: must be a whole number of at least 1"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of(tmp_path, DENSE, **changes)


def test_squares_of_what_is_positive_are_for_feed_forwards_without_a_gate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_act = 'relu2': only silu and swish and gelu_pytorch_tanh are"):
        model_of(tmp_path, "8b", hidden_act="relu2")


def test_names_are_those_of_other_families() -> None:
    assert full_name("backbone.embeddings.weight") == "model.embed_tokens.weight"
    assert full_name("backbone.layers.3.mixer.in_proj.weight") == "model.layers.3.mixer.in_proj.weight"
    assert KV_SCALE.fullmatch(full_name("backbone.layers.14.mixer.k_proj.k_scale"))


def test_what_chooses_experts_is_never_rounded() -> None:
    for name in ("int8", "int4"):
        assert quantized_at_load(name).storage("model.layers.1.mixer.gate") is None
        assert quantized_at_load(name).storage("model.layers.1.mixer.in_proj") is not None


def test_what_c_has_no_code_for_is_named(tmp_path: Path) -> None:
    for name in (DENSE, SPARSE):
        assert not not_in_native(model_of(tmp_path, name), None, is_float32=False)
    assert not not_in_native(model_of(tmp_path, SPARSE, moe_latent_size=64), None, is_float32=False)
    in_turns = model_of(tmp_path, DENSE, **{PATTERN: "M--*", "num_hidden_layers": 4})
    assert not_in_native(in_turns, None, is_float32=False) == ["feed-forwards without a mixer before each"]


def test_a_layer_of_one_block_is_half_of_one(tmp_path: Path) -> None:
    model = model_of(tmp_path, DENSE)
    assert (num_whole_layers(model), num_sums(model)) == (28, 57)
    whole = model_of(tmp_path, "8b")
    assert (num_whole_layers(whole), num_sums(whole)) == (32, 65)
