"""Drafts on a CUDA device: what is right of them is what comes one by one, in graphs and outside of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.common.batch import UNDRAFTED, Batch, BatchRow
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.decode.speculation import StepCosts
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine

from ..checkpoint_shapes import GEMMA_2, GPT_OSS, QWEN3_MOE, write_by_shapes
from ..checkpoints import write_checkpoint
from ..decode.engine_worker import EngineWorker
from ..deepseek import write_for_cuda
from ..engine_driver import Driver, engine_config, prompts
from .cuda.lockstep import two_ranks

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
VARIANTS = ("heads", "windows", "latents", "experts", "sinks", "capped scores", "8 bits")
SHAPES = {"experts": QWEN3_MOE, "sinks": GPT_OSS, "capped scores": GEMMA_2}
LENGTHS = [5, 16, 31, 90]
SURE = 0.25  # a lead of log-probability that rounding does not turn around


def _sampling() -> list[SamplingParams]:
    fields: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True, "logprobs": 2}
    return [
        SamplingParams(temperature=0.0, **fields),
        SamplingParams(temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3, **fields),
        SamplingParams(temperature=0.0, repetition_penalty=1.2, min_tokens=9, **fields),
        SamplingParams(temperature=0.0, logit_bias={9: 1.0}, **fields),
    ]


def _write(path: Path, variant: str) -> dict[str, object]:
    """Write a checkpoint; return the settings that are its variant's."""
    if variant == "latents":
        write_for_cuda(path)
    elif variant in SHAPES:
        write_by_shapes(path, SHAPES[variant])
    else:
        family, window = ("mistral", {"sliding_window": 20}) if variant == "windows" else ("llama", {})
        fields: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "dtype": "bfloat16"}
        write_checkpoint(path, family, num_qo_heads=8, num_kv_heads=2, **fields | window)  # type: ignore[arg-type]
    return {"kv_cache_dtype": "fp8"} if variant == "8 bits" else {}


def _one_by_one(engine: Engine) -> list[list[SampledToken]]:
    driver = Driver(engine)
    seqs = [driver.add(prompt, params) for prompt, params in zip(prompts(LENGTHS), _sampling(), strict=True)]
    steps = [driver.step([(seq, seq.num_tokens) for seq in seqs])]
    steps += [driver.step([(seq, 1) for seq in seqs]) for _ in range(14)]
    return [[tokens[index][0] for tokens in steps] for index in range(len(seqs))]


def _drafted(engine: Engine, answers: list[list[SampledToken]]) -> tuple[list[list[SampledToken]], int, int]:
    """Answer with drafts, some of them wrong. Returns the answers, and how many drafted tokens were fed and right."""
    driver = Driver(engine)
    seqs = [driver.add(prompt, params) for prompt, params in zip(prompts(LENGTHS), _sampling(), strict=True)]
    found = [[run[0]] for run in driver.step([(seq, seq.num_tokens) for seq in seqs])]
    num_fed = num_right = 0
    for step in range(4):
        drafts = []
        for index, (seq, answer) in enumerate(zip(seqs, answers, strict=True)):
            known = [token.token_id for token in answer[seq.num_output_tokens :]][: (index + step) % 4]
            drafts.append([*known, (answer[0].token_id + 1) % 512] if step == index else known)
        for index, run in enumerate(driver.verify(list(zip(seqs, drafts, strict=True)))):
            found[index] += run
            num_right += len(run) - 1
            num_fed += len(drafts[index])
    return found, num_fed, num_right


def _compare(found: list[list[SampledToken]], answers: list[list[SampledToken]]) -> int:
    """Compare as far as no rounding decides; return how many tokens that is."""
    compared = 0
    for ours, theirs in zip(found, answers, strict=True):
        for token, expected in zip(ours, theirs, strict=False):
            assert token.logprob == pytest.approx(expected.logprob, abs=0.1)
            compared += 1
            if token.token_id != expected.token_id:
                assert expected.top[0][1] - expected.top[1][1] < SURE
                break
    return compared


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_right_of_a_draft_is_what_comes_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    fields = _write(tmp_path / "model", variant) | {"device": "cuda", "max_num_seqs": 4, "max_model_len": 512}
    engine = Engine(engine_config(tmp_path / "model", **fields, speculative_config=NGRAM), num_blocks=64)
    assert isinstance(engine.runner, CudaRunner) and engine.runner.decode_pipeline is not None
    assert not engine.spec.results
    pipeline = engine.runner.decode_pipeline
    assert pipeline._device.sizes[-1] == 4 * 5
    answers, num_steps = _one_by_one(engine), pipeline.num_steps
    found, num_fed, num_right = _drafted(engine, answers)
    assert pipeline.num_steps == num_steps + 4 and _compare(found, answers) > 24
    assert num_fed > num_right > num_fed // 2
    monkeypatch.setattr(pipeline, "_max_read_again", 0)  # as attention of chunks has it
    as_chunks, *_ = _drafted(engine, answers)
    assert pipeline.num_steps == num_steps + 4 and _compare(as_chunks, answers) > 24


def test_answers_that_a_scheduler_drafts_are_the_models_best_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts that are often right, choices, a pool that is too small, and prompts computed beside answers."""
    monkeypatch.setattr(StepCosts, "observe", _cheap)
    fields = _write(tmp_path / "model", "heads") | {"device": "cuda", "max_num_seqs": 9, "max_model_len": 512}
    config = engine_config(tmp_path / "model", **fields, block_size=8, speculative_config=NGRAM)
    worker = EngineWorker(config, num_blocks=40, max_num_seqs=9)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    texts = prompts([60, 39, 21, 72, 48, 27])
    before = worker.run(texts, [params])
    speculation = worker.role.scheduler.speculation
    assert speculation is not None
    speculation.make_proposer = lambda seq: _Remembered(before[seq.request_id[1:], seq.choice], seq.num_prompt_tokens)
    answers = worker.run(texts, [params], "s")
    counters = worker.role.scheduler.draft_counters
    assert worker.role.scheduler.num_preemptions > 0 and counters.draft_tokens > counters.accepted_tokens > 100
    judge = engine_config(tmp_path / "model", **fields, block_size=8, enforce_eager=True)
    driver = Driver(Engine(judge, num_blocks=100))
    assert len(answers) == 8 and all(len(answer) == 40 for answer in answers.values())
    for (name, _), answer in answers.items():
        whole = [*texts[int(name)], *(token.token_id for token in answer)]
        _judge(driver, whole, len(texts[int(name)]))


class _Remembered:
    """Proposes what was answered before, with a fault in every seventh place. Implements `Proposer`."""

    def __init__(self, answer: list[SampledToken], num_prompt: int) -> None:
        self._answer, self._num_prompt = [token.token_id for token in answer], num_prompt

    def propose(self, tokens: Tokens[int], num_tokens: int) -> tuple[int, ...]:
        place = len(tokens) - self._num_prompt
        known = enumerate(self._answer[place : place + num_tokens], place)
        return tuple([token + 1 if index % 7 == 5 else token for index, token in known])


def _cheap(self: StepCosts, batch: object, output: object) -> None:
    """Learn that drafts cost little, whatever this machine says."""
    self.plain_s = dict.fromkeys(range(1, 100), 1.0)
    self.share = 0.01


def _judge(driver: Driver, whole: list[int], num_prompt: int) -> None:
    """See that each token of an answer is the model's best one, or next to it."""
    seq = driver.add(whole, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1))
    driver.grow(seq, len(whole))
    [row] = driver.engine.step(Batch([BatchRow(seq, len(whole))])).rows
    driver.release(seq)
    for token in row.prompt_logprobs[num_prompt - 1 :]:
        assert token.logprob is not None and token.top[0][1] - token.logprob < SURE


@pytest.mark.parametrize(("own", "cache"), [(True, "auto"), (False, "auto"), (False, "fp8")])
def test_a_draft_model_drafts_in_graphs_and_keeps_its_own_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool, cache: str
) -> None:
    """A target that drafts for itself is nearly always right, and writes the same keys and values twice."""
    monkeypatch.setattr(StepCosts, "observe", _cheap)
    fields = _write(tmp_path / "model", "heads") | {"device": "cuda", "max_num_seqs": 9, "max_model_len": 512}
    small = {"num_layers": 3, "num_qo_heads": 2, "num_kv_heads": 1, "hidden_size": 128, "head_dim": 64, "seed": 5}
    write_checkpoint(tmp_path / "small", dtype="bfloat16", **small)  # type: ignore[arg-type]
    drafting = {"method": "draft_model", "model": tmp_path / ("model" if own else "small"), "num_speculative_tokens": 4}
    fields |= {"block_size": 8, "kv_cache_dtype": cache}
    worker = EngineWorker(engine_config(tmp_path / "model", **fields, speculative_config=drafting), 48, max_num_seqs=9)
    texts = prompts([60, 39, 21, 72, 48, 27])
    for name in ("r", "s"):  # the second time with cached beginnings
        answers = worker.run(texts, [SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)], name)
        assert len(answers) == 8 and all(len(answer) == 30 for answer in answers.values())
    scheduler = worker.role.scheduler
    counters = scheduler.draft_counters
    assert scheduler.num_preemptions > 0 and counters.draft_tokens > 100
    if own:
        assert counters.accepted_tokens > 0.8 * counters.draft_tokens
        pages = worker.engine.kv_pages
        cached = [block for block in range(worker.pool.num_blocks) if worker.pool.is_published(block)]
        for block in cached:
            torch.testing.assert_close(pages[2:, block], pages[:2, block], atol=0.05, rtol=0.05)
        assert len(cached) > 10
    judge = Driver(Engine(engine_config(tmp_path / "model", **fields, enforce_eager=True), num_blocks=100))
    for (name, _), answer in answers.items():
        whole = [*texts[int(name)], *(token.token_id for token in answer)]
        _judge(judge, whole, len(texts[int(name)]))


def test_two_ranks_check_drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = _write(tmp_path / "model", "heads") | {"device": "cuda", "max_num_seqs": 4, "max_model_len": 512}
    config = engine_config(tmp_path / "model", **fields, speculative_config=NGRAM, tensor_parallel_size=2)
    with two_ranks(monkeypatch, config, 64) as engine:
        answers = _one_by_one(engine)
        found, num_fed, num_right = _drafted(engine, answers)
    assert _compare(found, answers) > 20 and num_fed > num_right > num_fed // 2


@pytest.mark.parametrize("own", [True, False])
def test_two_ranks_share_a_draft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    fields = _write(tmp_path / "model", "heads") | {"device": "cuda", "max_num_seqs": 4, "max_model_len": 512}
    small = {"num_layers": 3, "num_qo_heads": 2, "num_kv_heads": 1, "hidden_size": 128, "head_dim": 64, "seed": 5}
    write_checkpoint(tmp_path / "small", dtype="bfloat16", **small)  # type: ignore[arg-type]
    drafting = {"method": "draft_model", "model": tmp_path / ("model" if own else "small"), "num_speculative_tokens": 4}
    config = engine_config(tmp_path / "model", **fields, speculative_config=drafting, tensor_parallel_size=2)
    pages: list[torch.Tensor] = []

    def see(engine: Engine) -> None:
        pages.append(engine.kv_pages)

    with two_ranks(monkeypatch, config, 64, see) as engine:
        answers = _one_by_one(engine)
        driver = Driver(engine)
        seqs = [driver.add(prompt, params) for prompt, params in zip(prompts(LENGTHS), _sampling(), strict=True)]
        found = [[run[0]] for run in driver.step([(seq, seq.num_tokens) for seq in seqs])]
        num_right = 0
        for length in (3, 1, 4, 2):
            runs = driver.verify([(seq, [UNDRAFTED] * length) for seq in seqs])
            for tokens, run in zip(found, runs, strict=True):
                tokens += run
                num_right += len(run) - 1
        pages.append(engine.kv_pages)
        used = [block for seq in seqs for block in seq.block_table[:-1]]
    assert _compare(found, answers) >= 20
    if own:
        assert num_right > 20
        for of_rank in pages:
            torch.testing.assert_close(of_rank[2:, used], of_rank[:2, used], atol=0.05, rtol=0.05)
