"""Layers that keep a state in C++ compute what torch computes, in whatever steps and blocks, on whatever threads."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from kvferry.common.batch import Batch, BatchRow
from kvferry.engine.cpu.decoder import NativeDecoder
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.states import ForeignStateError

from ...engine_driver import Driver, engine_config, prompts
from .judged import ROUNDED, error_of, expected_of, judged, judged_by_ranks, native_engine, of_torch, tolerance_of
from .state_models import VARIANTS, write_states
from .test_build import SAMPLING, Recorded
from .test_cut_attention import gap_of_threads

pytestmark = pytest.mark.usefixtures("native")

NARROW = "nemotron h moe, narrower rows"
WHOLE = ("qwen3.5", "qwen3 next, some dense", "lfm2 moe", "granite4 moe", "nemotron h moe", "falcon h1", NARROW)
CUT_TOLERANCE = 0.01  # of the range of logits: sums are rounded in another order


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("models"), VARIANTS)


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_set_computes_what_torch_computes(checkpoints: Path, variant: str) -> None:
    """Within bfloat16's rounding, against float32 that is not rounded at all."""
    path = checkpoints / variant
    assert error_of(judged(native_engine(path, num_threads=2)), expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant",
    [
        *("qwen3.5", "qwen3.5, a longer convolution", "qwen3 next, dense, a state behind all", "nemotron h"),
        *("falcon h1", "falcon h1, normed before gates, biases", NARROW, "granite4", "granite4 moe"),
    ],
)
def test_two_ranks_compute_what_one_computes(checkpoints: Path, variant: str) -> None:
    """A step of many tokens and of few, of which the last layer's state is left though nobody wants what it yields."""
    path = checkpoints / variant
    fields: dict[str, object] = {"tensor_parallel_size": 2, "num_threads": 2, "block_size": 16}
    found = judged_by_ranks(engine_config(path, dtype="bfloat16", **fields))
    assert error_of(found, expected_of(path)) < tolerance_of(path)


@pytest.mark.parametrize("block_size", [8, 128, 512])
def test_block_size_does_not_matter(checkpoints: Path, block_size: int) -> None:
    path = checkpoints / "qwen3.5"
    assert error_of(judged(native_engine(path, block_size=block_size)), expected_of(path)) < tolerance_of(path)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", WHOLE)
def test_whole_numbers_are_multiplied_as_such(checkpoints: Path, variant: str, quantization: str) -> None:
    engine = native_engine(checkpoints / variant, quantization=quantization)
    attention = _decoder(engine)._model.layers[0].attention
    assert attention.o.weight.integers and attention.state.contents.rows.weight.integers
    path = checkpoints / variant
    assert error_of(judged(engine), expected_of(path, quantization)) < tolerance_of(path, ROUNDED)


def test_keys_in_8_bits_go_beside_states(checkpoints: Path) -> None:
    path = checkpoints / "qwen3.5"
    expected = of_torch(path, dtype="float32", kv_cache_dtype="int8")
    assert error_of(judged(native_engine(path, kv_cache_dtype="int8")), expected) < tolerance_of(path)


def _decoder(engine: Engine) -> NativeDecoder:
    assert isinstance(engine.runner, NativeRunner)
    return engine.runner.decoder


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("block_size", "num_blocks"), [(None, 400), (1024, 10)])
def test_attention_with_gates_that_is_cut_is_the_whole(
    checkpoints: Path, block_size: int | None, num_blocks: int
) -> None:
    """Blocks of more keys than a part, too."""
    gap = gap_of_threads(checkpoints / "qwen3.5", (3000,), num_blocks, block_size=block_size)
    assert gap <= CUT_TOLERANCE


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_step_in_long_blocks_has_the_bits_of_one_in_short_ones(checkpoints: Path, kv_cache_dtype: str) -> None:
    """One thread adds a token's attention up tile by tile, wherever blocks begin."""
    found = []
    for block_size in (128, 1024):
        run = Recorded(
            checkpoints / "qwen3.5", is_native=True, num_threads=1, block_size=block_size, kv_cache_dtype=kv_cache_dtype
        )
        seqs = run.prefill((1500, 257))
        run.driver.step([(seq, 1) for seq in seqs])
        found.append(run.logits[-1])
    assert torch.equal(*found)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ["qwen3.5", "lfm2", "granite4"])
def test_a_first_state_shows_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str) -> None:
    """To the bit: its inputs are rows of products, which keep their order, and tokens change it one after the other."""
    found = []
    for chunk, lengths, num_threads in ((1000, (), 1), (7, (90,), 1), (100, (1, 40, 3), 2), (1, (), 3)):
        engine = native_engine(checkpoints / variant, block_size=128, num_threads=num_threads)
        driver = Driver(engine)
        seq, *others = (driver.add(prompt, SAMPLING) for prompt in prompts([100, *lengths], 500))
        while seq.num_output_tokens == 0:
            rows = [(seq, min(chunk, seq.num_uncomputed_tokens))]
            driver.step(rows + [(other, min(20, other.num_uncomputed_tokens)) for other in others])
        states = engine.model_config.states
        assert states is not None
        [block] = seq.block_table
        pages = engine.kv_pages[1:, block]  # [pages, 2, heads, ...]: of each head a share, in both parts of each page
        shares = pages.transpose(1, 2).transpose(0, 1).flatten(1).view(torch.float32)
        state = shares[:, : states.share_size]
        assert len(state) == 2 and (state[:, 0] == 100).all() and state.isfinite().all()
        found.append(state.clone())
    assert all(torch.equal(one, found[0]) for one in found[1:])


@pytest.mark.parametrize("variant", ["qwen3 next, dense, a state behind all", "lfm2", "granite4", "falcon h1"])
def test_what_a_block_held_before_is_no_state_of_its_new_owner(checkpoints: Path, variant: str) -> None:
    found = []
    for left in (0.0, float("nan")):
        run = Recorded(checkpoints / variant, is_native=True, num_threads=2)
        run.engine.kv_pages.fill_(left)
        seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts([30, 301, 16], 500)]
        for counts in ((30, 200, 16), (1, 101, 1), (1, 1, 1)):
            run.driver.step(list(zip(seqs, counts, strict=True)))
        found.append(torch.cat(run.logits))
    assert found[0].isfinite().all() and torch.equal(*found)


@pytest.mark.parametrize("variant", ["qwen3.5", "lfm2", "granite4"])
def test_a_token_that_is_computed_again_is_told_from_the_next_one(checkpoints: Path, variant: str) -> None:
    engine = native_engine(checkpoints / variant, block_size=16)
    driver = Driver(engine)
    seq, other = driver.add(range(4, 24)), driver.add(range(4, 10))
    driver.step([(seq, 19), (other, 6)])
    driver.step([(seq, 1)])
    seq.num_computed_tokens -= 1
    pages = engine.kv_pages.clone()
    with pytest.raises(ForeignStateError, match=r"states of \[6.0, 20.0\] tokens in place of \[6, 19\]"):
        engine.step(Batch([BatchRow(other, 1), BatchRow(seq, 1)]))
    assert torch.equal(engine.kv_pages.view(torch.uint8), pages.view(torch.uint8)), "a step that is refused wrote"
    with engine.measuring():
        engine.step(Batch([BatchRow(seq, 1)]))


@pytest.mark.parametrize(
    "variant", ["qwen3.5", "qwen3 next, dense, a state behind all", "lfm2", "granite4", "falcon h1"]
)
def test_pages_are_told_in_their_order(checkpoints: Path, variant: str) -> None:
    engine = native_engine(checkpoints / variant, block_size=16)
    driver = Driver(engine)
    seq = driver.add(range(4, 44))
    for count in (40, 1):
        told: list[int] = []
        driver.step([(seq, count)], told.append)
        assert told == list(range(engine.spec.num_layers))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_step_of_which_nothing_is_wanted_leaves_its_states(checkpoints: Path, num_threads: int) -> None:
    """The last layer's too, though nobody asks for what it yields: a chunk, and then the rest."""
    path = checkpoints / "qwen3 next, dense, a state behind all"
    sampling = msgspec.structs.replace(SAMPLING, max_tokens=1, logprobs=0)
    found = []
    for chunks in ((300,), (290, 10), (30, 40, 230)):
        driver = Driver(native_engine(path, num_threads=num_threads))
        [prompt] = prompts([300], 500)
        seq = driver.add(prompt, sampling)
        for count in chunks:
            said = driver.step([(seq, count)])
        found.append(said[0][0].logprob)
    assert found[1:] == pytest.approx([found[0]] * 2, abs=0.2)
