"""GGUF files of every architecture that is read: the config and the log-probabilities of the checkpoint they came of.

Checkpoints are transformers' own; files are written by names of the package `gguf` (`tests/gguf_files.py`). Where
transformers reads an architecture's files itself, what it makes of a file is compared, too.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from kvferry.common.errors import ConfigError
from kvferry.engine.engine import Engine
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.default import gguf_model_dir
from kvferry.models.files import resolve_model

from ...engine_driver import make_engine
from ...gguf_files import plain_tokens, write_as_gguf
from ...quantized import write_gguf
from ...transformers_checkpoints import SMALL, write_model
from ..weights.test_formats import BFLOAT16, assert_as_transformers

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 150_000.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
OLMO3_ROPE = {
    "full_attention": YARN | {"rope_theta": 500_000.0, "attention_factor": 1.25},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
    "original_max_position_embeddings": 512,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10_000.0,
}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 2.0,
}
GPT_OSS = {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 20}
GEMMA = {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
}  # of whole blocks of 256
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {"head_dim": 16}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3moe": ("Qwen3Moe", QWEN3_MOE),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 20.0, "sliding_window": 20}),
    "gemma3": (
        "Gemma3Text",
        GEMMA | {"sliding_window": 20, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    ),
    "phi3": ("Phi3", {"sliding_window": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
    "phi3 longrope": ("Phi3", {"sliding_window": None, "rope_parameters": LONGROPE}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 20, "rope_parameters": OLMO3_ROPE}),
    "granite": ("Granite", GRANITE | {"tie_word_embeddings": True}),
    "gpt-oss": ("GptOss", GPT_OSS | {"rope_parameters": YARN | {"truncate": False}}),
}
# Kinds of blocks by the ends of names, and what such a model has beside `MODELS`.
QUANTIZED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "qwen3moe Q4_K_M": ("qwen3moe", WIDE | {"moe_intermediate_size": 256}, {"": "Q4_K", "down_proj": "Q6_K"}),
    "mixtral Q8_0": ("mixtral", {}, {"": "Q8_0", "gate": "F32"}),
    "gemma2 Q8_0": ("gemma2", {}, {"": "Q8_0"}),
    "gemma3 Q4_0": ("gemma3", {}, {"": "Q4_0", "embed_tokens": "Q8_0"}),
    "phi3 Q5_0": ("phi3", {}, {"": "Q5_0", "lm_head": "Q8_0"}),
    "olmo2 Q4_1": ("olmo2", {}, {"": "Q4_1"}),
    "granite Q8_0": ("granite", {}, {"": "Q8_0"}),
    "gpt-oss MXFP4": ("gpt-oss", {}, {"": "Q8_0", "_proj": "Q8_0", "up_proj": "MXFP4", "down_proj": "MXFP4"}),
    "gpt-oss Q8_0": ("gpt-oss", {}, {"": "Q8_0"}),
    "qwen3moe MXFP4": ("qwen3moe", {}, {"": "Q8_0", **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "MXFP4")}),
    "qwen3moe TQ2_0": ("qwen3moe", WIDE | {"moe_intermediate_size": 256}, {"gate_proj": "TQ2_0", "up_proj": "MXFP4"}),
    "mixtral F16": ("mixtral", {}, {"": "F16"}),
}
# Transformers reads files of these by its own code: names, order of rows, norms, experts.
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3")


def _checkpoint(path: Path, model: str, fields: dict[str, Any]) -> Path:
    kind, own = MODELS[model]
    return write_drawn(path, kind, own | fields)


def write_drawn(path: Path, kind: str, fields: dict[str, Any]) -> Path:
    """Write a small checkpoint of transformers' class for this kind; every norm and factor has numbers of its own."""
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    write_model(path, getattr(transformers, f"{kind}Config")(**SMALL | special | fields))
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(1)
    tensors = load_file(file)
    for name in sorted(tensors):
        if "norm" in name or name.endswith(("scale", "scalar")):  # so that none can take another's place
            tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def assert_same_model(file: Path, checkpoint: Path, cache: Path) -> None:
    path = gguf_model_dir(file, cache=cache)
    found, wanted = ModelConfig.from_dir(path), ModelConfig.from_dir(checkpoint)
    check_checkpoint(path, found)
    assert replace(found, dtype=wanted.dtype) == wanted
    assert_as_transformers(path, checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_config_and_log_probabilities_are_the_checkpoints(tmp_path: Path, model: str) -> None:
    checkpoint = write_as_gguf(_checkpoint(tmp_path / "plain", model, {}), tmp_path / "m.gguf")
    assert_same_model(tmp_path / "m.gguf", checkpoint, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("variant", QUANTIZED)
def test_blocks_of_any_kind_mean_the_same_numbers(tmp_path: Path, variant: str) -> None:
    model, fields, kinds = QUANTIZED[variant]
    checkpoint = write_as_gguf(_checkpoint(tmp_path / "plain", model, fields), tmp_path / "m.gguf", kinds)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    check_checkpoint(path, ModelConfig.from_dir(path))
    within = BFLOAT16 if variant in ("gpt-oss Q8_0", "qwen3moe TQ2_0") else 1e-5
    assert_as_transformers(path, checkpoint, within=within)


@pytest.mark.parametrize("model", ["qwen3moe", "gemma3"])
def test_a_model_in_several_files_is_read_by_any_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    checkpoint = _checkpoint(tmp_path / "plain", model, {})
    write_as_gguf(checkpoint, tmp_path / "big.gguf", {"v_proj": "Q8_0"}, tensors_per_file=5)
    files = sorted(tmp_path.glob("big-*-of-*.gguf"))
    assert len(files) > 3
    first, last = resolve_model(str(files[0])), resolve_model(str(files[-1]))
    assert first == last and first.served_name == "big"
    check_checkpoint(first.dir, ModelConfig.from_dir(first.dir))
    assert_as_transformers(first.dir, checkpoint)

    files[1].rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=f"one of {len(files)} files; not beside it: {files[1].name}"):
        resolve_model(str(files[0]))
    shutil.copy(files[2], files[1])
    with pytest.raises(ConfigError, match=f"{files[1].name} is by its fields part 3 of {len(files)}, by its name 2"):
        resolve_model(str(files[0]))


@pytest.mark.slow
@pytest.mark.parametrize("model", READ_BY_TRANSFORMERS)
def test_transformers_makes_the_same_of_a_file(tmp_path: Path, model: str) -> None:
    """What its own reader yields are the directory's tensors: two readers, neither of which knows the other."""
    checkpoint = write_as_gguf(_checkpoint(tmp_path / "plain", model, {}), tmp_path / "m.gguf", {"v_proj": "Q8_0"})
    found = load_file(gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache") / "model.safetensors")
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(checkpoint)
    read_gguf: Any = load_gguf_checkpoint
    read = read_gguf(str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=theirs)["tensors"]
    for parameter in theirs.parameters():
        parameter.data.zero_()
    theirs.load_state_dict(read, strict=False)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        if tensor.dtype != torch.uint8:
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6, msg=name)


def _engine_of(tmp_path: Path, variant: str, **fields: object) -> Engine:
    model, own, kinds = QUANTIZED[variant]
    write_as_gguf(_checkpoint(tmp_path / "plain", model, own), tmp_path / "m.gguf", kinds)
    return make_engine(gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache"), 64, **fields)


@pytest.mark.slow
def test_experts_of_blocks_are_multiplied_as_they_are(tmp_path: Path) -> None:
    for variant, is_silent in (("qwen3moe MXFP4", True), ("gpt-oss MXFP4", True), ("gpt-oss Q8_0", False)):
        with structlog.testing.capture_logs() as logs:
            _engine_of(tmp_path / variant, variant, dtype="bfloat16")
        told = [log for log in logs if log["event"] == "widened_experts"]
        assert bool(told) != is_silent, variant
        if told:
            numbers = 2 * 8 * 3 * 64 * 96  # layers, experts, matrices of inner and hidden size
            assert told[0]["widened_from"] == "Q8_0" and told[0]["memory_mib"] == round(2 * numbers / 2**20, 2)


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["<end_of_turn>"], {1, 3}),  # Gemma's
        (["<turn|>", "<|tool_response>"], {1, 3, 4}),  # Gemma 4's: it ends its calls where their results would begin
        (["<|end|>", "<|user|>"], {1, 3}),  # Phi's
        (["<|end|>", "<|return|>", "<|call|>"], {1, 4, 5}),  # gpt-oss's, whose turns have several parts
    ],
)
def test_a_turns_end_is_known_by_its_text(tmp_path: Path, tokens: list[str], ends: set[int]) -> None:
    fields = plain_tokens(512, *tokens)
    write_as_gguf(_checkpoint(tmp_path / "plain", "olmo2", {}), tmp_path / "m.gguf", fields=fields)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    assert ModelConfig.from_dir(path).eos_token_ids == ends


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("qwen", "its architecture is qwen; these are read: llama, .*gpt-oss, .*; the nearest is qwen"),
        ("gemma3n", "the nearest is gemma3"),
        ("granitemoehybrid", "the nearest is granitehybrid"),
        ("rwkv7", r"nemotron_h_moe$"),
    ],
)
def test_other_architectures_are_refused_with_the_nearest(tmp_path: Path, name: str, named: str) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, architecture=name)
    with pytest.raises(ConfigError, match=named):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.attention.sliding_window", 512, "llama.attention.sliding_window = 512 is not supported"),
        ("llama.logit_scale", 2.0, "llama.logit_scale = 2.0 is not supported"),
        ("llama.attention.value_length", 32, "values of 32 numbers beside keys of"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count = 8: all of a head's 64 are turned"),
        ("llama.rope.scaling.type", "ntk", "'ntk' is not supported; these are: none, linear, yarn, longrope"),
        ("split.count", 3, "m.gguf is by its fields part 1 of 3, by its name 1 of 1"),
        ("llama.block_count", 4_000_000_000, "llama.block_count = 4000000000, and it has 2 layers"),
    ],
)
def test_fields_that_would_change_the_answers_are_refused(tmp_path: Path, key: str, value: Any, named: str) -> None:
    kinds = {int: "add_uint32", float: "add_float32", str: "add_string"}

    def add(writer: Any) -> None:
        getattr(writer, kinds[type(value)])(key, value)

    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, fields=add)
    with pytest.raises(ConfigError, match=re.escape(named)):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


def test_a_layer_that_lacks_a_stack_of_experts_is_refused(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "plain", "mixtral", {})
    tensors = load_file(checkpoint / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(".w3.weight")}
    save_file(kept, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_as_gguf(checkpoint, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"blk\.0 has of its experts down.weight, gate.weight and needs"):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
