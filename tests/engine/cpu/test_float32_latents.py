"""Latent attention in float32 in C++: torch's logits and pages but for the last bits, exact ones to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.nn.torch_runner import TorchRunner
from kvferry.models.config import ModelConfig
from kvferry.models.native import not_in_native

from ...adapters import write_adapter
from ...deepseek import write_deepseek
from ...engine_driver import Driver, make_engine, prompts
from ..test_adapters import expected as of_merged
from ..test_adapters import put, sequence
from .latent_models import PLAIN, write_models
from .test_build import FEW_TOKENS, MANY_TOKENS, Shape, assert_exact
from .test_cut_attention import gap_of_threads
from .test_float32 import assert_steps_near

pytestmark = pytest.mark.usefixtures("native_float32")

TOLERANCE = 2e-5  # of the range of logits, and of the largest entry of pages


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("variant", PLAIN)
def test_float32_computes_what_torch_computes(checkpoints: Path, variant: str, shape: Shape) -> None:
    """Chunks of several prompts, first and later ones, beside tokens of running answers, in two threads."""
    assert_steps_near(checkpoints / variant, shape, TOLERANCE)
    torch.set_num_threads(1)


@pytest.mark.parametrize("variant", ["v2, odd sizes, yarn", "v3, many heads"])
def test_exact_results_in_float32_show_neither(checkpoints: Path, variant: str) -> None:
    assert_exact(checkpoints / variant, dtype="float32")
    torch.set_num_threads(1)


def test_parts_make_the_whole_in_float32(checkpoints: Path) -> None:
    assert 0 < gap_of_threads(checkpoints / "v3", (3000, 17), dtype="float32") <= TOLERANCE
    torch.set_num_threads(1)


def test_adapters_add_what_they_add_to_a_merged_model(checkpoints: Path, tmp_path: Path) -> None:
    """In float32, of a token alone, of chunks beside others, and of prompts that threads take in panels."""
    targets = ("kv_a_proj_with_mqa", "q_a_proj", "q_b_proj", "o_proj", "down_proj")
    path = write_adapter(tmp_path / "adapter", checkpoints / "v3", rank=13, targets=targets)
    fields = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16, "max_model_len": 512}
    ids = prompts([1, 20, 170, 33])
    slots: list[int | None] = [0, None, 0, 0]
    wanted = [
        of_merged(checkpoints / "v3", None if slot is None else path, prompt, tmp_path / str(index))
        for index, (prompt, slot) in enumerate(zip(ids, slots, strict=True))
    ]
    for num_threads in (1, 2):
        engine = make_engine(checkpoints / "v3", num_threads=num_threads, **fields)
        assert isinstance(engine.runner, NativeRunner)
        put(engine, 0, path)
        driver = Driver(engine)
        for chunk in (10**9, 33):
            seqs = [sequence(driver, prompt, slot) for prompt, slot in zip(ids, slots, strict=True)]
            assert driver.generate(seqs, chunk=chunk) == wanted
    torch.set_num_threads(1)


def test_sizes_that_fill_no_vectors_are_left_to_torch(tmp_path: Path) -> None:
    path = write_deepseek(tmp_path / "model")
    missing = not_in_native(ModelConfig.from_dir(path), None, is_float32=False)
    assert missing == ["latents of such sizes"]
    assert isinstance(make_engine(path, dtype="bfloat16").runner, TorchRunner)
