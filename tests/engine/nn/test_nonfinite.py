"""Extremes of sampling, and logits that are no distribution: such a row alone yields nothing, in both samplers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.batch import Batch, BatchRow, RowOutput
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.sampling.logprobs import prompt_logprobs
from kvferry.engine.sampling.sampling import SampleRow, sample, sample_each

from ...checkpoints import put_nan, write_checkpoint
from ...engine_driver import GREEDY, Driver, make_engine, prompts
from ..cuda.torch_kernels import TorchKernels

Sampler = Callable[[Tensor, Sequence[SampleRow], frozenset[int]], list[tuple[SampledToken, ...]]]

VOCAB = 300
EOS = frozenset({0, 1})
NAN, INF = math.nan, math.inf
NOWHERE = VOCAB - 2  # from here on are tokens that no request speaks of


def sample_on_device(
    logits: Tensor, rows: Sequence[SampleRow], eos_token_ids: frozenset[int]
) -> list[tuple[SampledToken, ...]]:
    """The sampler of GPUs, with its kernels on the host."""
    return DeviceSampler(torch.device("cpu"), TorchKernels(), eos_token_ids).launch(logits, rows).read()


_SAMPLERS: tuple[Sampler, ...] = (sample, sample_each, sample_on_device)
SAMPLERS = pytest.mark.parametrize("sampler", _SAMPLERS)


def _floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Of a range: also its ends, and what is smaller than any normal number."""
    tiny = [5e-324, -5e-324, 1e-308, 1e-45, 1e-40, 1e-39, 1e-38, -1e-38, 1.2e-38, 1e-30, 1e-10, 9e-6, 1e-5]
    return st.sampled_from([low, high, *(value for value in tiny if low <= value <= high)]) | st.floats(low, high)


# All that a body can ask for.
_params = st.builds(
    SamplingParams,
    temperature=_floats(0.0, 2.0),
    top_p=_floats(5e-324, 1.0),
    top_k=st.sampled_from([0, 1, 2, VOCAB, 2**31 - 1]) | st.integers(0, 2**31 - 1),
    min_p=_floats(0.0, 1.0),
    presence_penalty=_floats(-2.0, 2.0),
    frequency_penalty=_floats(-2.0, 2.0),
    repetition_penalty=_floats(5e-324, 10.0),
    logit_bias=st.dictionaries(st.integers(0, NOWHERE - 1), _floats(-100.0, 100.0), max_size=4),
    min_tokens=st.sampled_from([0, 5]),
    stop_token_ids=st.lists(st.integers(0, NOWHERE - 1), max_size=3).map(tuple),
    logprobs=st.sampled_from([None, 0, 20]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
_rows = st.builds(
    SampleRow,
    params=_params,
    choices=st.sampled_from([(0,), (15,), (0, 1, 2)]),
    token_ids=st.lists(st.integers(0, NOWHERE - 1), min_size=1, max_size=10),
    num_prompt_tokens=st.just(1),
)


def _logits(num_rows: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def _ids(tokens: Sequence[tuple[SampledToken, ...]]) -> list[list[int]]:
    return [[token.token_id for token in of_row] for of_row in tokens]


def _assert_tokens(logits: Tensor, row: SampleRow, tokens: tuple[SampledToken, ...]) -> None:
    assert len(tokens) == len(row.choices)
    for token in tokens:
        assert 0 <= token.token_id < VOCAB and logits[token.token_id] > -INF
        assert (token.logprob is None) == (row.params.logprobs is None) and not token.is_nan


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(_rows, min_size=1, max_size=4), seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 1e-30, 30]))
def test_whatever_a_body_asks_tokens_are_of_the_vocabulary(rows: list[SampleRow], seed: int, scale: float) -> None:
    """Of every sampler: to draw what is asked takes longer than to sample."""
    logits = scale * _logits(len(rows), seed)
    for sampler in _SAMPLERS:
        for row, tokens, own in zip(rows, sampler(logits.clone(), rows, EOS), logits, strict=True):
            _assert_tokens(own, row, tokens)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data(), rows=st.lists(_rows, min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_a_row_that_is_no_distribution_yields_nothing_and_the_others_what_they_would_alone(
    data: st.DataObject, rows: list[SampleRow], seed: int
) -> None:
    logits = _logits(len(rows), seed)
    bad = data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1))
    for index in bad:
        kind = data.draw(st.sampled_from([[NAN], [INF], [INF, NAN], [NAN, -INF], "nothing left"]))
        if kind == "nothing left":
            logits[index] = -INF
        else:
            logits[index, NOWHERE : NOWHERE + len(kind)] = torch.tensor(kind)
    for sampler in _SAMPLERS:
        found = sampler(logits.clone(), rows, EOS)
        for index, row in enumerate(rows):
            if index in bad:
                assert found[index] == ()
            else:
                alone = sampler(logits[index : index + 1].clone(), [row], EOS)
                assert _ids(found[index : index + 1]) == _ids(alone)
                _assert_tokens(logits[index], row, found[index])


@SAMPLERS
@pytest.mark.parametrize("temperature", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
def test_banned_tokens_are_no_reason_to_refuse(sampler: Sampler, temperature: float, limits: dict[str, float]) -> None:
    logits = _logits(2)
    logits[:, 5:] = -INF
    params = SamplingParams(temperature=temperature, logprobs=3, **limits)  # type: ignore[arg-type]
    for tokens in sampler(logits, [SampleRow(params, (0,), [7], 1)] * 2, EOS):
        assert tokens and tokens[0].token_id < 5 and tokens[0].logprob is not None and tokens[0].logprob <= 0


@SAMPLERS
def test_what_a_request_does_to_its_logits_may_leave_no_distribution(sampler: Sampler) -> None:
    logits = _logits(4)
    logits[:3] *= 3e38 / logits.amax()
    rows = [
        SampleRow(SamplingParams(temperature=0.01), (0, 1), [7], 1),
        SampleRow(SamplingParams(temperature=0.0, repetition_penalty=0.01), (0,), list(range(VOCAB)), 1),
        SampleRow(SamplingParams(temperature=0.0, min_tokens=9, stop_token_ids=tuple(range(VOCAB))), (0,), [7], 1),
        SampleRow(SamplingParams(seed=3), (0,), [7], 1),
    ]
    found = sampler(logits.clone(), rows, EOS)
    assert found[:3] == [(), (), ()] and _ids(found[3:]) == _ids(sampler(logits[3:], rows[3:], EOS))


@SAMPLERS
def test_log_probabilities_of_no_distribution_are_not_reported(sampler: Sampler) -> None:
    """A ban may hide what is not finite from the choice: the model's own logits are reported all the same."""
    logits = _logits(2)
    logits[0, 9] = NAN
    plain = SamplingParams(temperature=0.0, min_tokens=1, stop_token_ids=(9,))
    rows = [SampleRow(msgspec.structs.replace(plain, logprobs=count), (0,), [7], 1) for count in (2, 2)]
    first, second = sampler(logits.clone(), rows, EOS)
    assert first == () and second[0].logprob is not None
    assert all(sampler(logits.clone(), [SampleRow(plain, (0,), [7], 1)] * 2, EOS))


def test_prompt_tokens_without_a_distribution_are_known_by_it() -> None:
    logits = _logits(2)
    logits[1, 9] = NAN
    assert [entry.is_nan for entry in prompt_logprobs(logits, [(3, 1), (3, 1)])] == [False, True]


# --- steps -----------------------------------------------------------------------------------------------------------


BAD = 500  # a token whose embedding is NaN: so is whatever attends to it


def _model(path: Path) -> Path:
    return put_nan(write_checkpoint(path, tokenizer=False), "model.embed_tokens.weight", BAD)


ENGINES = pytest.mark.parametrize(
    ("dtype", "deterministic"), [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True)]
)


@ENGINES
def test_a_row_of_a_step_says_so_and_the_others_go_on(tmp_path: Path, dtype: str, deterministic: bool) -> None:
    engine = make_engine(_model(tmp_path), dtype=dtype, deterministic=deterministic)
    driver = Driver(engine)
    bad = driver.add([3, 4, BAD, 5], SamplingParams(prompt_logprobs=1))
    good, other = (driver.add(prompt, GREEDY) for prompt in prompts([20, 20], 480))
    for seq in (bad, good, other):
        driver.grow(seq, seq.num_tokens)
    output = engine.step(Batch([BatchRow(seq, seq.num_tokens) for seq in (good, bad, other)]))
    assert output.rows[1] == RowOutput((), (), is_finite=False)
    alone = Driver(make_engine(tmp_path, dtype=dtype, deterministic=deterministic))
    expected = [alone.step([(alone.add(prompt, GREEDY), 20)])[0] for prompt in prompts([20, 20], 480)]
    assert [tuple(run[0] for run in output.rows[index].runs) for index in (0, 2)] == expected


@ENGINES
def test_log_probabilities_of_a_chunk_end_a_request_before_its_first_token(
    tmp_path: Path, dtype: str, deterministic: bool
) -> None:
    engine = make_engine(_model(tmp_path), dtype=dtype, deterministic=deterministic)
    driver = Driver(engine)
    seq = driver.add([3, 4, BAD, *range(5, 40)], SamplingParams(prompt_logprobs=0))
    driver.grow(seq, seq.num_tokens)
    assert not engine.step(Batch([BatchRow(seq, 10)])).rows[0].is_finite


@ENGINES
def test_what_such_a_request_leaves_behind_changes_nobody(tmp_path: Path, dtype: str, deterministic: bool) -> None:
    """Its blocks hold NaN where their next owner has no token yet."""
    model, outputs = _model(tmp_path), []
    for is_dirty in (False, True):
        engine = make_engine(model, dtype=dtype, deterministic=deterministic)
        if is_dirty:
            engine.kv_pages.fill_(NAN)
        driver = Driver(engine)
        seqs = [driver.add(prompt, GREEDY) for prompt in prompts([1, 5, 16, 33, 70], 480)]
        driver.step([(seqs[0], 1)])
        outputs.append(driver.generate(seqs, chunk=20))
    assert outputs[0] == outputs[1]
