"""Layers with heads of two sizes, on CUDA: what transformers' own class computes, in graphs and outside of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.engine.cuda.experts import GroupedExperts
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.flashinfer_parts import FlashInferParts

from ..engine_driver import Driver, assert_told_of_pages, each_of, prompts
from ..transformers_checkpoints import GEMMA_4, GEMMA_4_BORROWING, GEMMA_4_MOE, SMALL, write_model
from .cuda.lockstep import two_ranks
from .test_cuda_states import _config, _generate, _judge

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
LENGTHS = [1, 15, 16, 90]
WIDE: dict[str, object] = {"head_dim": 64, "global_head_dim": 128, "hidden_size": 128}  # what CUDA attends with
VARIANTS: dict[str, dict[str, object]] = {
    "plain": GEMMA_4 | WIDE,
    "heads as published": GEMMA_4
    | WIDE
    | {"head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 3}
    | {"layer_types": GEMMA_4["layer_types"][:3], "num_key_value_heads": 4, "num_global_key_value_heads": 2},
    "borrowing": GEMMA_4_BORROWING | WIDE,
    "experts beside": GEMMA_4_MOE | WIDE,
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        config = transformers.Gemma4TextConfig(**SMALL | fields)
        write_model(root / name, config, dtype=torch.bfloat16, draws_norms=True)
        _soften(root / name / "model.safetensors")
    return root


variant = each_of(VARIANTS)


@pytest.fixture(scope="module")
def captured(checkpoints: Path, variant: str) -> Engine:
    return _engine(checkpoints / variant)


@pytest.fixture(scope="module")
def launched(checkpoints: Path, variant: str) -> Engine:
    return _engine(checkpoints / variant, enforce_eager=True)


def _soften(path: Path) -> None:
    """Have queries ask less. Scores are not scaled: of norms drawn near 1 one key takes all, as 16 bits round it."""
    tensors = load_file(path)
    save_file({name: each / 8 if "q_norm" in name else each for name, each in tensors.items()}, path, {"format": "pt"})


def _engine(model_dir: Path, **fields: object) -> Engine:
    return Engine(_config(model_dir, **fields), num_blocks=100)


def test_tokens_and_log_probabilities_are_those_of_transformers(
    checkpoints: Path, variant: str, captured: Engine, launched: Engine
) -> None:
    for engine, chunk in ((captured, 10**9), (launched, 37)):
        assert isinstance(engine.runner, CudaRunner) and (engine.runner.pieces is None) == (engine is launched)
        assert type(engine.runner._attention) is FlashInferParts
        answers = _generate(engine, chunk, LENGTHS)
        _judge(checkpoints / variant, list(zip(prompts(LENGTHS), answers, strict=True)))


@pytest.mark.parametrize("variant", ["plain", "borrowing", "experts beside"], indirect=True)
def test_two_ranks_yield_what_one_does(checkpoints: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    config = _config(checkpoints / variant, tensor_parallel_size=2)
    with two_ranks(monkeypatch, config, 100) as engine:
        answers = _generate(engine, lengths=LENGTHS)
    _judge(checkpoints / variant, list(zip(prompts(LENGTHS), answers, strict=True)))


def test_experts_beside_an_mlp_are_computed_together(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "experts beside")
    assert isinstance(engine.runner, CudaRunner) and engine.runner._decoder.can_be_captured
    assert {type(block.grouped) for block in engine._experts.blocks.values()} == {GroupedExperts}
    driver = Driver(engine)
    driver.generate([driver.add(prompt) for prompt in prompts([30, 5, 9])])
    engine.runner.wait()  # for the last step's counts
    taken = [sum(counts.taken) for counts in engine.expert_loads()]
    assert taken == [3 * (30 + 5 + 9 + 3 * 7)] * 6, "of each token, padding left out"


@pytest.mark.parametrize("variant", ["plain", "borrowing"], indirect=True)
@pytest.mark.parametrize("eager", [False, True])
def test_pages_are_told_of_once_all_of_their_layers_are_written(
    captured: Engine, launched: Engine, eager: bool
) -> None:
    assert_told_of_pages(launched if eager else captured)


def test_pages_in_8_bits_are_refused(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype: fp8 is for layers whose heads are all of one size"):
        _engine(checkpoints / "plain", kv_cache_dtype="fp8")
