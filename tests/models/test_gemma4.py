"""Gemma 4's config.json, as published and as transformers writes it: heads of two sizes, beside what sees and hears."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.native import not_in_native
from kvferry.models.parts.uneven_heads import Heads, check_uneven, made_parts
from kvferry.sizing.memory import cache_token_bytes, kept_bytes_read
from kvferry.sizing.work import count_params, num_causal_pairs, num_spared_pairs, num_sums, num_visible_keys

from ..sizing.models import CONFIGS, model_of, model_of_text

NAME, SMALLER, SPARSE = "gemma-4-31b", "gemma-4-e2b", "gemma-4-26b-a4b"
PUBLISHED = CONFIGS[NAME]["text_config"]
assert isinstance(PUBLISHED, dict)


def _engine(path: Path, **fields: object) -> EngineConfig:
    return EngineConfig.model_validate({"model_dir": path, "served_model_name": "tiny", "device": "cpu"} | fields)


def test_each_sixth_layer_has_wide_heads_and_turns_a_quarter_of_them(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert model.family.name == "gemma4_text" and model.sliding_windows == (*[1024] * 5, None) * 10
    assert (model.heads_of(0), model.heads_of(5)) == (Heads(16, 256), Heads(4, 512))
    assert (made_parts(model.uneven, 0), made_parts(model.uneven, 5)) == ("qkv", "qk")
    assert (model.rope.kind, model.rope.turned_share, model.rotary_dim) == ("proportional", 0.25, 512)
    assert model.local_rope is not None and (model.local_rope.kind, model.local_rope.theta) == ("default", 10_000.0)
    assert (model.score_scale, model.score_cap, model.logits_cap) == (1.0, None, 30.0)
    assert model.tp_sizes(whole_experts=False) == [1, 2, 4]


def test_parameters_are_as_many_as_published(tmp_path: Path) -> None:
    shapes = tensor_shapes(model_of(tmp_path, NAME))
    assert sum(map(math.prod, shapes.values())) == pytest.approx(30.7e9, rel=1e-3)
    assert "model.layers.5.self_attn.v_proj.weight" not in shapes


def test_the_last_layers_borrow_and_each_is_given_an_input(tmp_path: Path) -> None:
    model = model_of(tmp_path, SMALLER)
    assert model.kv_layers == tuple(range(15)) and model.num_kv_pages == 9  # 12 narrow ones, two to a page, and 3 wide
    assert {model.page_of(layer) for layer in range(15, 35)} == {13, 14}
    assert (made_parts(model.uneven, 14), made_parts(model.uneven, 15)) == ("qkv", "q")
    assert model.inner_size(14) == 6144 and model.inner_size(15) == 12288
    shapes = tensor_shapes(model)
    assert "model.layers.15.self_attn.k_norm.weight" not in shapes
    assert shapes["model.embed_tokens_per_layer.weight"] == (262144, 35 * 256)
    table = math.prod(shapes["model.embed_tokens_per_layer.weight"])
    assert sum(map(math.prod, shapes.values())) - table == pytest.approx(2.3e9, rel=0.02)  # as published
    assert num_sums(model) == 3 * 35 + 2  # behind attention, MLP and own input, and behind both tables
    engine = _engine(tmp_path)
    assert cache_token_bytes(engine, model) == 2 * 2 * (12 * 256 + 3 * 512)
    read = kept_bytes_read(engine, model, 10_000)
    assert read == 2 * 2 * (28 * 512 * 256 + 7 * 10_000 * 512)  # borrowers read, too


def test_experts_are_beside_the_mlp(tmp_path: Path) -> None:
    model = model_of(tmp_path, SPARSE)
    experts = model.experts
    assert experts is not None and model.sparse_layers == (True,) * 30 and all(map(model.has_mlp, range(30)))
    assert (experts.num_experts, experts.num_chosen, experts.gate) == (128, 8, "router.proj")
    shapes = tensor_shapes(model)
    assert shapes["model.layers.3.mlp.gate_proj.weight"] == (2112, 2816)
    assert shapes["model.layers.3.experts.127.down_proj.weight"] == (2816, 704)
    assert shapes["model.layers.3.router.per_expert_scale"] == (128,)
    assert sum(map(math.prod, shapes.values())) == pytest.approx(25.2e9, rel=5e-3)  # as published
    counted = count_params(model)
    active = counted.layers + counted.experts * experts.num_chosen / experts.num_experts + counted.head
    assert active == pytest.approx(3.8e9, rel=0.02)
    assert not not_in_native(model, None, is_float32=False, num_ranks=2)
    assert num_sums(model) == 3 * 30 + 1  # behind attention, MLP and experts
    assert model.tp_sizes(whole_experts=True) == model.tp_sizes(whole_experts=False) == [1, 2]


def test_a_tokens_bytes_are_its_numbers_and_no_more(tmp_path: Path) -> None:
    model, engine = model_of(tmp_path, NAME), _engine(tmp_path)
    assert cache_token_bytes(engine, model) == 2 * 2 * (50 * 16 * 256 + 10 * 4 * 512)
    assert kept_bytes_read(engine, model, 10_000) == 2 * 2 * (50 * 1024 * 16 * 256 + 10 * 10_000 * 4 * 512)
    assert num_visible_keys(10_000, model) == 50 * 1024 + 2 * 10 * 10_000  # heads twice as wide
    assert cache_token_bytes(_engine(tmp_path, tensor_parallel_size=4), model) * 4 == cache_token_bytes(engine, model)


def test_sizes_may_be_told_layer_by_layer(tmp_path: Path) -> None:
    """So transformers 5 writes them."""
    untold = {"global_head_dim": None, "num_global_key_value_heads": None, "layer_types": None}
    own = {f"{layer:02}": {"head_dim": 512, "num_key_value_heads": 4} for layer in range(5, 60, 6)}
    told = model_of_text(tmp_path, NAME, **untold, per_layer_config=own)
    assert told.uneven == model_of(tmp_path, NAME).uneven
    with pytest.raises(ConfigError, match=r"per_layer_config = .*: must have the same"):
        model_of_text(tmp_path, NAME, **untold, per_layer_config=own | {"07": {"head_dim": 128}})
    with pytest.raises(ConfigError, match=r"per_layer_config = .*: must have the same"):
        model_of_text(tmp_path, NAME, **untold, per_layer_config=own | {"05": {"head_dim": 128}})


def test_the_last_layer_sees_all(tmp_path: Path) -> None:
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 9 + ["sliding_attention"] * 6
    assert model_of_text(tmp_path, NAME, layer_types=kinds).uneven == model_of(tmp_path, NAME).uneven


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all': an answer's tokens see those"),
        ({"num_global_key_value_heads": 5}, "num_global_key_value_heads = 5: must divide num_attention_heads = 32"),
        ({"global_head_dim": 384}, "global_head_dim = 384: rows of .* do not fill pages of one size"),
        ({"global_head_dim": 511}, "global_head_dim = 511: must be even"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types: layers of chunked are not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of_text(tmp_path, NAME, **changes)


def test_layers_that_borrow_are_computed_of_the_tokens_that_sample_alone(tmp_path: Path) -> None:
    model = model_of(tmp_path, SMALLER)
    counted, shapes = count_params(model), tensor_shapes(model)
    behind = [name for name in shapes if name.startswith(tuple(f"model.layers.{layer}." for layer in range(15, 35)))]
    own = [f"model.layers.14.{name}" for name in ("self_attn.o_proj", "mlp.down_proj", "per_layer_projection")]
    spared = sum(math.prod(shapes[name]) for name in behind if len(shapes[name]) > 1)
    assert counted.last > spared + sum(math.prod(shapes[f"{name}.weight"]) for name in own)
    assert counted.last == pytest.approx(0.711 * counted.layers, rel=1e-3)
    narrow, wide = num_causal_pairs(3000, 512), 2 * num_causal_pairs(3000, None)  # these of twice the numbers
    assert num_spared_pairs(3000, model) == pytest.approx(16 * narrow + 5 * wide)  # the last that keeps is one of them


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_shared_layers": 35}, "num_kv_shared_layers = 35: leaves no layer of a kind"),
        ({"num_kv_shared_layers": 31}, "num_kv_shared_layers = 31: leaves no layer of a kind"),
        ({"vocab_size_per_layer_input": 1000}, "vocab_size_per_layer_input = 1000: must not be below vocab_size"),
        ({"enable_moe_block": True}, "num_experts = None: must be a whole number"),
    ],
)
def test_what_no_layer_could_read_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of_text(tmp_path, SMALLER, **changes)


def test_what_has_no_such_heads_is_named(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    for is_cuda in (False, True):
        check_uneven(model.uneven, _engine(tmp_path), is_cuda=is_cuda)
        kind = "fp8" if is_cuda else "int8"
        with pytest.raises(ConfigError, match=f"{kind} is for layers whose heads are all of one size"):
            check_uneven(model.uneven, _engine(tmp_path, kv_cache_dtype=kind), is_cuda=is_cuda)
