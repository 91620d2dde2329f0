"""Adapters of experts on a CUDA device: rows of many in a batch, in graphs and outside, beside merged models."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as Ids
from pathlib import Path
from statistics import median

import pytest
import torch
import transformers

from kvferry.common.errors import ConfigError
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cuda.expert_adapters import PartFactors
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.models.config import ModelConfig
from kvferry.sizing.memory import adapter_bytes

from ..adapters import merged_model, write_adapter
from ..engine_driver import Driver, engine_config, prompts
from ..transformers_checkpoints import SMALL, write_model
from .cuda.lockstep import two_ranks
from .test_adapters import Held, put
from .transformers_reference import reference_logprobs

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]

NEAR = 0.02  # how far half of the log-probabilities are from the reference's in float32, as a part of their range
NUM_TOKENS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
PARTS = ("gate_proj", "up_proj", "down_proj")
SHAPE = SMALL | {"head_dim": 64, "hidden_size": 128, "num_experts": 8, "num_experts_per_tok": 3}
LORA: dict[str, object] = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "lora_experts": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=64, norm_topk_prob=True)
    return write_model(tmp_path_factory.mktemp("models") / "model", config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All experts, some of them by another scale, one part of them with attention, and attention alone."""
    folder = tmp_path_factory.mktemp("adapters")
    shapes: list[tuple[int, Ids[str], str, bool]] = [
        (16, PARTS, r"\.experts\.", False),
        (4, PARTS, r"\.experts\.[0-2]\.", True),
        (13, ("q_proj", "down_proj"), "", False),
        (8, ("q_proj", "v_proj"), "", False),
    ]
    return [
        write_adapter(folder / str(i), model_dir, rank=rank, targets=targets, only=only, rslora=rs, seed=i)
        for i, (rank, targets, only, rs) in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def merged(model_dir: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int | None, Path]:
    """What each adapter makes of the model, in float32."""
    folder = tmp_path_factory.mktemp("merged")
    whole: dict[int | None, Path] = {
        slot: merged_model(model_dir, path, folder / str(slot)) for slot, path in enumerate(adapters)
    }
    return {**whole, None: merged_model(model_dir, None, folder / "plain")}


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapters: list[Path]) -> Engine:
    return _engine(model_dir, adapters)


def _config(model_dir: Path, **fields: object) -> dict[str, object]:
    return {"device": "cuda", "max_num_seqs": 8, "max_model_len": 512, "model_dir": model_dir} | LORA | fields


def _engine(model_dir: Path, adapters: Ids[Path], **fields: object) -> Engine:
    engine = Engine(engine_config(**_config(model_dir, **fields)), num_blocks=128)  # type: ignore[arg-type]
    for slot, path in enumerate(adapters):
        put(engine, slot, path)
    return engine


def _answers(engine: Engine, slots: Ids[int | None], chunk: int = 10**9) -> list[list[SampledToken]]:
    driver = Driver(engine)
    seqs = [driver.add(prompt, GREEDY) for prompt in prompts([5, 40, 17, 30, 64][: len(slots)])]
    for seq, slot in zip(seqs, slots, strict=True):
        seq.held_adapter = None if slot is None else Held(slot)
    return driver.sample(seqs, chunk=chunk)


def _ids(answers: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in answer] for answer in answers]


def _errors(model_dir: Path, prompt: Ids[int], answer: Ids[SampledToken]) -> list[float]:
    """Return how far log-probabilities are from a model's of transformers, as parts of their range."""
    ids = [token.token_id for token in answer]
    following = reference_logprobs(model_dir, (*prompt, *ids[:-1]))[len(prompt) - 1 :]
    return [
        abs(float(expected[token.token_id]) - token.logprob) / float(expected.max() - expected.min())  # type: ignore[operator]
        for expected, token in zip(following, answer, strict=True)
    ]


def _assert_adapted(merged: dict[int | None, Path], slots: Ids[int | None], answers: list[list[SampledToken]]) -> None:
    """Assert that answers are those of merged models, and not those of the model without adapters."""
    for slot, prompt, answer in zip(slots, prompts([5, 40, 17, 30, 64]), answers, strict=False):
        own, plain = median(_errors(merged[slot], prompt, answer)), median(_errors(merged[None], prompt, answer))
        assert own < NEAR, slot
        assert slot is None or own < plain / 3, "it does nothing"


@pytest.mark.parametrize("chunk", [10**9, 16])
def test_mixed_batches_say_what_merged_models_say(engine: Engine, merged: dict[int | None, Path], chunk: int) -> None:
    slots: list[int | None] = [2, 0, None, 1, 3]
    _assert_adapted(merged, slots, _answers(engine, slots, chunk))


def test_graphs_yield_what_kernels_do_that_are_launched_one_by_one(
    model_dir: Path, adapters: list[Path], engine: Engine
) -> None:
    launched = _engine(model_dir, adapters, enforce_eager=True)
    for slots in ([0, 1, 2, None], [None, 3, 0], [None, None]):
        assert _ids(_answers(engine, slots)) == _ids(_answers(launched, slots))
    runner = engine.runner
    assert isinstance(runner, CudaRunner) and runner.pieces is not None and runner.decode_pipeline is not None
    assert runner.decode_pipeline.num_forecasts > 0


def test_rows_without_adapters_of_experts_are_what_they_are_without_room_for_them(
    model_dir: Path, adapters: list[Path], engine: Engine
) -> None:
    """Also rows of an adapter of attention alone, and rows beside those with adapters of experts."""
    other = _engine(model_dir, (), lora_experts=False)
    put(other, 3, adapters[3])
    wanted = _answers(other, [None, 3, None, None])
    assert _answers(engine, [None, 3, None, None]) == wanted
    assert _answers(engine, [None, 3, None, 0])[:3] == wanted[:3]


def test_a_slot_keeps_nothing_of_the_adapter_before(model_dir: Path, adapters: list[Path], engine: Engine) -> None:
    other = _engine(model_dir, [])
    for path in (adapters[0], adapters[1], adapters[2], adapters[3], adapters[1]):
        put(other, 0, path)
        assert _ids(_answers(other, [0, 0, None])) == _ids(_answers(engine, [adapters.index(path)] * 2 + [None]))


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_experts_in_few_bits_are_adapted(
    model_dir: Path, adapters: list[Path], merged: dict[int | None, Path], quantization: str
) -> None:
    [answer] = _answers(_engine(model_dir, adapters, quantization=quantization), [0])
    own, plain = (median(_errors(merged[slot], prompts([5])[0], answer)) for slot in (0, None))
    assert own < plain / 2


@pytest.mark.parametrize("split", [{}, {"enable_expert_parallel": True}])
def test_two_ranks_share_them(
    monkeypatch: pytest.MonkeyPatch,
    model_dir: Path,
    adapters: list[Path],
    merged: dict[int | None, Path],
    split: dict[str, object],
) -> None:
    slots: list[int | None] = [2, 0, None, 1, 3]
    config = engine_config(**_config(model_dir, tensor_parallel_size=2, **split))  # type: ignore[arg-type]
    make = Engine.__init__

    def make_and_load(self: Engine, *args: object, **fields: object) -> None:
        make(self, *args, **fields)  # type: ignore[arg-type]
        for slot, path in enumerate(adapters):
            put(self, slot, path)

    monkeypatch.setattr(Engine, "__init__", make_and_load)
    with two_ranks(monkeypatch, config, 128) as engine:
        _assert_adapted(merged, slots, _answers(engine, slots))


@pytest.mark.parametrize("split", [{}, {"tensor_parallel_size": 2}])
def test_what_is_set_aside_is_what_is_counted(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, split: dict[str, object]
) -> None:
    fields = {"max_loras": 3, "max_lora_rank": 13, "enforce_eager": True} | split
    config = engine_config(**_config(model_dir, **fields))  # type: ignore[arg-type]
    model = ModelConfig.from_dir(model_dir)
    taken = list[int]()
    make = PartFactors.__init__

    def make_and_count(self: PartFactors, *args: object) -> None:
        make(self, *args)  # type: ignore[arg-type]
        taken.append(self._downs.nbytes + self._ups.nbytes)

    monkeypatch.setattr(PartFactors, "__init__", make_and_count)
    if split:
        with two_ranks(monkeypatch, config, 128):
            pass
    else:
        Engine(config, num_blocks=128)
    without = config.model_copy(update={"lora_experts": False})
    num_ranks = config.tensor_parallel_size
    assert sum(taken) == num_ranks * (adapter_bytes(config, model) - adapter_bytes(without, model)) > 0


def test_they_are_refused_where_nothing_is_set_aside(model_dir: Path, adapters: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj; adapters of experts need lora_experts on a GPU"):
        _engine(model_dir, adapters[:1], lora_experts=False, enforce_eager=True)


def test_numbers_that_are_not_finite_are_refused(model_dir: Path, engine: Engine, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "wide", model_dir, rank=8, targets=PARTS, strength=1e38, alpha=0.01)
    with pytest.raises(ConfigError, match="not finite"):
        put(engine, 0, path)


def test_room_for_them_needs_experts_that_are_computed_together(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.engine.cuda.stacks.obstacle", lambda *_: "a reason")
    with pytest.raises(ConfigError, match="lora_experts: this GPU computes the model's experts one by one"):
        _engine(model_dir, [])
