"""Deterministic mode: a request's tokens and log-probabilities, to the bit, however and beside whatever it is computed.

Every comparison is one of `SampledToken`s with `==`: token, its log-probability and the best ones. Prompts are longer
than a tile of keys (256), so that the order of sums is at stake.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import EngineConfig
from kvferry.common.errors import ConfigError
from kvferry.common.request import SampledToken, SamplingParams, Sequence
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.cpu.tiled import TiledDecoder, TiledRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.layers import Linear
from kvferry.engine.ranks.group import RankGroup
from kvferry.engine.sampling.sampling import SampleRow, sample_each

from ...checkpoints import Family, write_checkpoint
from ...engine_driver import Driver, engine_config, prompts

NUM_BLOCKS = 500
MODELS: dict[str, tuple[Family, dict[str, object]]] = {
    "llama": ("llama", {"vocab_size": 515}),
    "wide heads": ("llama", {"tie_embeddings": True, "head_dim": 64, "num_qo_heads": 6}),
    "odd sizes": ("llama", {"biases": True, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 501}),
    "odd heads": ("llama", {"num_kv_heads": 4, "head_dim": 48}),
    "many heads to one": ("llama", {"num_qo_heads": 7, "num_kv_heads": 1, "head_dim": 128}),
    "short window": ("mistral", {"sliding_window": 20}),
    "long window": ("mistral", {"sliding_window": 300}),
    "head norms": ("qwen3", {"head_dim": 32}),
    "norms on both sides": ("gemma3_text", {"head_dim": 32}),
}
NATIVE = [("native", name) for name in MODELS]
TORCH = [("float32", "wide heads"), ("float32", "odd sizes"), ("float32", "long window"), ("bfloat16", "wide heads")]
KINDS = [("native", "wide heads"), ("float32", "wide heads")]


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, (family, fields) in MODELS.items():
        shape = {"tokenizer": False, "dtype": "bfloat16"} | fields
        write_checkpoint(root / name, family, **shape)  # type: ignore[arg-type]
    return root


EngineMaker = Callable[..., Engine]


@pytest.fixture
def make(model_dirs: Path) -> EngineMaker:
    """make("native", model) or make("float32", model): that path's deterministic engine."""

    def make(kind: str, model: str, **fields: object) -> Engine:
        is_native = kind == "native"
        dtype = "bfloat16" if is_native else kind
        config = engine_config(model_dirs / model, **({"dtype": dtype, "deterministic": True} | fields))
        engine = Engine(config, num_blocks=NUM_BLOCKS, native=is_native)
        if is_native and not isinstance(engine.runner, NativeRunner):
            pytest.skip("no native decoder on this machine")
        return engine

    return make


def sampled(seed: int, **fields: object) -> SamplingParams:
    params = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True, "seed": seed, "logprobs": 3}
    return SamplingParams(**(params | fields))  # type: ignore[arg-type]


def various(index: int) -> SamplingParams:
    """Requests that differ in all that sampling looks at."""
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0, "prompt_logprobs": 2},
        {"top_p": 0.8, "prompt_logprobs": 0},
        {"top_k": 5, "logprobs": 7},
        {"min_p": 0.05, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 0.4, "logit_bias": {7: 2.0}},
        {"logprobs": 0, "min_tokens": 3},
    ]
    return sampled(index, **kinds[index % len(kinds)])


@dataclass
class Answer:
    tokens: list[SampledToken] = field(default_factory=list)
    prompt: list[SampledToken] = field(default_factory=list)


class Stepper:
    """Computes requests on an engine in whatever steps are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.driver = Driver(engine)
        self.answers: dict[int, Answer] = {}

    def add(self, prompt: list[int], sampling: SamplingParams, outputs: tuple[int, ...] = ()) -> Sequence:
        seq = self.driver.add(prompt, sampling)
        seq.token_ids += outputs
        self.answers[id(seq)] = Answer()
        return seq

    def step(self, rows: list[tuple[Sequence, int]]) -> None:
        batch = Batch([BatchRow(seq, count) for seq, count in sorted(rows, key=lambda row: row[1] != 1)])
        for row in batch.rows:
            self.driver.grow(row.seq, row.end)
        for row, output in zip(batch.rows, self.engine.step(batch).rows, strict=True):
            answer = self.answers[id(row.seq)]
            row.seq.num_computed_tokens += row.num_scheduled_tokens
            answer.prompt += output.prompt_logprobs
            if output.runs:
                answer.tokens.append(output.runs[0][0])
                row.seq.token_ids.append(output.runs[0][0].token_id)

    def verify(self, seq: Sequence, draft: list[int]) -> None:
        """One step with a draft."""
        row = BatchRow(seq, 1 + len(draft), tuple(draft))
        self.driver.grow(seq, row.end)
        [output] = self.engine.step(Batch([row])).rows
        [run] = output.runs
        self.answers[id(seq)].tokens += run
        seq.token_ids += [token.token_id for token in run]
        seq.num_computed_tokens = seq.num_tokens - 1

    def finish(self, seq: Sequence, chunk: Callable[[int], int] = lambda count: count) -> Answer:
        while seq.num_output_tokens < seq.sampling.max_tokens:
            self.step([(seq, chunk(seq.num_uncomputed_tokens))])
        return self.answers[id(seq)]

    def alone(self, prompt: list[int], sampling: SamplingParams) -> Answer:
        return self.finish(self.add(prompt, sampling))

    def together(self, asked: list[tuple[list[int], SamplingParams]], rng: random.Random) -> list[Answer]:
        """Each step some of them, with one token, a few or all that they have."""
        seqs = [self.add(prompt, sampling) for prompt, sampling in asked]
        while running := [seq for seq in seqs if seq.num_output_tokens < seq.sampling.max_tokens]:
            chosen = [seq for seq in running if rng.random() < 0.7] or running[:1]
            self.step([(seq, part(rng, seq.num_uncomputed_tokens)) for seq in chosen])
        return [self.answers[id(seq)] for seq in seqs]


def part(rng: random.Random, count: int) -> int:
    return rng.choice([count, 1, rng.randint(1, count), min(count, rng.randint(1, 20))])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), NATIVE + TORCH)
def test_neither_company_nor_chunks_nor_threads_show(make: EngineMaker, kind: str, model: str) -> None:
    one, two = Stepper(make(kind, model)), Stepper(make(kind, model, num_threads=2, block_size=32))
    lengths = [1, 7, 40, 256, 257, 300, 560] if kind == "native" else [1, 7, 40, 256, 300]
    asked = [(prompt, various(index)) for index, prompt in enumerate(prompts(lengths, 500))]
    expected = [one.alone(prompt, sampling) for prompt, sampling in asked]
    for seed, runner in enumerate((two, one, two)):
        assert runner.together(asked, random.Random(seed)) == expected
        runner.driver = Driver(runner.engine)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), [*KINDS, ("native", "long window")])
def test_drafts_show_nowhere(make: EngineMaker, kind: str, model: str) -> None:
    """Right ones, wrong ones, and right ones that go wrong: tokens and log-probabilities are those without."""
    runner, other = Stepper(make(kind, model)), Stepper(make(kind, model))
    rng = random.Random(5)
    for index, prompt in enumerate(prompts([3, 31, 250, 254, 300, 17], 500)):
        params = various(index)
        params = msgspec.structs.replace(params, max_tokens=14, prompt_logprobs=None)
        whole = runner.alone(prompt, params).tokens
        other.driver = Driver(other.engine)
        seq = other.add(prompt, params)
        other.step([(seq, len(prompt))])
        while len(other.answers[id(seq)].tokens) < params.max_tokens:
            done = len(other.answers[id(seq)].tokens)
            right = [token.token_id for token in whole[done : done + rng.randrange(5)]]
            other.verify(seq, [*right, *(rng.randrange(500) for _ in range(rng.randrange(3)))][: 13 - done])
        assert other.answers[id(seq)].tokens == whole


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), [*KINDS, ("native", "long window")])
def test_an_answer_goes_on_from_any_token(make: EngineMaker, kind: str, model: str) -> None:
    """Prompt and accepted tokens as one prompt, in chunks, or the accepted tokens fed again one by one."""
    runner, other = Stepper(make(kind, model)), Stepper(make(kind, model))
    rng = random.Random(3)
    (prompt,) = prompts([290], 500)
    params = sampled(9, max_tokens=10, frequency_penalty=0.3, min_tokens=4, top_p=0.95)
    whole = runner.alone(prompt, params).tokens
    for done in range(len(whole)):
        outputs = tuple(token.token_id for token in whole[:done])
        for refeeds in (False, True):
            other.driver = Driver(other.engine)
            seq = other.add(prompt, params, outputs)
            if refeeds and done:
                other.step([(seq, len(prompt))])
                resumed = other.finish(seq, lambda count: 1)
            else:
                resumed = other.finish(seq, lambda count: part(rng, count))
            assert resumed.tokens == whole[done:], (done, refeeds)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_choices_of_one_prompt_are_those_of_requests_of_their_own(make: EngineMaker, kind: str, model: str) -> None:
    runner = Stepper(make(kind, model))
    (prompt,) = prompts([270], 500)
    first = runner.add(prompt, sampled(5))
    first.pending_choices = (0, 1, 2)
    batch = Batch([BatchRow(first, len(prompt))])
    runner.driver.grow(first, len(prompt))
    runs = runner.engine.step(batch).rows[0].runs
    for choice, (token,) in enumerate(runs):
        alone = Stepper(runner.engine)
        seq = alone.add(prompt, sampled(5))
        seq.choice = choice
        expected = alone.finish(seq).tokens
        forked = runner.add(prompt, sampled(5), (token.token_id,))
        forked.choice = choice
        assert [token, *runner.finish(forked).tokens] == expected


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model"), KINDS)
def test_cached_blocks_are_as_good_as_computed_ones(make: EngineMaker, kind: str, model: str) -> None:
    """Those of a prompt that went before, those of an answer, and those that came from another worker."""
    here, there = Stepper(make(kind, model)), Stepper(make(kind, model, num_threads=2))
    (prompt,) = prompts([300], 500)
    earlier = here.add(prompt[:200], sampled(1, max_tokens=60))
    here.finish(earlier)
    continued = [*earlier.token_ids[:255], *prompt[255:]]
    expected = there.alone(continued, sampled(2)).tokens

    hit = here.add(continued, sampled(2))
    hit.block_table, hit.num_computed_tokens = earlier.block_table[:15], 240
    assert here.finish(hit).tokens == expected

    there.driver = Driver(there.engine)
    moved = there.add(continued, sampled(2))
    there.driver.grow(moved, 240)
    there.engine.kv_pages[:, moved.block_table] = here.engine.kv_pages[:, earlier.block_table[:15]]
    moved.num_computed_tokens = 240
    assert there.finish(moved).tokens == expected


@pytest.mark.slow
def test_two_ranks_keep_one_order(model_dirs: Path) -> None:
    config = engine_config(model_dirs / "odd sizes", tensor_parallel_size=2, deterministic=True, dtype="bfloat16")
    group = RankGroup.start(config, num_blocks=NUM_BLOCKS)
    try:
        runner = Stepper(Engine(config, tp_size=2, num_blocks=NUM_BLOCKS, group=group))
        asked = [(prompt, various(index)) for index, prompt in enumerate(prompts([3, 20, 270], 500))]
        expected = [runner.alone(prompt, sampling) for prompt, sampling in asked]
        assert runner.together(asked, random.Random(7)) == expected
    finally:
        group.close()


# --- sampling -----------------------------------------------------------------------------------------------


def _ties() -> Tensor:
    """Logits with many equal values, each more than once."""
    return (torch.randn(4, 503, generator=torch.Generator().manual_seed(2)) * 2).round().div(2)


def test_each_row_is_sampled_as_if_alone() -> None:
    logits = _ties()
    rows = [SampleRow(various(index), (0, 1), [5, 6, 7, 7], 2) for index in (1, 2, 3, 4)]
    together = sample_each(logits.clone(), rows, frozenset({1}))
    for order in ([3, 1, 0, 2], [2, 2, 2, 0]):
        assert sample_each(logits[order], [rows[i] for i in order], frozenset({1})) == [together[i] for i in order]
    assert [sample_each(logits[i : i + 1].clone(), [rows[i]], frozenset({1}))[0] for i in range(4)] == together


def test_of_equally_good_tokens_the_lowest_is_chosen() -> None:
    logits = torch.zeros(1, 500)
    logits[0, [40, 17, 300]] = 9.0
    plain = SampleRow(SamplingParams(temperature=0.0), (0,), [1], 1)
    reported = SampleRow(SamplingParams(temperature=0.0, logprobs=1), (0,), [1], 1)
    assert [sample_each(logits, [row], frozenset())[0][0].token_id for row in (plain, reported)] == [17, 17]


# --- who may compute together -------------------------------------------------------------------------------


def test_workers_that_would_compute_other_bits_do_not_exchange_pages(make: EngineMaker) -> None:
    exact, again = make("bfloat16", "llama"), make("bfloat16", "llama", num_threads=2)
    native, fast = make("native", "llama"), make("bfloat16", "llama", deterministic=False)
    assert exact.spec == again.spec and not fast.spec.results
    assert native.spec.results.startswith("kernels-") and exact.spec.results.startswith("torch ")
    assert len({engine.spec.fingerprint for engine in (exact, native, fast)}) == 3


def test_torchs_threads_are_as_before_a_step(make: EngineMaker) -> None:
    runner = Stepper(make("float32", "llama", num_threads=2))
    assert torch.get_num_threads() == 2
    runner.alone([1, 2, 3], sampled(0))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_products_that_tell_a_rows_place_are_refused(make: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, product = make("float32", "llama"), Linear.__call__

    def favour_the_last(self: Linear, x: Tensor) -> Tensor:
        y = product(self, x).clone()
        y[-1] = y[-1].nextafter(y[-1] + 1)
        return y

    monkeypatch.setattr(Linear, "__call__", favour_the_last)
    assert isinstance(engine.runner, TiledRunner)
    with pytest.raises(ConfigError, match=r"qkv_proj.*depends on its place"):
        TiledDecoder(engine.runner.decoder)


def test_a_gpu_is_refused_with_what_helps(model_dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = engine_config(model_dirs / "llama", deterministic=True)
    for device in ("cuda", "auto"):
        asked = EngineConfig.model_validate(config.model_dump() | {"device": device})
        with pytest.raises(ConfigError, match=r"deterministic: only on CPUs.*--device cpu"):
            Engine(asked, num_blocks=16)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)
