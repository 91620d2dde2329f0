"""Llama 4's config.json, as published: chunks, layers that turn nothing, experts, beside what sees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.models.checkpoint import tensor_shapes
from kvferry.models.native import check_exact, not_in_native
from kvferry.models.parts.chunks import Chunk, check_chunks, first_seen
from kvferry.sizing.work import count_params, num_causal_pairs

from ..sizing.models import model_of, model_of_text

NAME = "llama-4-scout"


def test_three_of_four_layers_attend_in_chunks_and_turn(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert model.family.name == "llama4_text" and model.family.head_norms == "bare" and not model.qk_norm
    assert model.sliding_windows == (8192, 8192, 8192, None) * 12
    assert all(isinstance(window, Chunk) for window in model.sliding_windows if window is not None)
    assert model.local_layers == (False, False, False, True) * 12
    assert model.local_rope is not None and (model.rope.kind, model.rope.factor) == ("llama3", 16.0)
    growing = model.local_rope
    assert (growing.kind, growing.query_beta, growing.query_len, growing.query_shift) == ("none", 0.1, 8192, 1)
    assert model.rope.query_beta == 0.0
    plain = model_of_text(tmp_path, NAME, attn_temperature_tuning=False, use_qk_norm=False, attention_chunk_size=None)
    assert plain.local_rope is not None and plain.local_rope.query_beta == 0.0 and plain.family.head_norms == "none"


def test_frequencies_may_be_stretched_from_one_on_and_not_in_reverse(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    for low, high in ((1.0, 1.0), (1.0, 4.0)):
        told = scaling | {"low_freq_factor": low, "high_freq_factor": high}
        assert model_of_text(tmp_path, NAME, rope_scaling=told).rope.high_freq_factor == high
    with pytest.raises(ConfigError, match=r"low_freq_factor = 4\.0: must not be above high_freq_factor = 1\.0"):
        model_of_text(tmp_path, NAME, rope_scaling=scaling | {"low_freq_factor": 4.0, "high_freq_factor": 1.0})


def test_parameters_are_as_many_as_published(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert sum(map(math.prod, tensor_shapes(model).values())) == pytest.approx(107.8e9, rel=2e-3)  # 109 with what sees
    counted, experts = count_params(model), model.experts
    assert experts is not None and experts.scales_inputs and experts.num_chosen == 1
    active = counted.layers + counted.experts / experts.num_experts + 2 * counted.head
    assert active == pytest.approx(17e9, rel=0.02)


def test_experts_stand_in_every_second_layer_or_where_it_is_told(tmp_path: Path) -> None:
    shapes = tensor_shapes(model_of_text(tmp_path, NAME, interleave_moe_layer_step=2))
    assert shapes["model.layers.0.feed_forward.gate_proj.weight"] == (16384, 5120)
    assert shapes["model.layers.1.feed_forward.router.weight"] == (16, 5120)
    assert shapes["model.layers.1.feed_forward.shared_expert.down_proj.weight"] == (5120, 8192)
    assert shapes["model.layers.1.feed_forward.experts.15.down_proj.weight"] == (5120, 8192)
    assert model_of_text(tmp_path, NAME, moe_layers=[7]).sparse_layers == (*[False] * 7, True, *[False] * 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 2}, "num_experts_per_tok = 2: only one expert a token is supported"),
        ({"no_rope_layers": [1, 2]}, "no_rope_layers = .*: must have 0 or 1 for each of 48 layers"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types = .*: layers that turn by positions are those"),
        ({"moe_layers": [48]}, r"moe_layers = \[48\]: must list layers, of 48"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_of_text(tmp_path, NAME, **changes)


def test_what_has_no_attention_in_chunks_is_named(tmp_path: Path) -> None:
    model = model_of(tmp_path, NAME)
    assert not_in_native(model, None, is_float32=False) == []
    assert not_in_native(model, None, is_float32=True) == ["experts in float32"]
    engine = EngineConfig(model_dir=tmp_path, served_model_name="tiny", block_size=128)
    check_chunks(model.sliding_windows, engine, is_cuda=True)
    check_chunks((300, None), engine, is_cuda=True)
    check_chunks((Chunk(300), None), engine, is_cuda=False)
    with pytest.raises(ConfigError, match="block_size: 128 must divide the chunks of 300 tokens"):
        check_chunks((Chunk(300), None), engine, is_cuda=True)
    check_exact(model, [])
    with pytest.raises(
        ConfigError, match=r"deterministic: attention in chunks has exact steps, .* for torch: experts in"
    ):
        check_exact(model, ["experts in float32"])


def test_a_chunk_begins_anew() -> None:
    assert [first_seen(position, Chunk(4)) for position in range(9)] == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert [first_seen(position, 4) for position in range(6)] == [0, 0, 0, 0, 1, 2]
    for count in (0, 1, 4, 9):
        seen = sum(position - first_seen(position, Chunk(4)) + 1 for position in range(count))
        assert num_causal_pairs(count, Chunk(4)) == seen
