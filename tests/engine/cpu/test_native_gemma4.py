"""What Gemma 4 has of its own in C++: heads of two sizes that share pages, borrowed keys, normed values, inputs and
factors of layers, and experts beside an MLP are as in torch.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.torch_runner import TorchRunner

from ...adapters import merge, write_adapter
from ...engine_driver import Driver, engine_config, make_engine, prompt_logprobs
from ...transformers_checkpoints import GEMMA_4, GEMMA_4_BORROWING, GEMMA_4_MOE, SMALL, write_model
from ..test_adapters import Held, assert_adapted_as_merged, put, said_by_ranks
from .judged import OF_TORCH, ROUNDED, error_of, expected_of, judged, judged_by_ranks, native_engine, tolerance_of
from .test_build import FEW_TOKENS, MANY_TOKENS, Shape, assert_exact
from .test_cut_attention import gap_of_threads
from .test_float32 import assert_steps_near

pytestmark = pytest.mark.usefixtures("native", "native_float32")

_OWN_VALUES: dict[str, Any] = {"attention_k_eq_v": False, "num_key_value_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "keys are values": {},
    "values of their own": _OWN_VALUES | {"attention_bias": True},
    "borrowed keys": GEMMA_4_BORROWING,
    "borrowed keys, wide": GEMMA_4_BORROWING
    | {"head_dim": 256, "global_head_dim": 512, "num_attention_heads": 2, "num_key_value_heads": 1},
    "long": GEMMA_4_BORROWING | {"max_position_embeddings": 4096, "sliding_window": 1500},
    "borrowed keys, of ranks": GEMMA_4_BORROWING | {"hidden_size_per_layer_input": 64},
    "narrow inputs": GEMMA_4_BORROWING | {"hidden_size_per_layer_input": 8},
    "experts": GEMMA_4_MOE,  # these in bfloat16 alone
}
IN_CPP = [name for name in VARIANTS if name not in ("narrow inputs", "experts")]
# Of the range of logits and pages in float32: scores are as large as heads are wide, and roundings grow by that. The
# worst of torch's logits are as far from those in float64, with wide heads ten times as far as with narrow ones.
TOLERANCE, WIDE_TOLERANCE = 1e-4, 5e-4
PROMPT = [(7 * i * i + 5) % 500 + 4 for i in range(110)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        write_model(root / name, transformers.Gemma4TextConfig(**SMALL | GEMMA_4 | fields), draws_norms=True)
    return root


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ["keys are values", "borrowed keys", "borrowed keys, wide", "experts"])
def test_every_set_computes_what_torch_computes(checkpoints: Path, variant: str) -> None:
    path = checkpoints / variant
    assert error_of(judged(native_engine(path, num_threads=2)), expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("variant", IN_CPP)
def test_float32_computes_what_torch_computes(checkpoints: Path, variant: str, shape: Shape) -> None:
    assert_steps_near(checkpoints / variant, shape, WIDE_TOLERANCE if "wide" in variant else TOLERANCE)
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["keys are values", "values of their own", "borrowed keys, of ranks", "experts"])
def test_two_ranks_compute_what_one_computes(checkpoints: Path, variant: str) -> None:
    path = checkpoints / variant
    found = judged_by_ranks(engine_config(path, dtype="bfloat16", tensor_parallel_size=2, num_threads=2))
    assert error_of(found, expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["keys are values", "borrowed keys", "experts"])
def test_shorter_numbers_are_multiplied_as_such(checkpoints: Path, variant: str, quantization: str) -> None:
    path = checkpoints / variant
    found = judged(native_engine(path, quantization=quantization))
    assert error_of(found, expected_of(path, quantization)) < tolerance_of(path, ROUNDED)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*product(("keys are values", "borrowed keys"), ("bfloat16", "float32")), ("experts", "bfloat16")],
)
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str, dtype: str) -> None:
    assert_exact(checkpoints / variant, dtype=dtype)
    torch.set_num_threads(1)


def test_a_token_that_is_cut_by_its_keys_sees_those_of_its_layer(checkpoints: Path) -> None:
    """The parts of one that attends to 1,500 keys with narrow heads, and to all 3,000 with wide ones."""
    assert 0 < gap_of_threads(checkpoints / "long", (1300, 3000), dtype="float32") <= TOLERANCE


@pytest.mark.parametrize("length", [1, 64])
def test_pages_are_told_of_when_all_of_their_layers_are_computed(checkpoints: Path, length: int) -> None:
    engine, told = native_engine(checkpoints / "keys are values"), list[int]()
    driver = Driver(engine)
    driver.step([(driver.add(PROMPT), length)], told.append)
    assert told == list(range(5))


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("keys are values", ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")),
        ("borrowed keys", ("q_proj", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")),
    ],
)
def test_adapters_go_beside_them(checkpoints: Path, tmp_path: Path, variant: str, targets: tuple[str, ...]) -> None:
    assert_adapted_as_merged(checkpoints / variant, tmp_path, targets, PROMPT)


@pytest.mark.slow
def test_ranks_share_adapters_of_inputs(checkpoints: Path, tmp_path: Path) -> None:
    path, asked = checkpoints / "borrowed keys, of ranks", [PROMPT[:40], PROMPT[50:67]]
    targets = ("q_proj", "per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
    adapter = write_adapter(tmp_path / "adapter", path, rank=8, targets=targets, seed=3, alpha=32)
    driver = Driver(make_engine(merge(path, adapter, tmp_path / "merged")))
    wanted = driver.generate([driver.add(prompt) for prompt in asked])
    plain = Driver(make_engine(path))
    assert said_by_ranks(path, adapter, asked) == wanted != plain.generate([plain.add(prompt) for prompt in asked])


def test_adapters_go_beside_experts_and_mlps(checkpoints: Path, tmp_path: Path) -> None:
    """In bfloat16, as C++ has them: as near as torch to what float32 makes of them."""
    source, targets = checkpoints / "experts", ("o_proj", "gate_proj", "up_proj", "down_proj")
    adapter = write_adapter(tmp_path / "adapter", source, rank=8, targets=targets, seed=3, alpha=8)

    def judged_by(dtype: str, *, native: bool) -> Tensor:
        config = engine_config(source, dtype=dtype, enable_lora=True)
        put(engine := Engine(config, num_blocks=64, native=native), 0, adapter)
        assert isinstance(engine.runner, NativeRunner) == native
        return prompt_logprobs(engine, PROMPT, Held(0))

    wanted, theirs = judged_by("float32", native=False), judged_by("bfloat16", native=False)
    plain = prompt_logprobs(make_engine(source, dtype="float32"), PROMPT)
    error = (judged_by("bfloat16", native=True) - wanted).abs().mean()
    assert error < OF_TORCH * (theirs - wanted).abs().mean() < (plain - wanted).abs().mean()


def test_what_there_is_no_code_for_is_left_to_torch(checkpoints: Path) -> None:
    for variant in VARIANTS:
        runner = NativeRunner if variant in IN_CPP else TorchRunner
        assert isinstance(make_engine(checkpoints / variant, dtype="float32").runner, runner)
