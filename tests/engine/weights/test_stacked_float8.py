"""Stacks of experts in 8-bit floats: with a scale for each, as Mistral Small 4 is published, beside parts that see; in
blocks, as transformers saves them.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts

from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig

from ...deepseek import EXPERTS, write_deepseek
from ...engine_driver import Driver, make_engine

PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(150)]
STORED: dict[str, object] = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    "weight_block_size": None,
}


def _rounded(matrices: Tensor, name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a checkpoint has in place of a matrix, or of a stack of some, and what it stands for."""
    scales = matrices.abs().amax((-2, -1), keepdim=matrices.dim() == 3) / 448
    numbers = (matrices / scales).to(torch.float8_e4m3fn)
    if matrices.dim() == 3:
        stored = {name: numbers, f"{name}_scale_inv": scales, f"{name}_activation_scale": torch.full((8,), 0.5)}
    else:
        module = name.removesuffix(".weight")
        stored = {name: numbers, f"{module}.weight_scale_inv": scales, f"{module}.activation_scale": torch.tensor(0.5)}
    return stored, numbers.float() * scales


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one checkpoint as published, and the language model that it stands for."""
    root = tmp_path_factory.mktemp("models")
    plain = write_deepseek(root / "plain", "mistral4", **EXPERTS["mistral4"])  # type: ignore[arg-type]
    stored: dict[str, Tensor] = {"vision_tower.patch_conv.weight": torch.ones(2, 2)}
    meant = dict(load_file(plain / "model.safetensors"))
    for name, tensor in list(meant.items()):
        own = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        if "_proj" in name and "norm" not in name:
            parts, meant[name] = _rounded(tensor, own)
            stored |= parts
        else:
            stored[own] = tensor
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    (root / "stored").mkdir()
    save_file(stored, root / "stored" / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((plain / "config.json").read_text())
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    (root / "stored" / "config.json").write_text(json.dumps(config | {"quantization_config": STORED}))
    return root


def _answer(engine: Engine) -> list[list[int]]:
    driver = Driver(engine)
    return driver.generate([driver.add(PROMPT)], chunk=64)


def test_each_expert_has_its_own_scale(checkpoints: Path) -> None:
    config = ModelConfig.from_dir(checkpoints / "stored")
    assert config.quantization is not None and config.quantization.is_float8 and config.rope.query_beta == 0.1
    check_checkpoint(checkpoints / "stored", config)
    assert _answer(make_engine(checkpoints / "stored")) == _answer(make_engine(checkpoints / "plain"))


# --- in blocks -------------------------------------------------------------------------------------------------------

SIZES = SimpleNamespace(hidden_size=64, num_local_experts=8, moe_intermediate_size=48, hidden_act="silu")
BLOCK = (16, 8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "plain"
    return write_deepseek(path, "mistral4", **EXPERTS["mistral4"], moe_intermediate_size=48)  # type: ignore[arg-type]


def _write_blocks(path: Path, plain: Path, *, is_transposed: bool) -> dict[str, Tensor]:
    """Write its experts as transformers' class has them in 8 bits, and return what that reads in them."""
    generator = torch.Generator().manual_seed(0)
    stacks = FP8Experts(SIZES, block_size=BLOCK).state_dict()
    tensors, meant = load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if name.rpartition(".")[2] in stacks]:
        own, scales = (stacks[f"{name.rpartition('.')[2]}{end}"] for end in ("", "_scale_inv"))
        numbers = torch.randn(own.shape, generator=generator).mul(20).to(own.dtype)
        factors = torch.rand(scales.shape, generator=generator, dtype=scales.dtype) / 100 + 0.001
        meant[name] = Fp8Dequantize(None)._dequantize_one(numbers, factors, torch.float32)
        stored = {name: numbers, f"{name}_scale_inv": factors}
        tensors |= {key: each.mT.contiguous() if is_transposed else each for key, each in stored.items()}
    assert len(meant) == 2 * 3
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [*BLOCK]}
    told["modules_to_not_convert"] = ["self_attn", "shared_experts", "lm_head"]
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return meant


@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_of_stacked_experts_mean_what_transformers_reads_in_them(
    tmp_path: Path, plain: Path, is_transposed: bool
) -> None:
    meant = _write_blocks(tmp_path / "stored", plain, is_transposed=is_transposed)
    config = ModelConfig.from_dir(tmp_path / "stored")
    check_checkpoint(tmp_path / "stored", config)
    decoder = Decoder(config, Communicator(), dtype=torch.float32, device=torch.device("cpu"))
    load_weights(decoder, tmp_path / "stored", load_format="auto", seed=0)
    matrices = {linear.name: linear.weight for linear in decoder.linears() if ".experts." in linear.name}
    assert len(matrices) == 3 * 8 * 2
    for name, stack in meant.items():
        layer, _, part = name.rpartition(".")
        for index, wanted in enumerate(stack):
            weight = matrices[f"{layer}.{index}.{part}"]
            assert isinstance(weight, DenseWeight) and torch.equal(weight.plain, wanted)
