"""Sampling: what is drawn, from which tokens, and that nothing but the row itself matters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.common.request import MIN_REPETITION_PENALTY, MIN_TEMPERATURE, SampledToken, SamplingParams
from kvferry.engine.sampling.logprobs import prompt_logprobs
from kvferry.engine.sampling.sampling import SampleRow, sample, uniform

VOCAB = 50
EOS = frozenset({0, 1})


def _row(
    params: SamplingParams,
    *,
    choices: tuple[int, ...] = (0,),
    prompt: Sequence[int] = (5, 6, 7),
    output: Sequence[int] = (),
) -> SampleRow:
    return SampleRow(params, choices, [*prompt, *output], len(prompt))


def _logits(rows: int = 1, *, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def _one(logits: Tensor, row: SampleRow) -> SampledToken:
    ((token,),) = sample(logits.clone(), [row], EOS)
    return token


def _drawn(logits: Tensor, params: SamplingParams, count: int = 400) -> Counter[int]:
    """Tokens of `count` choices, as one row draws them."""
    (tokens,) = sample(logits.clone(), [_row(params, choices=tuple(range(count)))], EOS)
    return Counter(token.token_id for token in tokens)


def test_greedy_takes_the_best_token() -> None:
    logits = _logits(4)
    rows = [_row(SamplingParams(temperature=0.0))] * 4
    tokens = sample(logits.clone(), rows, EOS)
    assert [row[0].token_id for row in tokens] == logits.argmax(-1).tolist()
    assert tokens[0][0] == SampledToken(int(logits[0].argmax()))


def test_uniform_is_a_fixed_function_of_its_three_counters() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    values = {uniform(seed, choice, index) for seed in (0, 1, -1, 2**63) for choice in (0, 1) for index in range(50)}
    assert len(values) == 400 and all(0 <= value < 1 for value in values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.05)


def test_uniform_does_not_change_between_releases() -> None:
    """A stream that moves to a worker of another release must go on with the same draws."""
    assert [uniform(42, 0, index).hex() for index in range(3)] == [
        "0x1.a0850172acc7cp-1",
        "0x1.8cb8af3e3d13ep-2",
        "0x1.39f41ca2b5b48p-2",
    ]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    logits = _logits(6)
    rows = [
        _row(SamplingParams(seed=1)),
        _row(SamplingParams(temperature=0.0)),
        _row(SamplingParams(seed=2, top_p=0.7), output=[3]),
        _row(SamplingParams(seed=2, top_k=5), choices=(0, 1, 2)),
        _row(SamplingParams(seed=3, min_p=0.1, temperature=0.5, logprobs=2)),
        _row(SamplingParams(seed=4, repetition_penalty=1.3, logit_bias={9: 4.0}), output=[9, 9]),
    ]
    together = sample(logits.clone(), rows, EOS)
    alone = [sample(logits[i : i + 1].clone(), [row], EOS)[0] for i, row in enumerate(rows)]
    assert [[t.token_id for t in row] for row in together] == [[t.token_id for t in row] for row in alone]
    for ours, theirs in zip(together[4], alone[4], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob)


def test_seed_choice_and_index_each_change_the_draw() -> None:
    flat = torch.zeros(1, 5000)
    base = _one(flat, _row(SamplingParams(seed=1)))
    assert base == _one(flat, _row(SamplingParams(seed=1)))
    assert base != _one(flat, _row(SamplingParams(seed=2)))
    assert base != _one(flat, _row(SamplingParams(seed=1), choices=(1,)))
    assert base != _one(flat, _row(SamplingParams(seed=1), output=[3]))


def test_draws_follow_the_distribution() -> None:
    logits = _logits()
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits[0] / temperature, 0)
        count = 4000
        drawn = _drawn(logits, SamplingParams(temperature=temperature, seed=9), count)
        for token in range(VOCAB):
            p = float(expected[token])
            assert drawn[token] / count == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count) + 1e-3)


_few = st.integers(2, 4)  # so that words are met with


@given(
    output=st.lists(_few, max_size=6),
    draft=st.lists(_few, max_size=3),
    words=st.lists(st.lists(_few, min_size=1, max_size=4).map(tuple), min_size=1, max_size=5).map(tuple),
    is_masked=st.booleans(),
)
def test_no_bad_word_is_completed(
    output: list[int], draft: list[int], words: tuple[tuple[int, ...], ...], is_masked: bool
) -> None:
    params = SamplingParams(temperature=0.0, bad_words=words)
    mask = (0b11100).to_bytes(8, "little") if is_masked else None
    row = SampleRow(params, (0,), [2, 3, 2, *output], 3, mask, tuple(draft))
    known = [*output, *draft]
    barred = {word[-1] for word in words if [*known, word[-1]][-len(word) :] == list(word)}
    logits = torch.full((1, VOCAB), -5.0)
    logits[0, 2:5] = torch.tensor([3.0, 2.0, 1.0])
    left = [token_id for token_id in range(2, 5) if token_id not in barred]
    # Where a grammar lets nothing else come, it does; without one any other token may.
    wanted = left[0] if left else 2 if is_masked else 0
    assert _one(logits, row).token_id == wanted
    sample(logits, [row], EOS)
    assert {token_id for token_id in range(2, 5) if logits[0, token_id] == -math.inf} == (
        barred if left or not is_masked else set()
    )


def _kept(logits: Tensor, params: SamplingParams) -> set[int]:
    """The tokens that may be drawn, by the definitions alone."""
    scaled = logits[0].double() / params.temperature
    probabilities = torch.softmax(scaled, 0)
    kept = {i for i in range(VOCAB) if probabilities[i] >= params.min_p * probabilities.max()}
    order = [i for i in probabilities.argsort(descending=True).tolist() if i in kept]
    if params.top_k:
        order = order[: params.top_k]
    total = sum(float(probabilities[i]) for i in order)
    reached, best = 0.0, set()
    for token in order:
        if reached >= params.top_p:
            break
        best.add(token)
        reached += float(probabilities[token]) / total
    return best


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=4),
        SamplingParams(top_k=VOCAB + 5, temperature=3.0),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=10, top_p=0.8, temperature=2.0),
        SamplingParams(min_p=0.05, top_k=6, top_p=0.9, temperature=1.5),
    ],
    ids=str,
)
def test_only_and_all_permitted_tokens_are_drawn(params: SamplingParams) -> None:
    logits = _logits(seed=3)
    drawn, kept = set(_drawn(logits, params, 3000)), _kept(logits, params)
    assert drawn <= kept
    weights = torch.softmax(logits[0] / params.temperature, 0)
    assert {token for token in kept if weights[token] > 0.01} <= drawn


def test_top_p_over_a_flat_vocabulary_needs_the_full_sort() -> None:
    logits = torch.linspace(0.0, 0.01, 4000).unsqueeze(0)
    drawn = _drawn(logits, SamplingParams(top_p=0.5, seed=1), 2000)
    assert min(drawn) >= 4000 - 2010  # half of the mass is the better half of the tokens
    assert len(drawn) > 500


def test_limits_of_one_row_leave_the_others_alone() -> None:
    logits = _logits(2, seed=4)
    limited, free = (
        _row(SamplingParams(top_k=1, top_p=0.5, min_p=0.9, seed=1), choices=tuple(range(200))),
        _row(SamplingParams(seed=1), choices=tuple(range(200))),
    )
    first, second = sample(logits.clone(), [limited, free], EOS)
    assert {token.token_id for token in first} == {int(logits[0].argmax())}
    assert Counter(t.token_id for t in second) == _drawn(logits[1:], SamplingParams(seed=1), 200)


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    prompt=tokens,
    output=tokens,
    repetition=st.sampled_from([0.5, 1.0, 1.7]),
    presence=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency=st.sampled_from([-0.5, 0.0, 0.8]),
    seed=st.integers(0, 5),
)
def test_penalties_are_the_plain_formula(
    prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float, seed: int
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    logits = _logits(seed=seed)
    expected = logits[0].tolist()
    for token in set(prompt) | set(output):
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token, count in Counter(output).items():
        expected[token] -= frequency * count + presence
    edited = logits.clone()
    sample(edited, [_row(params, prompt=prompt, output=output)], EOS)
    assert edited[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_logit_bias_moves_tokens_and_ignores_ids_beyond_the_vocabulary() -> None:
    for token_id in (0, 8, VOCAB - 1):
        params = SamplingParams(temperature=0.0, logit_bias={token_id: 90.0, VOCAB: 99.0, -1: 99.0})
        assert _one(_logits(), _row(params)).token_id == token_id


def test_no_end_before_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [0, 1, 9]] = torch.tensor([9.0, 8.0, 7.0])
    logits[0, 20] = 5.0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(9, VOCAB))
    assert _one(logits, _row(params)).token_id == 20
    assert _one(logits, _row(params, output=[20])).token_id == 20
    assert _one(logits, _row(params, output=[20, 20])).token_id == 0
    without = SamplingParams(temperature=0.0, min_tokens=1)
    assert sample(logits.clone(), [_row(without)], frozenset())[0][0].token_id == 0


def test_logprobs_are_the_models_own_whatever_edits_and_temperature() -> None:
    logits = _logits()
    params = SamplingParams(temperature=0.3, seed=2, logprobs=3, repetition_penalty=2.0, logit_bias={4: 50.0}, top_k=1)
    token = _one(logits, _row(params))
    expected = logits[0].log_softmax(0)
    assert token.token_id == 4
    assert token.logprob == pytest.approx(float(expected[4]))
    best = expected.topk(3)
    assert [i for i, _ in token.top] == best.indices.tolist()
    assert [value for _, value in token.top] == pytest.approx(best.values.tolist())


def test_logprobs_without_alternatives() -> None:
    token = _one(_logits(), _row(SamplingParams(temperature=0.0, logprobs=0)))
    assert token.logprob is not None and token.top == ()


def test_only_rows_that_ask_get_logprobs() -> None:
    rows = [_row(SamplingParams(temperature=0.0, logprobs=count)) for count in (None, 1, None, 4)]
    tokens = [row[0] for row in sample(_logits(4), rows, EOS)]
    assert [token.logprob is None for token in tokens] == [True, False, True, False]
    assert [len(token.top) for token in tokens] == [0, 1, 0, 4]


def test_prompt_logprobs_are_about_the_tokens_that_followed() -> None:
    logits = _logits(3)
    entries = prompt_logprobs(logits, [(7, 0), (8, 2), (9, 1)])
    expected = logits.log_softmax(-1)
    assert [entry.token_id for entry in entries] == [7, 8, 9]
    assert [entry.logprob for entry in entries] == pytest.approx([float(expected[i, 7 + i]) for i in range(3)])
    assert [len(entry.top) for entry in entries] == [0, 2, 1]
    assert [entry.rank for entry in entries] == [int((expected[i] >= expected[i, 7 + i]).sum()) for i in range(3)]


def test_a_prompt_token_ranks_behind_those_that_are_as_likely() -> None:
    """So no rank of the best ones, which are told in their order, is told twice."""
    [entry] = prompt_logprobs(torch.tensor([[0.0, 2.0, 1.0, 1.0, 1.0]]), [(4, 2)])
    assert entry.rank == 4 and len(entry.top) == 2


def test_tokens_of_no_probability_are_never_drawn() -> None:
    """Neither at the ends of the vocabulary nor between, even when the draw falls on the border."""
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [10, 30]] = 0.0
    assert set(_drawn(logits, SamplingParams(seed=5), 2000)) == {10, 30}


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (0, 0),
        (5e-324, 0),
        (1e-38, 0),
        (9.9e-6, 0),
        (1e-5, 0.01),
        (0.0099, 0.01),
        (0.01, 0.01),
        (0.7, 0.7),
        (math.nan, 0),
    ],
)
def test_a_temperature_is_none_or_large_enough_to_divide_by(asked: float, used: float) -> None:
    params = SamplingParams(temperature=asked)
    assert params.temperature == used and params.is_greedy == (used == 0)


@pytest.mark.parametrize(("asked", "used"), [(5e-324, 0.01), (1e-39, 0.01), (0.01, 0.01), (1.0, 1.0), (math.nan, 0.01)])
def test_a_repetition_penalty_is_large_enough_to_divide_by(asked: float, used: float) -> None:
    assert SamplingParams(repetition_penalty=asked).repetition_penalty == used


def test_what_comes_over_the_wire_is_raised_as_well() -> None:
    wire = msgspec.msgpack.encode({"temperature": 1e-4, "repetition_penalty": 1e-39})
    params = msgspec.msgpack.decode(wire, type=SamplingParams)
    assert (params.temperature, params.repetition_penalty) == (MIN_TEMPERATURE, MIN_REPETITION_PENALTY)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
