"""What of peft's adapters is served, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.models.adapter import inspect_adapter, read_adapter
from kvferry.models.config import ModelConfig

from ..adapters import write_adapter
from ..checkpoints import write_checkpoint

REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "dora": ({"use_dora": True}, "use_dora = True: DoRA"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "another kind": ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
    "a part of the prompt": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "stacked experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters .* stacked experts"),
    "changed base weights": ({"init_lora_weights": "pissa_niter_4"}, "changed base weights"),
    "changed base weights by gradients": (
        {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArB2r"}},
        "init_lora_weights = 'lora_ga': it was made beside changed base weights",
    ),
    "values between the matrices": ({"kasa_config": {"beta": 1e-4}}, "kasa_config = .*: singular values stand between"),
    "values between them by default": ({"kasa_config": {}}, "kasa_config = {}: singular values"),
    "a choice among adapters": ({"arrow_config": {"top_k": 2}}, "arrow_config = .*: each token would choose"),
    "drawn matrices": ({"monteclora_config": {}}, "monteclora_config = {}: matrices are drawn"),
    "blocks": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora = .*: the matrices are blocks"),
    "another rank": ({"r": 4}, "ranks 8 and 8, not 4"),
    "a rank that is none": ({"r": 0}, "r = 0: must be a whole number"),
    "a part of a rank": ({"rank_pattern": {"q_proj": 0.5}}, "ranks 8 and 8, not 0.5"),
    "no number": ({"lora_alpha": "x"}, "lora_alpha = 'x': must be a number"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
    "tensors beyond its targets": ({"target_modules": ["q_proj"]}, "does not name"),
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=False)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_more_than_a_sum_are_refused(model_dir: Path, tmp_path: Path, name: str) -> None:
    fields, why = REFUSED[name]
    with pytest.raises(ConfigError, match=why):
        inspect_adapter(write_adapter(tmp_path, model_dir, config=fields))


def test_settings_that_say_nothing_are_served(model_dir: Path, tmp_path: Path) -> None:
    """As peft writes them."""
    nothing: dict[str, object] = {"kasa_config": None, "arrow_config": None, "monteclora_config": None}
    nothing |= {"use_bdlora": None, "use_dora": False, "modules_to_save": [], "loftq_config": {}, "arrow_config": False}
    assert inspect_adapter(write_adapter(tmp_path, model_dir, config=nothing)).modules


def _spoil(path: Path, old: str, new: str) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    name = next(name for name in tensors if old in name)
    tensors[name.replace(old, new)] = tensors.pop(name)
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("lora_A.weight", "lora_magnitude_vector", "magnitude vector of DoRA"),
        ("lora_A.weight", "lora_embedding_A", "adapter of embeddings"),
        ("lora_B.weight", "lora_B.bias", "no matrix of LoRA"),
        ("lora_B.weight", "lora_B.other.weight", "no matrix of LoRA"),
        ("model.layers.0.self_attn.q_proj", "lm_head", "embeddings and head are not served"),
        ("layers.0.mlp.up_proj", "layers.9.mlp.up_proj", "has lora_[AB] alone"),
    ],
)
def test_tensors_of_anything_else_are_refused(model_dir: Path, tmp_path: Path, old: str, new: str, why: str) -> None:
    path = write_adapter(tmp_path, model_dir)
    _spoil(path, old, new)
    with pytest.raises(ConfigError, match=why):
        inspect_adapter(path)


def test_files_that_are_not_there_or_cut_short_are_refused(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, model_dir)
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(ConfigError, match="cut short, or damaged"):
        inspect_adapter(path)
    weights.write_bytes(b"pickle")
    with pytest.raises(ConfigError, match="cannot be read"):
        inspect_adapter(path)
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(ConfigError, match="a pickle, which is never read"):
        inspect_adapter(path)
    (path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="has no adapter_config"):
        inspect_adapter(path)


def test_tensors_that_share_bytes_are_refused_when_they_are_read(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, model_dir)
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    first, second = sorted(
        (entry for name, entry in header.items() if "_A." in name and "_proj" in name and entry["shape"] == [8, 64]),
        key=lambda entry: int(entry["data_offsets"][0]),
    )[:2]
    second["data_offsets"] = first["data_offsets"]
    weights.write_bytes(whole[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(size) + whole[8 + size :])
    with pytest.raises(ConfigError, match="another tensor reaches into it"):
        read_adapter(path, lambda _: None, lambda *_: None)


def test_scales_follow_alpha_rank_and_patterns(model_dir: Path, tmp_path: Path) -> None:
    fields: dict[str, object] = {
        "alpha_pattern": {"layers.1.mlp.up_proj": 3, "o_proj": 5},
        "target_modules": "all-linear",
    }
    path = write_adapter(tmp_path, model_dir, rank=8, alpha=32, config=fields, ranks={r"layers\.\d+\.mlp\..*": 4})
    scales = {m.name.removeprefix("model."): (m.rank, m.scale) for m in inspect_adapter(path).modules}
    assert scales["layers.0.self_attn.q_proj"] == (8, 4.0)
    assert scales["layers.0.self_attn.o_proj"] == (8, 5 / 8)
    assert scales["layers.0.mlp.up_proj"] == (4, 8.0)
    assert scales["layers.1.mlp.up_proj"] == (4, 3 / 4)
    rs = inspect_adapter(write_adapter(tmp_path / "rs", model_dir, rank=16, alpha=8, rslora=True))
    assert {m.scale for m in rs.modules} == {8 / math.sqrt(16)}


@pytest.mark.parametrize("other", ["model.language_model.layers.", "language_model.model.layers.", "layers."])
def test_an_adapter_of_a_model_around_or_without_the_head_adapts_its_layers(
    model_dir: Path, tmp_path: Path, other: str
) -> None:
    """A model that sees, before and since transformers 5, and one that embeds name their layers otherwise."""
    prefix = f"{other.replace('.', chr(92) + '.')}1"
    path = write_adapter(tmp_path, model_dir, alpha=16, config={"alpha_pattern": {f"{prefix}.mlp.up_proj": 24}})
    plain = inspect_adapter(path)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.model.layers.", f"model.{other}"): t for name, t in tensors.items()}, file)
    found = inspect_adapter(path)
    found.check(ModelConfig.from_dir(model_dir), 8)
    assert [module.name for module in found.modules] == [module.name for module in plain.modules]
    assert {m.name: m.scale for m in found.modules}["model.layers.1.mlp.up_proj"] == 3.0
    save_file(tensors | load_file(file), file)
    with pytest.raises(ConfigError, match="a module under two names"):
        inspect_adapter(path)


def test_the_digest_covers_settings_and_every_number(model_dir: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path, model_dir)
    first = inspect_adapter(path)
    tensors = load_file(path / "adapter_model.safetensors")
    name = sorted(tensors)[5]
    tensors[name][3, 3] += 1e-3
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    second = inspect_adapter(path)
    third = inspect_adapter(write_adapter(tmp_path, model_dir, alpha=17))
    assert len({first.digest, second.digest, third.digest}) == 3
    assert inspect_adapter(write_adapter(tmp_path / "copy", model_dir)).digest == first.digest


def test_an_adapter_of_another_model_is_refused(model_dir: Path, tmp_path: Path) -> None:
    model = ModelConfig.from_dir(model_dir)
    deeper = write_checkpoint(tmp_path / "deeper", tokenizer=False, num_layers=3)
    wider = write_checkpoint(tmp_path / "wider", tokenizer=False, intermediate_size=192)
    fitting = write_adapter(tmp_path / "fits", model_dir)
    inspect_adapter(fitting).check(model, 8)
    _spoil(fitting, "layers.0.mlp.up_proj.lora_A", "layers.0.mlp.experts.0.up_proj.lora_A")
    _spoil(fitting, "layers.0.mlp.up_proj.lora_B", "layers.0.mlp.experts.0.up_proj.lora_B")
    with pytest.raises(ConfigError, match=r"experts\.0\.up_proj, which is no linear module"):
        inspect_adapter(fitting).check(model, 8)
    for base, rank, why in (
        (deeper, 8, r"model\.layers\.2\.mlp\.down_proj, which is no linear module"),
        (wider, 8, r"make \[64, 192\]; the model's is \[64, 128\]"),
        (model_dir, 16, "its rank is 16; --max-lora-rank is 8"),
    ):
        adapter = inspect_adapter(write_adapter(tmp_path / "a", base, rank=rank, dtype=torch.bfloat16))
        with pytest.raises(ConfigError, match=why):
            adapter.check(model, 8)
