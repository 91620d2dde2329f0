"""Checkpoints of one and of many files, ranks' shards, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights, read_kv_scales
from kvferry.engine.nn.mixer import Attention
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.stored.safetensors import safetensors_files

from ...checkpoints import write_checkpoint


class _FakeRank(Communicator):
    """A rank whose collectives are never used: only its shards matter."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def _load(path: Path, *, rank: int = 0, size: int = 1, load_format: str = "auto", seed: int = 0) -> Decoder:
    decoder = Decoder(
        ModelConfig.from_dir(path), _FakeRank(rank, size), dtype=torch.float32, device=torch.device("cpu")
    )
    load_weights(decoder, path, load_format=load_format, seed=seed)
    return decoder


def test_sharded_and_single_file_load_the_same(tmp_path: Path) -> None:
    one = _load(write_checkpoint(tmp_path / "one", tokenizer=False))
    three = _load(write_checkpoint(tmp_path / "three", tokenizer=False, num_files=3))
    for first, second in zip(one.slots(), three.slots(), strict=True):
        assert first.name == second.name and torch.equal(first.target, second.target)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_ranks_hold_the_parts_of_the_whole(tmp_path: Path, family: str, load_format: str) -> None:
    path = write_checkpoint(tmp_path, family, tokenizer=False, vocab_size=511)  # type: ignore[arg-type]
    whole = {slot.name: slot.target for slot in _load(path, load_format=load_format).slots()}
    for rank in range(2):
        for slot in _load(path, rank=rank, size=2, load_format=load_format).slots():
            part = whole[slot.name].narrow(slot.dim, slot.start, slot.target.shape[slot.dim])
            assert torch.equal(slot.target, part), slot.name


def test_heads_stay_whole_on_a_rank(tmp_path: Path) -> None:
    """Rank 1 of 2 has the second half of the query heads and of the KV heads in one fused product."""
    path = write_checkpoint(tmp_path, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    mixer = _load(path, rank=1, size=2).layers[0].mixer
    assert isinstance(mixer, Attention) and isinstance(fused := mixer.qkv_proj.weight, DenseWeight)
    name = "model.layers.0.self_attn"
    parts = [tensors[f"{name}.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(fused.plain, torch.cat([part[part.shape[0] // 2 :] for part in parts]))


def test_progress_ends_at_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    decoder = Decoder(ModelConfig.from_dir(path), Communicator(), dtype=torch.float32, device=torch.device("cpu"))
    seen: list[float] = []
    load_weights(decoder, path, load_format="auto", seed=0, progress=lambda what, fraction: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0


def _change(path: Path, *, drop: str = "", add: str = "", reshape: str = "") -> None:
    tensors = load_file(path / "model.safetensors")
    if drop:
        del tensors[drop]
    if add:
        tensors[add] = torch.zeros(3)
    if reshape:
        tensors[reshape] = torch.zeros(3, 3)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "model.norm.weight"}, r"1 tensors are missing: model\.norm\.weight"),
        ({"add": "model.layers.0.extra"}, r"1 tensors are unknown .*: model\.layers\.0\.extra"),
        ({"reshape": "lm_head.weight"}, r"lm_head\.weight has shape \[3, 3\], config\.json implies \[512, 64\]"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    _change(path, **change)
    with pytest.raises(ConfigError, match=message):
        _load(path)


def test_a_tied_models_spare_head_and_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False, tie_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    _change(path, add="model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not [slot for slot in _load(path).slots() if slot.name == "lm_head.weight"]


@pytest.mark.parametrize("name", ["mtp.layers.0.enorm.weight", "model.mtp_block.0.mlp.up_proj.weight"])
def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    _change(path, add=name)
    check_checkpoint(path, ModelConfig.from_dir(path))
    _load(path)


def test_a_model_that_was_saved_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen3", tokenizer=False, tie_embeddings=True)
    whole = {slot.name: slot.target.clone() for slot in _load(path).slots()}
    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    check_checkpoint(path, ModelConfig.from_dir(path))
    for slot in _load(path).slots():
        assert torch.equal(slot.target, whole[slot.name]), slot.name


def test_a_directory_without_weights_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="convert the checkpoint to safetensors, or use --load-format dummy"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "missing.safetensors", 3])
def test_an_index_names_only_files_beside_it(tmp_path: Path, name: object) -> None:
    (tmp_path.parent / "outside.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ConfigError, match="no file beside it"):
        safetensors_files(tmp_path)


def test_one_file_for_all_goes_before_an_earlier_checkpoints_index(tmp_path: Path) -> None:
    shard, single = tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors"
    single.touch()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard.name}}))
    assert safetensors_files(tmp_path) == [single]
    shard.touch()
    assert safetensors_files(tmp_path) == [single]
    index.write_text(json.dumps({"weight_map": {"x": shard.name, "y": single.name}}))
    assert safetensors_files(tmp_path) == [shard, single]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, tokenizer=False)
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        _load(path)


def _with_scales(path: Path, scales: Mapping[str, float | list[float]]) -> Path:
    write_checkpoint(path, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    tensors |= {f"model.layers.{name}": torch.tensor(value) for name, value in scales.items()}
    save_file(tensors, path / "model.safetensors")
    return path


def test_scales_of_a_cache_in_8_bits_are_read_and_not_taken_for_weights(tmp_path: Path) -> None:
    names = {"0.self_attn.k_scale": 0.5, "0.self_attn.v_proj.v_scale": 0.25, "1.self_attn.attn.v_scale": 2.0}
    names |= {"1.self_attn.k_proj.output_scale": 0.125}
    path = _with_scales(tmp_path, names)
    _load(path)
    assert read_kv_scales(path, 2) == [(0.5, 0.25), (0.125, 2.0)]


@pytest.mark.parametrize(
    ("value", "named"),
    [(0.0, "is 0.0, no number above 0"), ([1.0, 2.0], "has 2 numbers; one for all heads of a layer")],
)
def test_scales_that_cannot_be_meant_are_refused(tmp_path: Path, value: float | list[float], named: str) -> None:
    path = _with_scales(tmp_path, {"0.self_attn.k_scale": value})
    with pytest.raises(ConfigError, match=rf"model\.layers\.0\.self_attn\.k_scale {named}"):
        read_kv_scales(path, 2)


def test_scales_of_layers_that_are_not_read_are_not_either(tmp_path: Path) -> None:
    """As of one that predicts further tokens."""
    path = _with_scales(tmp_path, {"1.self_attn.k_scale": 0.5, "2.self_attn.k_scale": 0.25, "2.self_attn.v_scale": 0.0})
    assert read_kv_scales(path, 2) == [(1.0, 1.0), (0.5, 1.0)]


@pytest.mark.parametrize(("kind", "named"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.int64, "I64")])
def test_whole_numbers_are_no_plain_weights(tmp_path: Path, kind: torch.dtype, named: str) -> None:
    """Their bytes were taken for weights, whatever scale they would need."""
    path = write_checkpoint(tmp_path, tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].mul(100).to(kind)
    save_file(tensors, path / "model.safetensors")
    for check in (lambda: check_checkpoint(path, ModelConfig.from_dir(path)), lambda: _load(path)):
        with pytest.raises(ConfigError, match=rf"tensor {name} holds {named}, config\.json implies floats$"):
            check()
