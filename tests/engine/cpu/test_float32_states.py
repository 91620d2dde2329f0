"""Layers that keep a state in float32 in C++: torch's logits and states but for the last bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.common.batch import Batch, BatchRow
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.nn.torch_runner import TorchRunner
from kvferry.models.config import ModelConfig
from kvferry.models.native import not_in_native

from ...adapters import merge, write_adapter
from ...engine_driver import Driver, engine_config, make_engine, prompts
from ..test_adapters import put, sequence
from .judged import error_of, expected_of, judged_by_ranks
from .state_models import DENSE, SPARSE, write_states
from .test_build import FEW_TOKENS, MANY_TOKENS, Recorded, Shape
from .test_float32 import assert_near, assert_steps_near

pytestmark = pytest.mark.usefixtures("native_float32")

TOLERANCE = 2e-4  # of the range of logits, and of the largest entry of pages: a state adds up all that was rounded
_QWEN = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "q_proj", "o_proj", "up_proj")
ADAPTED = {  # matrices of each kind of layer
    "qwen3.5": _QWEN,
    "lfm2": ("in_proj", "out_proj", "q_proj", "w1"),
    "granite4": ("in_proj", "out_proj", "q_proj", "o_proj"),
    "nemotron h": ("in_proj", "out_proj", "q_proj", "up_proj", "down_proj"),
    "falcon h1": ("in_proj", "out_proj", "q_proj", "o_proj", "gate_proj", "down_proj"),
}
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of keys": ("qwen3.5", {"linear_key_head_dim": 24}),
    "heads of values": ("qwen3.5", {"linear_value_head_dim": 24}),
    "half a pair of vectors": ("qwen3.5", {"linear_num_key_heads": 1, "linear_num_value_heads": 1}),
    "a long convolution": ("qwen3.5", {"linear_conv_kernel_dim": 17}),
    "a long convolution alone": ("lfm2", {"conv_L_cache": 17}),
    "memories of odd rows": ("granite4", {"mamba_d_state": 24}),
    "small heads": ("granite4", {"mamba_n_heads": 16}),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("models"), DENSE)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("variant", DENSE)
def test_float32_computes_what_torch_computes(checkpoints: Path, variant: str, shape: Shape) -> None:
    """Chunks of several prompts, first and later ones, beside tokens of running answers, in two threads."""
    assert_steps_near(checkpoints / variant, shape, TOLERANCE, block_size=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["qwen3.5", "qwen3 next, dense, a state behind all", "falcon h1, normed before gates, biases"]
)
def test_two_ranks_compute_what_torch_computes(checkpoints: Path, variant: str) -> None:
    config = engine_config(checkpoints / variant, dtype="float32", tensor_parallel_size=2, num_threads=2, block_size=16)
    assert error_of(judged_by_ranks(config), expected_of(checkpoints / variant)) < 1e-4


@pytest.mark.parametrize("variant", ["qwen3.5", "falcon h1"])
def test_one_runner_goes_on_from_the_others_states(checkpoints: Path, variant: str) -> None:
    """As a worker with C++ does behind one without it."""
    runs = [Recorded(checkpoints / variant, is_native=native, dtype="float32") for native in (True, False)]
    for first, second in (runs, runs[::-1]):
        seqs = first.prefill((40, 200))
        second.engine.kv_pages.copy_(first.engine.kv_pages)
        for run in (first, second):
            run.engine.step(Batch([BatchRow(seq, 1) for seq in seqs]))
        assert_near(runs, TOLERANCE)


@pytest.mark.parametrize("variant", ADAPTED)
def test_adapters_go_beside_layers_with_states(checkpoints: Path, tmp_path: Path, variant: str) -> None:
    model_dir = checkpoints / variant
    adapter = write_adapter(tmp_path / "adapter", model_dir, rank=8, targets=ADAPTED[variant], seed=3, alpha=32)
    engine = make_engine(model_dir, enable_lora=True, max_loras=2, num_threads=2)
    assert isinstance(engine.runner, NativeRunner)
    put(engine, 1, adapter)
    driver, merged = Driver(engine), Driver(make_engine(merge(model_dir, adapter, tmp_path / "merged")))
    asked = prompts([40, 17, 300], 500)
    wanted = merged.generate([merged.add(prompt) for prompt in asked])
    assert driver.generate([sequence(driver, prompt, 1) for prompt in asked], chunk=90) == wanted
    assert driver.generate([driver.add(prompt) for prompt in asked], chunk=90) != wanted


@pytest.mark.parametrize("odd", ODD)
def test_other_sizes_and_experts_in_float32_are_left_to_torch(tmp_path: Path, odd: str) -> None:
    variant, fields = ODD[odd]
    kind, sizes = DENSE[variant]
    path = write_states(tmp_path, {"odd": (kind, sizes | fields)}) / "odd"
    assert not_in_native(ModelConfig.from_dir(path), None, is_float32=True) == ["layers that keep such states"]
    assert isinstance(make_engine(path).runner, TorchRunner)


@pytest.mark.parametrize("variant", ["qwen3.5 moe", "lfm2 moe", "granite4 moe"])
def test_experts_beside_states_are_left_to_torch(tmp_path: Path, variant: str) -> None:
    path = write_states(tmp_path, {variant: SPARSE[variant]}) / variant
    config = ModelConfig.from_dir(path)
    assert not_in_native(config, None, is_float32=True) == ["experts in float32"]
    assert not_in_native(config, None, is_float32=False) == []
    assert isinstance(make_engine(path).runner, TorchRunner)
