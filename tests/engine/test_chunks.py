"""Attention in chunks, and what else Llama 4 has, computes what transformers' own class computes, in whatever steps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
import transformers

from kvferry.common.errors import ConfigError
from kvferry.engine.engine import Engine
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig

from ..engine_driver import GREEDY, Driver, make_engine, prompt_logprobs
from ..transformers_checkpoints import LLAMA_4, SMALL, write_model
from .test_adapters import assert_adapted_as_merged
from .transformers_reference import reference_logprobs

VARIANTS: dict[str, dict[str, object]] = {
    "scout": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
        }
    },
    "maverick": {"use_qk_norm": False, "interleave_moe_layer_step": 1, "attention_bias": True},
    "no chunks": {"attention_chunk_size": 4096, "attn_temperature_tuning": False},
}
NEAR = 1e-3  # logits that a rounding may bring into the other order
PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(110)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        write_model(root / name, transformers.Llama4TextConfig(**SMALL | LLAMA_4 | fields))
    return root


def _answers(engine: Engine, asked: list[list[int]], chunk: int) -> list[list[int]]:
    driver, sampling = Driver(engine), msgspec.structs.replace(GREEDY, max_tokens=20)
    return driver.generate([driver.add(prompt, sampling) for prompt in asked], chunk=chunk)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    """A chunk has 48 tokens: it begins within a page, a step, an answer, and at their borders."""
    check_checkpoint(checkpoints / variant, ModelConfig.from_dir(checkpoints / variant))
    asked = [PROMPT[:length] for length in (1, 31, 47, 48, 49, 95, 110)]
    for block_size, chunk in ((16, 10**9), (8, 7), (128, 64)):
        engine = make_engine(checkpoints / variant, block_size=block_size)
        for prompt, answer in zip(asked, _answers(engine, asked, chunk), strict=True):
            following = reference_logprobs(checkpoints / variant, (*prompt, *answer[:-1]))[len(prompt) - 1 :]
            chosen = following.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
            assert bool((following.amax(1) - chosen <= NEAR).all()), (block_size, chunk)


def test_chunks_matter(checkpoints: Path) -> None:
    [of_chunks], [of_all] = (_answers(make_engine(checkpoints / name), [PROMPT], 64) for name in ("scout", "no chunks"))
    assert of_chunks != of_all


def test_adapters_go_beside_attention_in_chunks(checkpoints: Path, tmp_path: Path) -> None:
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    assert_adapted_as_merged(checkpoints / "scout", tmp_path, targets, PROMPT)


@pytest.mark.parametrize("form", [None, "int8"])
def test_shorter_numbers_are_near_float32(checkpoints: Path, form: str | None) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        engine = make_engine(checkpoints / "scout", dtype=dtype, quantization=form if dtype == "bfloat16" else None)
        found[dtype] = prompt_logprobs(engine, PROMPT)
    assert (found["float32"] - found["bfloat16"]).abs().median() < 0.5  # of some 8 on average


def test_exact_steps_are_refused_where_torch_would_take_them(checkpoints: Path) -> None:
    with pytest.raises(
        ConfigError, match="deterministic: attention in chunks has exact steps, and so speculation, in C"
    ):
        make_engine(checkpoints / "scout", deterministic=True)
