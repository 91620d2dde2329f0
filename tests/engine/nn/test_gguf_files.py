"""GGUF files served as they are, judged by transformers on what the package `gguf` reads in them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.grouped import GroupedWeight
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.default import gguf_model_dir
from kvferry.models.files import resolve_model

from ...checkpoints import Family
from ...quantized import SHAPE, write_gguf
from ..weights.test_formats import assert_as_transformers

# As llama.cpp mixes them: values and the last matrix in more bits.
Q4_K_M = {"": "Q4_K", "v_proj": "Q6_K", "0.mlp.down_proj": "Q6_K", "lm_head": "Q6_K"}
VARIANTS: dict[str, tuple[Family, dict[str, str], bool]] = {
    "llama Q4_K_M": ("llama", Q4_K_M, False),
    "llama tied Q8_0": ("llama", {"": "Q8_0"}, True),
    "qwen2 Q4_0": ("qwen2", {"": "Q4_0", "embed_tokens": "Q8_0"}, True),
    "qwen3 Q5_K": ("qwen3", {"": "Q5_K", "k_proj": "Q5_0"}, False),
    "llama Q3_K_M": ("llama", {"": "Q3_K", "v_proj": "Q5_K", "down_proj": "Q4_K", "lm_head": "Q6_K"}, False),
    "qwen2 Q2_K": ("qwen2", {"": "Q2_K", "v_proj": "Q4_K", "down_proj": "Q3_K", "embed_tokens": "Q6_K"}, True),
    "qwen3 IQ4": ("qwen3", {"": "IQ4_XS", "down_proj": "IQ4_NL"}, False),
    "llama Q4_1 beside F32": ("llama", {"mlp.up_proj": "Q4_1", "mlp.gate_proj": "Q4_1", "q_proj": "Q5_1"}, False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_are_those_of_the_blocks(tmp_path: Path, variant: str) -> None:
    family, kinds, tied = VARIANTS[variant]
    plain = write_gguf(tmp_path / "m.gguf", family, kinds, tied=tied)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    config = ModelConfig.from_dir(path)
    check_checkpoint(path, config)
    assert config.tie_embeddings == tied
    assert_as_transformers(path, plain)


def test_fused_parts_of_several_kinds_are_raised(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q4_K_M)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    decoder = Decoder(ModelConfig.from_dir(path), Communicator(), dtype=torch.bfloat16, device=torch.device("cpu"))
    weights = {linear.name.removeprefix("model.layers."): linear.weight for linear in decoder.linears()}
    forms = {
        name: (weight.bits, weight.group_size, weight.minima is not None)
        for name, weight in weights.items()
        if isinstance(weight, GroupedWeight)
    }
    assert len(forms) == len(weights) == 9
    assert forms["0.self_attn.qkv_proj"] == (8, 16, True)
    assert forms["0.mlp.gate_up_proj"] == forms["1.mlp.down_proj"] == (4, 32, True)
    assert forms["0.mlp.down_proj"] == forms["lm_head"] == (8, 16, False)


def test_a_file_is_unpacked_once_and_its_blocks_stay_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", "llama", {"": "Q4_0"})
    model = resolve_model(str(tmp_path / "tiny.gguf"))
    assert model.served_name == "tiny" and resolve_model(str(tmp_path / "tiny.gguf")).dir == model.dir
    tensors = load_file(model.dir / "model.safetensors")
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    assert matrix.dtype == torch.uint8 and matrix.shape == (SHAPE.intermediate_size, SHAPE.hidden_size // 32 * 18)
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {})
    data = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_down\.weight is TQ1_0; these are read: Q4_0"):
        (tmp_path / "m.gguf").write_bytes(_with_kind(data, "blk.0.ffn_down.weight", 34))
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


def _with_kind(data: bytes, name: str, kind: int) -> bytes:
    """Change the kind of a matrix in a GGUF file: it stands behind its name, the count of its sizes, and two sizes."""
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    return data[:at] + kind.to_bytes(4, "little") + data[at + 4 :]


# --- configs and tokenizers -------------------------------------------------------------------------------------------


def _factors(factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for rope_scaling llama3."""
    freqs = 1.0 / 10000.0 ** (np.arange(0, 64, 2) / 64)
    found = []
    for freq in freqs:
        wavelen = 2 * np.pi / freq
        if wavelen < 8192 / 4:
            found.append(1.0)
        elif wavelen > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelen - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_the_scaling_of_llama_3_is_known_by_its_factors(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": _factors(32.0)}
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, rules="llama-bpe", extra=extra)
    rope = ModelConfig.from_dir(gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")).rope
    assert (rope.kind, rope.factor, rope.original_max_len) == ("llama3", 32.0, 8192)
    write_gguf(tmp_path / "n.gguf", "llama", {"": "Q8_0"}, extra={"rope_freqs.weight": _factors(32.0) * 2})
    with pytest.raises(ConfigError, match="not the scaling of Llama"):
        gguf_model_dir(tmp_path / "n.gguf", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["<|bos|>", "ab", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_texts_are_cut_by_the_files_rules(tmp_path: Path, rules: str, parts: list[str]) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, rules=rules)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    found = tokenizer.encode("ab 1234")
    assert found.tokens == parts and tokenizer.decode(found.ids) == "ab 1234"
    assert json.loads((path / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"


@pytest.mark.parametrize("puts_bos", [False, True])
def test_texts_end_with_a_token_where_the_file_asks_for_it(tmp_path: Path, puts_bos: bool) -> None:
    def ask(writer: gguf.GGUFWriter) -> None:
        writer.add_add_bos_token(puts_bos)
        writer.add_add_eos_token(True)

    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, fields=ask)
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    first = ["<|bos|>"] if puts_bos else []
    assert tokenizer.encode("ab").tokens == [*first, "ab", "<|eos|>"]
    assert tokenizer.encode("ab", "ab").tokens == [*first, "ab", "<|eos|>"] * 2
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "qwen2", {"": "Q8_0"}, fields=lambda writer: writer.add_eot_token_id(2))
    path = gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")
    assert ModelConfig.from_dir(path).eos_token_ids == {1, 2}


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("gpt-4", "pre-tokenizer is gpt-4; kvferry converts smollm, .*; the nearest is gpt-4o"),
        ("poro-chat", "pre-tokenizer is poro-chat; kvferry converts .*tekken$"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path: Path, rules: str, named: str) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"}, rules=rules)
    with pytest.raises(ConfigError, match=named):
        gguf_model_dir(tmp_path / "m.gguf", cache=tmp_path / "cache")


@pytest.mark.slow
def test_a_file_with_bytes_turned_is_served_or_refused(tmp_path: Path) -> None:
    """Whatever stands in a file's fields, nothing but a ConfigError comes out."""
    write_gguf(tmp_path / "m.gguf", "llama", {"": "Q8_0"})
    data = (tmp_path / "m.gguf").read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data[:20_000])
        for at in rng.integers(4, len(broken), 3):
            broken[at] = int(rng.integers(256))
        (tmp_path / "b.gguf").write_bytes(bytes(broken) + data[20_000:])
        try:
            gguf_model_dir(tmp_path / "b.gguf", cache=tmp_path / "cache")
        except ConfigError:
            refused += 1
    assert refused > 5
