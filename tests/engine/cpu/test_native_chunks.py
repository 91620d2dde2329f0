"""What Llama 4 has of its own in C++: attention in chunks and experts whose inputs are weighed are as in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.nn.torch_runner import TorchRunner

from ...engine_driver import engine_config, make_engine
from ...transformers_checkpoints import LLAMA_4, SMALL, write_model
from ..test_adapters import assert_adapted_as_merged
from .judged import ROUNDED, error_of, expected_of, judged, judged_by_ranks, native_engine, tolerance_of
from .test_build import FEW_TOKENS, MANY_TOKENS, Shape, assert_exact
from .test_cut_attention import gap_of_threads
from .test_float32 import assert_steps_near

pytestmark = pytest.mark.usefixtures("native", "native_float32")

VARIANTS: dict[str, dict[str, Any]] = {
    "scout": {},
    "maverick": {"use_qk_norm": False, "interleave_moe_layer_step": 1, "attention_bias": True},
    "dense": {"moe_layers": []},
    "dense, long chunks": {"moe_layers": [], "attention_chunk_size": 700, "max_position_embeddings": 4096},
}
TOLERANCE = 1e-5  # of the range of logits and pages in float32
CUT_TOLERANCE = 0.01  # of the range of logits in bfloat16: sums are rounded in another order


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        write_model(root / name, transformers.Llama4TextConfig(**SMALL | LLAMA_4 | fields))
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ["scout", "maverick", "dense"])
def test_every_set_computes_what_torch_computes(checkpoints: Path, variant: str) -> None:
    path = checkpoints / variant
    assert error_of(judged(native_engine(path, num_threads=2)), expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
def test_float32_computes_what_torch_computes(checkpoints: Path, shape: Shape) -> None:
    assert_steps_near(checkpoints / "dense", shape, TOLERANCE)
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"enable_expert_parallel": True}], ids=str)
def test_two_ranks_compute_what_one_computes(checkpoints: Path, fields: dict[str, object]) -> None:
    path = checkpoints / "scout"
    found = judged_by_ranks(engine_config(path, dtype="bfloat16", tensor_parallel_size=2, num_threads=2, **fields))
    assert error_of(found, expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}], ids=str
)
def test_shorter_numbers_are_multiplied_as_such(checkpoints: Path, fields: dict[str, str]) -> None:
    path = checkpoints / "scout"
    expected = expected_of(path, fields.get("quantization"))
    assert error_of(judged(native_engine(path, **fields)), expected) < tolerance_of(path, ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "dtype"), [("scout", "bfloat16"), ("dense", "float32")])
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str, dtype: str) -> None:
    assert_exact(checkpoints / variant, dtype=dtype)
    torch.set_num_threads(1)


def test_a_token_that_is_cut_by_its_keys_sees_its_own_chunk(checkpoints: Path) -> None:
    """The parts of one that attends to 600 keys of its chunk, and of one to all 3,000 before it."""
    assert 0 < gap_of_threads(checkpoints / "dense, long chunks", (1300, 3000)) <= CUT_TOLERANCE


def test_adapters_go_beside_them(checkpoints: Path, tmp_path: Path) -> None:
    prompt = [(7 * i * i + 5) % 500 + 4 for i in range(110)]
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    assert_adapted_as_merged(checkpoints / "dense", tmp_path, targets, prompt)


def test_experts_in_float32_are_left_to_torch(checkpoints: Path) -> None:
    for variant, runner in (("scout", TorchRunner), ("dense", NativeRunner)):
        assert isinstance(make_engine(checkpoints / variant, dtype="float32").runner, runner)
