"""Sampling in C++: torch's tokens and log-probabilities, each row by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.request import SamplingParams
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.cpu.sampling import NativeSampler
from kvferry.engine.sampling.logprobs import prompt_logprobs
from kvferry.engine.sampling.sampling import SampleRow, sample
from kvferry.tests.checkpoints import write_checkpoint
from kvferry.tests.engine_driver import make_engine
from kvferry.tests.sampled import assert_same

EOS = frozenset({1, 3})
SIZES = (1, 15, 16, 63, 300, 515, 4096 + 7)  # around vectors, blocks and words
_bad_words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple), max_size=3).map(tuple)
_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.2, 0.001]),
    top_k=st.sampled_from([0, 1, 5, 100, 10_000]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {0: 4.0, 99_999: 1.0}]),
    bad_words=_bad_words,
    min_tokens=st.sampled_from([0, 8]),
    logprobs=st.sampled_from([None, 0, 3, 20]),
    seed=st.integers(0, 2**40),
)


@pytest.fixture(scope="module")
def samplers(tmp_path_factory: pytest.TempPathFactory) -> list[NativeSampler]:
    """One thread, and two."""
    path = write_checkpoint(tmp_path_factory.mktemp("model"), dtype="bfloat16", head_dim=64, num_qo_heads=2)
    found = []
    for num_threads in (1, 2):
        try:
            engine = make_engine(path, num_threads=num_threads)
        except NativeUnavailable as reason:
            pytest.skip(str(reason))
        assert isinstance(engine.runner, NativeRunner)
        found.append(NativeSampler(engine.runner.decoder, EOS))
    return found


@pytest.fixture(scope="module", params=[1, 2])
def sampler(request: pytest.FixtureRequest, samplers: list[NativeSampler]) -> NativeSampler:
    """As many threads as the parameter says."""
    num_threads: int = request.param
    return samplers[num_threads - 1]


def logits_of(num_rows: int, size: int, seed: int) -> torch.Tensor:
    """Logits of which few are large: where many are alike, rounding decides at which of them a filter ends."""
    chance = np.random.default_rng(seed)
    values = 12 * chance.standard_normal((num_rows, size)).astype(np.float32)
    padded = torch.zeros(num_rows, -(-size // 64) * 64)  # as the library lays rows out
    padded[:, :size] = torch.from_numpy(values)
    return padded[:, :size]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_tokens_and_log_probabilities_are_torchs(samplers: list[NativeSampler], data: st.DataObject) -> None:
    size, seed = data.draw(st.sampled_from(SIZES)), data.draw(st.integers(0, 10_000))
    rows = [
        SampleRow(
            data.draw(_params),
            data.draw(st.sampled_from([(0,), (2,), (0, 1, 5)])),
            [0, 0, *data.draw(st.lists(st.integers(0, min(size, 4) - 1), max_size=4))],
            2,
            data.draw(st.none() | st.binary(min_size=-(-size // 32) * 4, max_size=-(-size // 32) * 4).filter(any)),
        )
        for _ in range(data.draw(st.integers(1, 5)))
    ]
    logits = logits_of(len(rows), size, seed)
    expected = sample(logits.clone(), rows, EOS)
    for sampler in samplers:
        assert_same(sampler.sample(logits.clone(), rows), expected)


def test_a_row_is_the_same_in_any_company(sampler: NativeSampler) -> None:
    rows = [SampleRow(SamplingParams(seed=seed, top_p=0.95, logprobs=2), (0, 1), [4, 5], 1) for seed in range(30)]
    logits = logits_of(30, 3000, 0) / 6
    together = sampler.sample(logits.clone(), rows)
    assert together == [sampler.sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(30)]
    assert len({tokens[0].token_id for tokens in together}) > 10


def test_draws_follow_the_distribution(sampler: NativeSampler) -> None:
    logits, count = torch.tensor([[1.0, 0.0, -1.0, 3.0, 2.0]]), 4000
    row = SampleRow(SamplingParams(temperature=1.3, seed=3), tuple(range(count)), [4, 5], 2)
    [tokens] = sampler.sample(logits, [row])
    found = np.bincount([token.token_id for token in tokens], minlength=5) / count
    assert found == pytest.approx(torch.softmax(logits[0] / 1.3, 0).numpy(), abs=0.04)


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 1.0}])
def test_a_temperature_that_makes_all_tokens_alike_draws_any(sampler: NativeSampler, fields: dict[str, float]) -> None:
    params = SamplingParams(temperature=1e9, seed=3, **fields)  # type: ignore[arg-type]  # of several types
    [tokens] = sampler.sample(logits_of(1, 50, 7), [SampleRow(params, tuple(range(3000)), [4, 5], 2)])
    found = np.bincount([token.token_id for token in tokens], minlength=50)
    assert len(tokens) == 3000 and found.max() < 3 * 3000 / 40


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 17, 99])
@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_distribution_has_no_token(
    sampler: NativeSampler, value: float, place: int, logprobs: int | None, temperature: float
) -> None:
    row = SampleRow(SamplingParams(temperature=temperature, seed=1, logprobs=logprobs), (0, 1), [4, 5], 1)
    logits = logits_of(2, 100, 5)
    whole = sampler.sample(logits.clone(), [row, row])
    logits[0, place] = value
    spoilt = sampler.sample(logits.clone(), [row, row])
    assert spoilt[1] == whole[1] and bool(spoilt[0]) == (value == float("-inf"))
    assert all(token.token_id != place for token in spoilt[0])
    logits[0] = float("-inf")
    assert sampler.sample(logits, [row, row])[0] == ()


def test_ties_stay_and_the_first_of_equal_tokens_is_reported_first(sampler: NativeSampler) -> None:
    logits = torch.full((1, 200), -3.0)
    logits[0, [150, 7, 60]] = 2.0
    for params in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        row = SampleRow(SamplingParams(seed=4, logprobs=4, **params), tuple(range(60)), [4, 5], 1)
        [tokens] = sampler.sample(logits.clone(), [row])
        assert {token.token_id for token in tokens} == {7, 60, 150}
        assert [i for i, _ in tokens[0].top] == [7, 60, 150, 0]


def test_a_vocabulary_may_be_smaller_than_what_is_reported(sampler: NativeSampler) -> None:
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")]])
    row = SampleRow(SamplingParams(seed=4, logprobs=20), (0,), [4, 5], 1)
    [[token]] = sampler.sample(logits, [row])
    assert token.token_id == 1 and token.logprob == 0.0 and [i for i, _ in token.top] == [1, 0, 2]


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.05}, {"frequency_penalty": 0.4, "presence_penalty": 0.3}])
def test_penalties_go_on_with_what_was_read(sampler: NativeSampler, params: dict[str, float]) -> None:
    text, wanted = [4, 5, 6], SamplingParams(temperature=0.0, logprobs=2, **params)  # type: ignore[arg-type]
    for step in range(40):
        logits = logits_of(1, 63, step)
        row = SampleRow(wanted, (0,), text, 3)
        [tokens] = found = sampler.sample(logits.clone(), [row])
        assert_same(found, sample(logits, [row], EOS))
        text.append(tokens[0].token_id)
    assert len(set(text)) < len(text)


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_prompt_tokens_are_judged_as_torch_judges_them(
    sampler: NativeSampler, size: int, seed: int, data: st.DataObject
) -> None:
    """Of logits of which some are equal, and no two others so near that a rounded sum makes them so."""
    chance, targets = np.random.default_rng(seed), st.tuples(st.integers(0, size - 1), st.sampled_from([0, 1, 5, 20]))
    wanted = data.draw(st.lists(targets, min_size=1, max_size=5))
    logits = torch.zeros(len(wanted), -(-size // 64) * 64)[:, :size]  # as the library lays rows out
    for row in logits:
        row.copy_(torch.from_numpy(chance.permutation(np.arange(size) // 2).astype(np.float32)) / 64)
    found, expected = sampler.prompt_logprobs(logits, wanted), prompt_logprobs(logits, wanted)
    for (token_id, count), ours, theirs in zip(wanted, found, expected, strict=True):
        assert (ours.token_id, ours.rank, len(ours.top)) == (token_id, theirs.rank, min(size, count))
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-4)
    alone = [sampler.prompt_logprobs(logits[i : i + 1], wanted[i : i + 1])[0] for i in range(len(wanted))]
    assert found == alone, "a row's company changes nothing"


def test_ranks_go_by_what_is_told(sampler: NativeSampler) -> None:
    """Logits that differ by less than their log-probabilities can are as likely, and so are those of -inf."""
    logits = torch.full((1, 300), -3.0)
    logits[0, 7], logits[0, 8], logits[0, 9] = 30.0, -3.0 * (1 - 2**-23), float("-inf")
    assert logits[0, 8] > logits[0, 0]
    judged = {token: sampler.prompt_logprobs(logits, [(token, 1)])[0] for token in (7, 8, 0, 9)}
    assert [judged[token].rank for token in (7, 8, 0, 9)] == [1, 299, 299, 300]
    assert judged[0].logprob == judged[8].logprob and judged[9].logprob == float("-inf")
    logits[0, 3] = float("nan")
    [told] = sampler.prompt_logprobs(logits, [(7, 1)])
    assert told.is_nan
