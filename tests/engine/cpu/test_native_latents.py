"""Latent attention in C++ computes what torch computes, in whatever steps, on whatever threads and ranks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from kvferry.engine.cpu.runner import NativeRunner

from ...engine_driver import engine_config, prompts
from .judged import error_of, expected_of, judged, judged_by_ranks, native_engine, of_torch
from .latent_models import VARIANTS, write_models
from .test_build import SAMPLING, Recorded, assert_exact
from .test_cut_attention import assert_no_number_shows, gap_of_threads

pytestmark = pytest.mark.usefixtures("native")

# The median of a log-probability's error, where log-probabilities spread over some 20 and torch is 0.1 to 0.2 off.
OF_TORCH = 1.2  # of what torch in bfloat16 is off
ROUNDED = 0.25  # with inputs of products in 8 bits
CUT_TOLERANCE = 0.01  # of the range of logits: sums are rounded in another order


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), VARIANTS)


@cache
def _tolerance(model_dir: Path) -> float:
    return OF_TORCH * error_of(of_torch(model_dir, dtype="bfloat16"), expected_of(model_dir))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_set_computes_what_torch_computes(checkpoints: Path, variant: str) -> None:
    """Within bfloat16's rounding, against float32 that is not rounded at all."""
    path = checkpoints / variant
    assert error_of(judged(native_engine(path, num_threads=2)), expected_of(path)) < _tolerance(path)


@pytest.mark.parametrize("block_size", [8, 128])
def test_block_size_does_not_matter(checkpoints: Path, block_size: int) -> None:
    path = checkpoints / "v3"
    assert error_of(judged(native_engine(path, block_size=block_size)), expected_of(path)) < _tolerance(path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["v3", "v2 with experts"])
def test_whole_numbers_are_multiplied_as_such(checkpoints: Path, variant: str, quantization: str) -> None:
    engine = native_engine(checkpoints / variant, quantization=quantization)
    assert isinstance(engine.runner, NativeRunner)
    latents = engine.runner.decoder._model.layers[0].attention.latents.contents
    assert latents.inputs.weight.integers and latents.queries.weight.integers and not latents.to_keys.integers
    assert error_of(judged(engine), expected_of(checkpoints / variant, quantization)) < ROUNDED


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ["v3", "v3, many heads", "v2 with experts"])
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str) -> None:
    assert_exact(checkpoints / variant, dtype="bfloat16")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("variant", "lengths"), [("v3", (3000,)), ("v3", (1500, 17)), ("v3, many heads", (600,))], ids=str
)
def test_parts_make_the_whole(checkpoints: Path, variant: str, lengths: tuple[int, ...]) -> None:
    assert gap_of_threads(checkpoints / variant, lengths) <= CUT_TOLERANCE


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_an_earlier_owner_left_is_not_seen(checkpoints: Path, deterministic: bool) -> None:
    found = []
    for left in (0.0, float("nan")):
        run = Recorded(checkpoints / "v3", is_native=True, num_blocks=128, num_threads=2, deterministic=deterministic)
        run.engine.kv_pages.fill_(left)
        seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts([30, 1301, 16], 500)]
        for counts in ((30, 1200, 16), (1, 101, 1), (1, 1, 1)):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        found.append(torch.cat(run.logits))
    assert found[0].isfinite().all() and torch.equal(*found)


def test_a_latent_that_is_no_number_is_not_hidden(checkpoints: Path) -> None:
    assert_no_number_shows(checkpoints / "v3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("v3", {}),
        ("v3", {"quantization": "int8"}),
        ("v3 biased, pairs half a head apart", {}),
        ("v3 with experts", {}),
        ("v3 with experts", {"enable_expert_parallel": True}),
    ],
    ids=str,
)
def test_two_ranks_have_all_latents_and_half_of_the_heads(
    checkpoints: Path, variant: str, fields: dict[str, object]
) -> None:
    model_dir = checkpoints / variant
    config = engine_config(model_dir, dtype="bfloat16", tensor_parallel_size=2, num_threads=2, **fields)
    found = judged_by_ranks(config)
    quantization = fields.get("quantization")
    expected = expected_of(model_dir, None if quantization is None else str(quantization))
    assert error_of(found, expected) < (_tolerance(model_dir) if quantization is None else ROUNDED)
