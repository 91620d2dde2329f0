"""gpt-oss's attention is that of transformers, beside a feed-forward that both have: sinks, windows, biases, yarn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvferry.models.families.table import FAMILIES

from ...engine_driver import Driver, make_engine, prompts

NAME = "GptOssForCausalLM"
NUM_TOKENS = 8
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "sliding_window": 20,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}


def _dense_model(path: Path, num_kv_heads: int) -> Any:
    """Make transformers' model with a Llama's feed-forward in place of experts, and write it."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Dense(LlamaMLP):  # type: ignore[misc]  # mypy skips transformers
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return super().forward(x), None

    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}
    kinds: Any = transformers
    sizes = SIZES | {"num_key_value_heads": num_kv_heads}
    config = kinds.GptOssConfig(**sizes, rope_parameters=yarn | {"rope_theta": 150_000.0}, attn_implementation="eager")
    model, dense = kinds.GptOssForCausalLM(config), kinds.LlamaConfig(hidden_size=64, intermediate_size=96)
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Dense(dense)
    for name, tensor in model.named_parameters():
        scale = tensor.shape[-1] ** -0.5 * (3 if "q_proj" in name else 1) if tensor.dim() == 2 else 1.0
        drawn = torch.randn(tensor.shape, generator=generator) * scale
        tensor.data = 1 + 3 * (name == "model.norm.weight") + 0.1 * drawn if "norm" in name else drawn
    save_file({name: tensor.data for name, tensor in model.named_parameters()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": [NAME]}))
    return model.eval()


@pytest.mark.parametrize(("exact", "num_kv_heads"), [(False, 2), (True, 2), (True, 4)])
def test_greedy_tokens_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool, num_kv_heads: int
) -> None:
    monkeypatch.setitem(FAMILIES, NAME, replace(FAMILIES[NAME], experts=None))
    model = _dense_model(tmp_path, num_kv_heads)
    driver = Driver(make_engine(tmp_path, dtype="float32", deterministic=exact))
    asked = prompts([1, 17, 70, 150], 500)
    answers = driver.generate([driver.add(prompt) for prompt in asked], chunk=40)
    for prompt, answer in zip(asked, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2).values
        assert bool((best[:, 0] - best[:, 1] > 1e-4).all()), "unclear"
        assert answer == logits.argmax(-1).tolist() and len(answer) == NUM_TOKENS
