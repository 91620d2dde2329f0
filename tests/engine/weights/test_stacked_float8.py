"""Stacks of experts in 8-bit floats with a scale for each, as Mistral Small 4 is published, beside parts that see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvferry.engine.engine import Engine
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
