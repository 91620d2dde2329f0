"""Models in float32 in C++: torch's logits and pages within 1e-5 of their range, exact ones the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.engine.cpu import build
from kvferry.engine.cpu.compiler import X86_FLOAT32_SETS, X86_SETS
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.nn.torch_runner import TorchRunner

from ...checkpoints import write_checkpoint
from ...engine_driver import make_engine, prompts
from ...transformers_checkpoints import write_model
from .test_build import FEW_TOKENS, MANY_TOKENS, SAMPLING, VARIANTS, Recorded, Shape, assert_exact
from .test_cut_attention import MODELS, gap_of_threads, write_long_model
from .test_native_experts import QWEN3

pytestmark = pytest.mark.usefixtures("native_float32")

TOLERANCE = 1e-5  # of the range of logits, and of the largest entry of pages


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (family, fields) in VARIANTS.items():
        write_checkpoint(root / name, family, **({"tokenizer": False} | fields))  # type: ignore[arg-type]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_and_answers_are_those_of_torch(checkpoints: Path, variant: str, shape: Shape) -> None:
    """Chunks of several prompts, first and later ones, beside tokens of running answers."""
    lengths, steps = shape
    runs = [Recorded(checkpoints / variant, is_native=native, dtype="float32") for native in (True, False)]
    ours, theirs = ([run.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)] for run in runs)
    for counts in steps:
        for run, seqs in zip(runs, (ours, theirs), strict=True):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        assert [seq.token_ids for seq in ours] == [seq.token_ids for seq in theirs]
        assert_near(runs, TOLERANCE)
    assert runs[0].native_steps == len(steps)


def assert_steps_near(model_dir: Path, shape: Shape, tolerance: float, **fields: Any) -> None:
    """Tokens are torch's, logits and pages near to it, after each step in two threads."""
    lengths, steps = shape
    runs = [Recorded(model_dir, is_native=native, dtype="float32", num_threads=2, **fields) for native in (True, False)]
    ours, theirs = ([run.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)] for run in runs)
    for counts in (*steps, (1,) * len(lengths)):
        for run, seqs in zip(runs, (ours, theirs), strict=True):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        assert [seq.token_ids for seq in ours] == [seq.token_ids for seq in theirs]
        assert_near(runs, tolerance)
        pages, wanted = (run.engine.kv_pages for run in runs)
        assert torch.equal(pages.any(-1), wanted.any(-1)), "a slot was written by one and not by the other"


def assert_near(runs: list[Recorded], tolerance: float) -> None:
    """The last logits and the pages of the first are the second's, within this part of their range."""
    logits, wanted = (run.logits[-1] for run in runs)
    assert (logits - wanted[: len(logits)]).abs().max() <= tolerance * (wanted.max() - wanted.min())
    pages, wanted = (run.engine.kv_pages for run in runs)
    assert (pages - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama without sharing", "qwen2 window", "gemma2"])
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str) -> None:
    assert_exact(checkpoints / variant, dtype="float32")
    torch.set_num_threads(1)


def test_whole_numbers_and_experts_are_left_to_torch(checkpoints: Path, tmp_path: Path) -> None:
    import transformers

    experts = write_model(tmp_path / "experts", transformers.Qwen3MoeConfig(**QWEN3))
    for path, asked, runner in (
        (checkpoints / "llama", None, NativeRunner),
        (checkpoints / "llama", "int8", TorchRunner),
        (experts, None, TorchRunner),
    ):
        assert isinstance(make_engine(path, dtype="float32", quantization=asked).runner, runner)


def test_a_set_without_float32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLOAT32_SETS", X86_FLOAT32_SETS)
    monkeypatch.setattr(build, "processor_features", lambda: X86_SETS["amx"])
    assert build.usable_sets(is_float32=True) == build.usable_sets("avx2", is_float32=True) == ["avx2_float32"]
    with pytest.raises(ConfigError, match="cpu_isa: amx computes bfloat16 alone; for float32 use auto or avx2"):
        build.usable_sets("amx", is_float32=True)


@pytest.mark.parametrize("name", MODELS)
def test_attention_that_is_cut_into_parts_is_the_whole_but_for_roundings(name: str, tmp_path: Path) -> None:
    assert 0 < gap_of_threads(write_long_model(tmp_path, name), (3000, 17), dtype="float32") <= 1e-5
