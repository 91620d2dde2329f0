"""Adapters on a CUDA device: rows of many in a batch, in graphs and outside of them, beside merged models on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as Ids
from pathlib import Path

import pytest
import torch

from kvferry.common.errors import ConfigError
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine

from ..adapters import merged_model, write_adapter
from ..checkpoints import write_checkpoint
from ..engine_driver import Driver, engine_config, prompts
from .test_adapters import TARGETS, Held, put

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]

SURE_GAP = 0.35  # of log-probability; below it 16 bits may choose another token than float32
NUM_TOKENS = 8
RANKS = (8, 16, 13)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape: dict[str, int] = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 256,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
    }
    path = tmp_path_factory.mktemp("models") / "model"
    return write_checkpoint(path, "qwen3", tokenizer=False, dtype="bfloat16", **shape)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / str(i), model_dir, rank=rank, targets=TARGETS[i], seed=i, rslora=i == 1)
        for i, rank in enumerate(RANKS)
    ]


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapters: list[Path]) -> Engine:
    return _engine(model_dir, adapters)


def _engine(model_dir: Path, adapters: Ids[Path], **fields: object) -> Engine:
    defaults: dict[str, object] = {"device": "cuda", "max_num_seqs": 4, "max_model_len": 512}
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 16} if adapters else {}
    engine = Engine(engine_config(model_dir, **(defaults | lora | fields)), num_blocks=128)
    for slot, path in enumerate(adapters):
        put(engine, slot, path)
    return engine


def _answers(engine: Engine, slots: Ids[int | None], chunk: int = 10**9) -> list[list[SampledToken]]:
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts([5, 40, 17, 30])[: len(slots)]]
    for seq, slot in zip(seqs, slots, strict=True):
        seq.held_adapter = None if slot is None else Held(slot)
    return driver.sample(seqs, chunk=chunk)


def _ids(answers: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]


def test_mixed_batches_say_what_merged_models_say(model_dir: Path, adapters: list[Path], engine: Engine) -> None:
    folder = adapters[0].parent
    slots: list[int | None] = [2, 0, None, 1]
    compared = 0
    mixed, chunked = _answers(engine, slots), _answers(engine, slots, 16)
    for row, slot in enumerate(slots):
        adapter = None if slot is None else adapters[slot]
        merged = merged_model(model_dir, adapter, folder / f"merged-{slot}")
        on_cpu = _engine(merged, (), device="cpu", dtype="float32")
        expected = _answers(on_cpu, [None] * len(slots))[row]
        for ours, others, theirs in zip(mixed[row], chunked[row], expected, strict=True):
            if theirs.top[0][1] - theirs.top[1][1] < SURE_GAP:
                break
            assert ours.token_id == others.token_id == theirs.token_id, (row, slot)
            compared += 1
    assert compared > 2 * len(slots), "the checkpoint leaves too little to compare"
    plain = _ids(_answers(engine, [None] * len(slots)))
    assert sum(one != other for one, other in zip(_ids(mixed), plain, strict=True)) == 3  # they do something


def test_graphs_yield_what_kernels_do_that_are_launched_one_by_one(
    model_dir: Path, adapters: list[Path], engine: Engine
) -> None:
    launched = _engine(model_dir, adapters, enforce_eager=True)
    for slots in ([0, 1, 2, None], [None, 2, 2], [None, None]):
        assert _ids(_answers(engine, slots)) == _ids(_answers(launched, slots))
    runner = engine.runner
    assert isinstance(runner, CudaRunner) and runner.decode_pipeline is not None
    assert runner.decode_pipeline.num_forecasts > 0


def test_rows_without_an_adapter_are_the_models_own(model_dir: Path, engine: Engine) -> None:
    plain = _answers(_engine(model_dir, ()), [None] * 4)
    assert _answers(engine, [None] * 4) == plain
    beside = _answers(engine, [1, None, 2, None])
    assert [beside[1], beside[3]] == [plain[1], plain[3]]


def test_a_slot_keeps_nothing_of_the_adapter_before(model_dir: Path, adapters: list[Path], engine: Engine) -> None:
    other = _engine(model_dir, [adapters[1]])
    for path in (adapters[0], adapters[2]):  # a larger rank and all modules, then fewer of both
        put(other, 0, path)
        assert _ids(_answers(other, [0, 0])) == _ids(_answers(engine, [adapters.index(path)] * 2))


def test_a_sequence_whose_slot_changes_is_foretold_anew(engine: Engine) -> None:
    driver = Driver(engine)
    seq = driver.add(prompts([12])[0], GREEDY)
    seq.held_adapter = held = Held(0)
    driver.step([(seq, 12)])
    driver.step([(seq, 1)])
    runner = engine.runner
    assert isinstance(runner, CudaRunner) and runner.decode_pipeline is not None
    before = runner.decode_pipeline.num_forecasts
    held.slot = 1
    driver.step([(seq, 1)])
    assert runner.decode_pipeline.num_forecasts == before


def test_numbers_that_are_not_finite_are_refused(model_dir: Path, engine: Engine, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "wide", model_dir, rank=8, strength=1e38, alpha=0.01)
    with pytest.raises(ConfigError, match="not finite"):
        put(engine, 0, path)
