"""A model that GPUs have no attention for is known by its shape: a start and an engine refuse it in the same words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvferry.common.config import EngineConfig, SpeculativeConfig
from kvferry.common.errors import ConfigError
from kvferry.engine.choose import check_kernels, choose_dtype
from kvferry.launch.engine_checks import check_engine
from kvferry.models.config import ModelConfig
from kvferry.sizing.weights import item_bytes

from ..checkpoints import write_checkpoint
from ..sizing.models import model_of_text

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.engine.choose.has_products", lambda device: True)


def engine_of(path: Path, **fields: object) -> EngineConfig:
    return EngineConfig.model_validate({"model_dir": path, "served_model_name": "m", "device": "cuda"} | fields)


def refusals(engine: EngineConfig, model: ModelConfig) -> set[str]:
    """Return what the checks of a start, and an engine before it reads weights, say."""
    found = set()
    with pytest.raises(ConfigError) as error:
        check_engine(engine, model)
    found.add(str(error.value))
    with pytest.raises(ConfigError) as error:
        check_kernels(engine, model, CUDA, choose_dtype(engine, model, CUDA))
    return found | {str(error.value)}


def checkpoint(path: Path, **fields: object) -> ModelConfig:
    write_checkpoint(path, tokenizer=False, **fields)  # type: ignore[arg-type]
    return ModelConfig.from_dir(path)


@pytest.mark.parametrize("dim", [80, 96])
def test_heads_without_kernels_are_refused_before_weights_are_read(tmp_path: Path, dim: int) -> None:
    model, engine = checkpoint(tmp_path, head_dim=dim, dtype="bfloat16"), engine_of(tmp_path)
    [said] = refusals(engine, model)
    assert said == f"device: GPUs attend with heads of 64, 128, 256, 512 numbers, the model's have {dim}; use cpu"
    check_engine(engine.model_copy(update={"device": "cpu"}), model)
    check_engine(engine, replace(model, head_dim=64))


def test_wide_heads_are_kept_in_16_bits(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, head_dim=512, dtype="bfloat16")
    check_engine(engine_of(tmp_path), model)
    [said] = refusals(engine_of(tmp_path, kv_cache_dtype="fp8"), model)
    assert said == "kv_cache_dtype: GPUs attend with heads of 512 numbers in 16 bits; use auto"


def test_each_kind_of_uneven_heads_needs_kernels(tmp_path: Path) -> None:
    check_engine(engine_of(tmp_path), model_of_text(tmp_path / "known", "gemma-4-e2b"))
    model = model_of_text(tmp_path / "other", "gemma-4-e2b", head_dim=192, global_head_dim=384)
    [said] = refusals(engine_of(tmp_path), model)
    assert "the model's have 192" in said


def test_float32_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, head_dim=64, dtype="bfloat16")
    [said] = refusals(engine_of(tmp_path, dtype="float32"), model)
    assert said == "dtype: GPUs attend in 16 bits, not in float32; use bfloat16, or device cpu"


def test_a_draft_model_needs_kernels_too(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "large", head_dim=64, dtype="bfloat16")
    checkpoint(tmp_path / "small", head_dim=32, dtype="bfloat16")
    drafts = SpeculativeConfig(method="draft_model", model=tmp_path / "small", num_speculative_tokens=2)
    [said] = refusals(engine_of(tmp_path / "large", speculative_config=drafts), model)
    assert "speculative_config: the draft model" in said and "the model's have 32" in said


def test_float32_checkpoints_run_in_bfloat16_on_gpus_alone(tmp_path: Path) -> None:
    model, engine = checkpoint(tmp_path, head_dim=64, dtype="float32"), engine_of(tmp_path)
    check_engine(engine, model)
    assert choose_dtype(engine, model, CUDA) == torch.bfloat16 and item_bytes(engine, model) == 2
    on_cpu = engine.model_copy(update={"device": "cpu"})
    assert choose_dtype(on_cpu, model, torch.device("cpu")) == torch.float32 and item_bytes(on_cpu, model) == 4
    for dtype, name, size in ((torch.float32, "float32", 4), (torch.bfloat16, "bfloat16", 2)):
        asked = engine.model_copy(update={"dtype": name})
        assert choose_dtype(asked, model, CUDA) == dtype and item_bytes(asked, model) == size
    half = replace(model, dtype="float16")
    assert choose_dtype(on_cpu, half, torch.device("cpu")) == torch.bfloat16 and item_bytes(on_cpu, half) == 2
