"""Layers that keep a state, on CUDA: what transformers' own classes compute, in graphs and outside of them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import EngineConfig
from kvferry.common.request import SampledToken, SamplingParams, Sequence
from kvferry.engine.calibrate import calibrate
from kvferry.engine.cuda.experts import GroupedExperts
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.flashinfer import FlashInferAttention
from kvferry.engine.nn.states import ForeignStateError
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.emulation.stream import COUNTS

from ..adapters import merge, write_adapter
from ..checkpoints import write_checkpoint
from ..engine_driver import Driver, assert_told_of_pages, each_of, engine_config, prompts
from ..kvcache.test_host_slots import swapped_in_the_middle, undisturbed
from ..transformers_checkpoints import FALCON_H1, NEMOTRON_H, NEMOTRON_H_MOE, SMALL, STATES, write_model
from .test_adapters import put, sequence
from .test_states import EXPERTS, LFM2, MAMBA
from .transformers_reference import reference_logprobs

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]

# How far half of the log-probabilities are from the reference's in float32, as a part of their range. In 16 bits
# transformers' own are, with such weights, some by 0.3; what is exact is shown in float32 (`cuda/test_states.py`).
NEAR = 0.01
SURE, MOST = 0.05, 0.8  # where its best token leads by so much of the range, ours is the same in most cases
NUM_TOKENS = 17  # past the end of a block of 16
ATTENDED: dict[str, object] = {"head_dim": 64, "hidden_size": 128}  # what CUDA attends with
SHARED: dict[str, object] = {"shared_expert_intermediate_size": 48}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3.5": ("Qwen3_5Text", {}),
    "qwen3.5, another convolution and heads": (
        "Qwen3_5Text",
        {"linear_conv_kernel_dim": 6, "linear_num_key_heads": 4, "linear_value_head_dim": 32},
    ),
    "qwen3.5 moe": ("Qwen3_5MoeText", EXPERTS | SHARED),
    "qwen3 next": ("Qwen3Next", EXPERTS | SHARED | {"tie_word_embeddings": True}),
    "lfm2": ("Lfm2", LFM2),
    "granite 4": ("GraniteMoeHybrid", MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "nemotron h": ("NemotronH", NEMOTRON_H),
    "nemotron h, with experts": ("NemotronH", NEMOTRON_H_MOE),
    "nemotron h, with experts of narrower rows": ("NemotronH", NEMOTRON_H_MOE | {"moe_latent_size": 32}),
    "falcon h1": ("FalconH1", FALCON_H1),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
LENGTHS = [1, 15, 16, 90]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (kind, fields) in VARIANTS.items():
        config = getattr(transformers, f"{kind}Config")(**SMALL | STATES | ATTENDED | fields)
        write_model(root / name, config, dtype=torch.bfloat16)
    return root


@pytest.fixture(scope="module")
def engine(checkpoints: Path) -> Engine:
    return _engine(checkpoints / "qwen3.5", max_num_seqs=8)


variant = each_of(VARIANTS)


@pytest.fixture(scope="module")
def captured(checkpoints: Path, variant: str) -> Engine:
    """A variant's engine with its graphs, which take longer to capture than a test takes with them."""
    return _engine(checkpoints / variant)


@pytest.fixture(scope="module")
def answers(captured: Engine) -> list[list[SampledToken]]:
    return _generate(captured)


def _config(model_dir: Path, **fields: object) -> EngineConfig:
    defaults: dict[str, object] = {"device": "cuda", "max_num_seqs": 4, "max_model_len": 512, "block_size": 16}
    return engine_config(model_dir, **(defaults | fields))


def _engine(model_dir: Path, **fields: object) -> Engine:
    return Engine(_config(model_dir, **fields), num_blocks=100)


def _generate(engine: Engine, chunk: int = 10**9, lengths: list[int] = LENGTHS) -> list[list[SampledToken]]:
    """Answers to prompts that join one after the other, so that chunks and answers are in a step together."""
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts(lengths)]
    tokens: dict[int, list[SampledToken]] = {id(seq): [] for seq in seqs}
    joined = 1
    while running := [seq for seq in seqs[:joined] if seq.num_output_tokens < NUM_TOKENS]:
        rows = [(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in running]
        for seq, new in zip(running, driver.step(rows), strict=True):
            tokens[id(seq)] += new
        joined = min(joined + 1, len(seqs))
    return [tokens[id(seq)] for seq in seqs]


def _ids(answers: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]


def _judge(
    model_dir: Path, answers: list[tuple[list[int], list[SampledToken]]], near: float = NEAR, most: float = MOST
) -> None:
    """Compare prompts' answers with transformers in float32."""
    errors, right = list[float](), list[bool]()
    for prompt, answer in answers:
        ids = [token.token_id for token in answer]
        following = reference_logprobs(model_dir, (*prompt, *ids[:-1]))[len(prompt) - 1 :]
        for expected, token in zip(following, answer, strict=True):
            scale = float(expected.max() - expected.min())
            assert token.logprob is not None
            errors.append((token.logprob - float(expected[token.token_id])) / scale)
            best = expected.topk(2)
            if best.values[0] - best.values[1] > SURE * scale:
                right.append(token.token_id == int(best.indices[0]))
    assert torch.tensor(errors).abs().median() < near
    assert len(right) > len(errors) / 10 and sum(right) > most * len(right)


def test_tokens_and_log_probabilities_are_those_of_transformers(
    checkpoints: Path, variant: str, captured: Engine, answers: list[list[SampledToken]]
) -> None:
    launched = _engine(checkpoints / variant, block_size=256, enforce_eager=True)
    for engine, found in ((captured, answers), (launched, _generate(launched, 75))):
        assert isinstance(engine.runner, CudaRunner) and (engine.runner.pieces is None) == (engine is launched)
        _judge(checkpoints / variant, list(zip(prompts(LENGTHS), found, strict=True)))


@pytest.mark.parametrize(
    "variant", ["qwen3.5", "qwen3 next", "lfm2", "granite 4", "nemotron h, with experts"], indirect=True
)
def test_graphs_yield_the_tokens_of_kernels_launched_one_by_one(
    checkpoints: Path, variant: str, answers: list[list[SampledToken]]
) -> None:
    launched = _engine(checkpoints / variant, enforce_eager=True)
    assert answers == _generate(launched)


@pytest.mark.parametrize("variant", ["nemotron h, with experts"], indirect=True)
def test_layers_of_one_block_are_captured_and_experts_without_a_gate_computed_together(captured: Engine) -> None:
    assert isinstance(captured.runner, CudaRunner) and captured.runner._decoder.can_be_captured
    assert {type(block.grouped) for block in captured._experts.blocks.values()} == {GroupedExperts}
    assert list(captured._experts.blocks) == [1, 3]


def test_steps_run_as_they_were_prepared_while_answers_begin_new_blocks(engine: Engine) -> None:
    assert isinstance(engine.runner, CudaRunner)
    pipeline = engine.runner.decode_pipeline
    assert pipeline is not None
    ahead, (num_steps, num_forecasts) = _generate(engine), (pipeline.num_steps, pipeline.num_forecasts)
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts(LENGTHS)]
    for seq in seqs:
        driver.step([(seq, seq.num_tokens)])
    while seqs[0].num_output_tokens < NUM_TOKENS:
        pipeline._forecast = None
        driver.step([(seq, 1) for seq in seqs])
    assert [seq.output_token_ids for seq in seqs] == _ids(ahead)
    assert num_forecasts >= num_steps // 2 and pipeline.num_forecasts <= num_forecasts + len(seqs)


def test_rows_are_as_many_as_there_are(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of a few rows are taken at once: all of them are, in graphs and in steps with a chunk."""
    monkeypatch.setattr("kvferry.engine.nn.states._ROWS", 3)
    engine = _engine(checkpoints / "qwen3.5", max_num_seqs=8)
    [alone] = _generate(engine, lengths=[9])
    driver, sampling = Driver(engine), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    seqs = [driver.add(prompts([9])[0], sampling) for _ in range(8)]
    late = driver.add(prompts([40])[0], sampling)
    driver.step([(seq, 9) for seq in seqs])
    driver.step([(late, 24), *((seq, 1) for seq in seqs)])
    assert driver.generate(seqs) == [_ids([alone])[0][:8]] * 8


def test_padding_rows_write_to_the_spare_block_alone(engine: Engine) -> None:
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts([5, 31, 9, 32, 12])]  # padded to 8 rows
    driver.step([(seq, seq.num_tokens) for seq in seqs])
    pages = engine.kv_pages.view(torch.int16)  # a part of a state may be no number of 16 bits
    before = pages.clone()
    driver.step([(seq, 1) for seq in seqs])
    changed = (pages != before).any(dim=(0, 2, 3, 4, 5)).cpu()
    assert set(changed.nonzero().flatten().tolist()) - {engine.num_blocks} == {seq.block_table[-1] for seq in seqs}


def test_what_a_block_held_before_is_no_state_of_its_new_owner(checkpoints: Path, engine: Engine) -> None:
    other = _engine(checkpoints / "qwen3.5")
    other.kv_pages[1:].fill_(torch.nan)
    assert _generate(other, chunk=7) == _generate(engine, chunk=7)


def test_layers_are_told_of_and_then_states(engine: Engine) -> None:
    assert_told_of_pages(engine)


# --- states go with their blocks ----------------------------------------------------------------------------------


def test_a_forked_answer_goes_on_from_a_copy_of_the_state(engine: Engine) -> None:
    driver = Driver(engine)
    first = driver.add(prompts([20])[0])
    driver.step([(first, 20)])
    forked = driver.step_fork(first)  # in a graph
    driver.step([(first, 1)])
    assert forked == first.token_ids[21]


def test_a_prefix_is_gone_on_from_where_its_last_block_ends(engine: Engine) -> None:
    [prompt] = prompts([50])
    driver = Driver(engine)
    first, second = (driver.add(prompt, GREEDY) for _ in range(2))
    driver.step([(first, 50)])
    second.block_table, second.num_computed_tokens = first.block_table[:3], 48
    driver.step([(second, 2), (first, 1)])
    assert driver.generate([first, second])[0] == second.output_token_ids


def test_an_answer_goes_on_from_swapped_blocks(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "qwen3.5", swap_space=64 << 20)
    assert swapped_in_the_middle(engine) == undisturbed(engine)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_another_engine_goes_on_from_blocks_that_it_was_given(checkpoints: Path, engine: Engine, device: str) -> None:
    """As after a handoff: the pages' bytes of the prompt's blocks, in other blocks."""
    other = _engine(checkpoints / "qwen3.5", device=device)
    assert other.spec == engine.spec
    first, second = Driver(engine), Driver(other)
    seq = first.add(prompts([40])[0], msgspec.structs.replace(GREEDY, max_tokens=NUM_TOKENS + 1))
    first.step([(seq, 40)])
    taken: Sequence = second.add(seq.token_ids[:40], GREEDY)
    taken.token_ids.append(seq.token_ids[40])
    taken.num_computed_tokens, taken.block_table = 40, [70, 3, 41]
    other.kv_pages[:, taken.block_table] = engine.kv_pages[:, seq.block_table].to(other.kv_pages.device)
    found = [token for _ in range(NUM_TOKENS) for token in second.step([(taken, 1)])[0]]
    _judge(checkpoints / "qwen3.5", [([*seq.token_ids[:41]], found)])
    assert device == "cpu" or [token.token_id for token in found] == first.generate([seq])[0][1:]


# --- foreign states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_token_that_is_computed_again_ends_the_step(engine: Engine, count: int) -> None:
    """In a graph, and launched one by one."""
    driver = Driver(engine)
    seq, beside = (driver.add(prompt, GREEDY) for prompt in prompts([20, 9]))
    driver.step([(seq, 20), (beside, 9)])
    seq.num_computed_tokens -= 1
    batch = Batch([BatchRow(beside, 1), BatchRow(seq, count)])
    with pytest.raises(ForeignStateError, match="3 states are not those behind the tokens"):  # of as many layers
        engine.step(batch)
    # Nobody goes on from what was left, here or elsewhere; the row beside it is as it was.
    seq.num_computed_tokens += count
    seq.token_ids += [5] * count
    driver.grow(seq, seq.num_tokens)
    for row in (BatchRow(seq, 1), BatchRow(seq, 2)):
        with pytest.raises(ForeignStateError):
            engine.step(Batch([row]))
    beside.num_computed_tokens += 1
    beside.token_ids.append(7)
    assert engine.step(Batch([BatchRow(beside, 1)])).rows[0].is_finite


def test_states_that_no_step_left_are_measured_with(checkpoints: Path) -> None:
    engine = _engine(checkpoints / "qwen3.5")
    assert any(sample.decode_rows for sample in calibrate(engine, BlockPool(100, 16), 5.0))
    seq = Driver(engine).add(range(4, 24))
    seq.block_table, seq.num_computed_tokens = [0, 1], 19
    with pytest.raises(ForeignStateError):
        engine.step(Batch([BatchRow(seq, 1)]))


# --- nothing is waited for ----------------------------------------------------------------------------------------


def _waits(engine: Engine, counts: list[int]) -> list[tuple[int, int]]:
    """Count the waits and the uploads of unpinned memory of an answer's steps, on the emulated device."""
    driver, found = Driver(engine), list[tuple[int, int]]()
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts([60, 9])]
    driver.step([(seqs[1], 9)])
    for count in counts:
        before = COUNTS.copy()
        driver.step([(seqs[0], count), (seqs[1], 1)])
        found.append((COUNTS["waits"] - before["waits"], COUNTS["pageable uploads"] - before["pageable uploads"]))
    return found


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_name() != "emulated", reason="a real device counts no waits"
)
@pytest.mark.parametrize("eager", [False, True])
def test_a_step_waits_as_often_as_one_without_states(checkpoints: Path, tmp_path: Path, eager: bool) -> None:
    plain = write_checkpoint(
        tmp_path, "qwen3", tokenizer=False, head_dim=64, hidden_size=128, num_qo_heads=4, num_kv_heads=2
    )
    counts = [40, 20, 1, 1, 1]  # chunks of several blocks, then decode
    with_states, without = (
        _waits(_engine(model_dir, dtype="bfloat16", enforce_eager=eager), counts)
        for model_dir in (checkpoints / "qwen3.5", plain)
    )
    assert with_states == without


# --- beside other parts -------------------------------------------------------------------------------------------


def test_pages_in_8_bits_hold_states_as_they_are(checkpoints: Path, engine: Engine) -> None:
    narrow = _engine(checkpoints / "qwen3.5", kv_cache_dtype="fp8")
    assert narrow.kv_pages.dtype == torch.float8_e4m3fn and narrow.spec.num_layers > engine.spec.num_layers
    launched = _engine(checkpoints / "qwen3.5", kv_cache_dtype="fp8", enforce_eager=True)
    found = _generate(narrow)
    assert found == _generate(launched)
    for ours, theirs in zip(found, _generate(engine), strict=True):
        assert ours[0].logprob == pytest.approx(theirs[0].logprob, abs=0.5)
    driver = Driver(narrow)
    first = driver.add(prompts([20])[0])
    driver.step([(first, 20)])
    forked = driver.step_fork(first)
    driver.step([(first, 1)])
    assert forked == first.token_ids[21]


def test_a_layers_scales_are_those_of_its_page(checkpoints: Path, tmp_path: Path) -> None:
    """The one layer that keeps keys and values is the fourth, its page the first."""
    shutil.copytree(checkpoints / "qwen3.5", tmp_path / "scaled")
    tensors = load_file(tmp_path / "scaled" / "model.safetensors")
    scales = {f"model.layers.3.self_attn.{part}_scale": torch.tensor(0.5 + i) for i, part in enumerate("kv")}
    save_file(tensors | scales, tmp_path / "scaled" / "model.safetensors", metadata={"format": "pt"})
    runner = _engine(tmp_path / "scaled", kv_cache_dtype="fp8", enforce_eager=True).runner
    assert isinstance(runner, CudaRunner) and isinstance(runner._attention, FlashInferAttention)
    assert runner._attention._scales == [(0.5, 1.5)]


def test_adapters_go_beside_layers_with_states(checkpoints: Path, tmp_path: Path) -> None:
    model_dir = checkpoints / "qwen3.5"
    targets = ("in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj", "o_proj", "up_proj")
    adapter = write_adapter(tmp_path / "adapter", model_dir, rank=8, targets=targets, seed=3, alpha=32)
    merged = merge(model_dir, adapter, tmp_path / "merged")
    engine = _engine(model_dir, enable_lora=True, max_loras=2, max_lora_rank=8)
    put(engine, 1, adapter)
    driver, asked = Driver(engine), prompts([40, 17])
    adapted, plain = sequence(driver, asked[0], 1), driver.add(asked[1], GREEDY)
    adapted.sampling = GREEDY
    found: dict[int, list[SampledToken]] = {id(adapted): [], id(plain): []}
    driver.step([(adapted, 16), (plain, 9)])
    while plain.num_output_tokens < NUM_TOKENS:
        rows = [(seq, seq.num_uncomputed_tokens) for seq in (adapted, plain)]
        for (seq, _), tokens in zip(rows, driver.step(rows), strict=True):
            found[id(seq)] += tokens
    _judge(merged, [(asked[0], found[id(adapted)])])
    _judge(model_dir, [(asked[1], found[id(plain)])])


@pytest.mark.parametrize("quantization", ["fp8", "int8", "int4"])
def test_weights_of_fewer_bits_answer_nearly_as_plain_ones(checkpoints: Path, quantization: str) -> None:
    """In 4 bits a model so small says something else: the same in graphs as outside of them is all that is asked."""
    model_dir = checkpoints / "qwen3.5"
    captured, launched = (_engine(model_dir, quantization=quantization, enforce_eager=eager) for eager in (False, True))
    found = _generate(captured)
    assert found == _generate(launched)
    if quantization != "int4":
        _judge(model_dir, list(zip(prompts(LENGTHS), found, strict=True)), 0.045, 0.5)
