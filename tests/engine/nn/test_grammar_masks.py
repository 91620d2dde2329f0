"""A grammar's mask among the other rules of sampling, on the host and, by the same words, on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvferry.common.batch import Batch, BatchRow, GrammarMask
from kvferry.common.request import RequestId, SampledToken, SamplingParams, Sequence
from kvferry.engine.cuda.sampling import DeviceSampler
from kvferry.engine.sampling.sampling import SampleRow, sample, sample_each, sample_rows

VOCAB = 50
EOS = frozenset({0, 1})
Sampler = Callable[[Tensor, Rows[SampleRow], frozenset[int]], Rows[tuple[SampledToken, ...]]]


class _NoKernels:
    """No row here asks for top_k or top_p."""


def _on_device(logits: Tensor, rows: Rows[SampleRow], eos: frozenset[int]) -> Rows[tuple[SampledToken, ...]]:
    return DeviceSampler(torch.device("cpu"), _NoKernels(), eos).launch(logits, rows).read()  # type: ignore[arg-type]


SAMPLERS = pytest.mark.parametrize("sampler", [sample, sample_each, _on_device])


def _mask(*tokens: int) -> bytes:
    return sum(1 << token for token in tokens).to_bytes(8, "little")


def _row(params: SamplingParams, *tokens: int, choices: tuple[int, ...] = (0,), output: Rows[int] = ()) -> SampleRow:
    return SampleRow(params, choices, [5, 6, *output], 2, _mask(*tokens))


def _logits(rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def _ids(sampler: Sampler, rows: Rows[SampleRow]) -> list[list[int]]:
    tokens = sampler(_logits(len(rows)), rows, EOS)
    return [[token.token_id for token in of_row] for of_row in tokens]


@SAMPLERS
def test_no_token_outside_the_mask_is_chosen(sampler: Sampler) -> None:
    many = tuple(range(200))
    rows = [
        _row(SamplingParams(temperature=3.0), 3, 31, 32, 49, choices=many),
        _row(SamplingParams(temperature=0.0), 4, 5),
        SampleRow(SamplingParams(), many, [5, 6], 2),
        _row(SamplingParams(temperature=2.0, min_p=0.01), 7, choices=many),
    ]
    drawn = _ids(sampler, rows)
    assert set(drawn[0]) == {3, 31, 32, 49} and set(drawn[3]) == {7}
    assert drawn[1] == [4 if _logits(4)[1, 4] > _logits(4)[1, 5] else 5]
    assert len(set(drawn[2])) > 10, "a row without a grammar is left alone"


@SAMPLERS
def test_an_end_comes_where_the_mask_has_it(sampler: Sampler) -> None:
    assert _ids(sampler, [_row(SamplingParams(), 0)]) == [[0]]
    assert set(_ids(sampler, [_row(SamplingParams(), 0, 1, choices=tuple(range(99)))])[0]) == {0, 1}


@SAMPLERS
@pytest.mark.parametrize("params", [SamplingParams(min_tokens=5), SamplingParams(ignore_eos=True)])
def test_an_end_that_may_not_come_yet_comes_where_nothing_else_can(sampler: Sampler, params: SamplingParams) -> None:
    many = tuple(range(99))
    assert set(_ids(sampler, [_row(params, 0, 1, 9, choices=many, output=[7])])[0]) == {9}
    assert set(_ids(sampler, [_row(params, 0, 1, choices=many, output=[7])])[0]) == {0, 1}


@SAMPLERS
def test_an_end_is_a_token_like_others_where_no_grammar_ends_the_answer(sampler: Sampler) -> None:
    """It counts for nothing where ends are ignored, and comes no sooner than it may."""
    for params, output, wanted in (
        (SamplingParams(ignore_eos=True), [7], {0, 1, 9}),
        (SamplingParams(min_tokens=5), [7], {9}),
        (SamplingParams(min_tokens=5), [7] * 5, {0, 1, 9}),
    ):
        row = replace(_row(params, 0, 1, 9, choices=tuple(range(300)), output=output), ends_by_grammar=False)
        assert set(_ids(sampler, [row])[0]) == wanted


@pytest.mark.parametrize("ends_by_grammar", [True, False])
def test_every_row_of_a_step_knows_whether_a_grammar_ends_its_answer(ends_by_grammar: bool) -> None:
    seq = Sequence(RequestId("r"), 0, 0, [5, 6], 2, SamplingParams(), ends_by_grammar=ends_by_grammar)
    masks = [GrammarMask(_mask(3), behind_draft=(_mask(4),))]
    rows = sample_rows(Batch([BatchRow(seq, 4, (3, 4))], masks=lambda: masks))
    assert [row.mask for row in rows] == [_mask(3), _mask(4), None]
    assert [row.ends_by_grammar for row in rows] == [ends_by_grammar] * 3


@SAMPLERS
def test_a_stop_token_is_put_off_as_well(sampler: Sampler) -> None:
    params = SamplingParams(min_tokens=5, stop_token_ids=(9, 777))
    assert set(_ids(sampler, [_row(params, 8, 9, choices=tuple(range(99)))])[0]) == {8}
    assert set(_ids(sampler, [_row(params, 9, choices=tuple(range(99)))])[0]) == {9}


@SAMPLERS
def test_bias_and_penalties_cannot_bring_back_what_the_mask_forbids(sampler: Sampler) -> None:
    params = SamplingParams(
        logit_bias={20: 100.0, 3: -100.0}, presence_penalty=-2.0, frequency_penalty=-2.0, repetition_penalty=0.01
    )
    drawn = _ids(sampler, [_row(params, 3, 4, choices=tuple(range(99)), output=[20, 20, 4])])
    assert set(drawn[0]) == {4}


@SAMPLERS
def test_log_probabilities_are_the_models_own(sampler: Sampler) -> None:
    logits = _logits()
    raw = torch.log_softmax(logits, -1)[0]
    ((token,),) = sampler(logits.clone(), [_row(SamplingParams(logprobs=2), 3)], EOS)
    assert token.token_id == 3 and token.logprob == pytest.approx(float(raw[3]))
    assert [token_id for token_id, _ in token.top] == raw.topk(2).indices.tolist()


@SAMPLERS
def test_a_mask_without_a_token_yields_none(sampler: Sampler) -> None:
    rows = [_row(SamplingParams()), _row(SamplingParams(temperature=0.0)), _row(SamplingParams(), 3)]
    assert _ids(sampler, rows) == [[], [], [3]]


@SAMPLERS
def test_a_mask_that_ends_before_the_vocabulary_forbids_what_lies_behind(sampler: Sampler) -> None:
    row = SampleRow(SamplingParams(), tuple(range(99)), [5, 6], 2, _mask(3, 4)[:4])
    assert set(_ids(sampler, [row])[0]) == {3, 4}


def test_host_and_device_draw_the_same_tokens() -> None:
    rows = [_row(SamplingParams(seed=seed), *range(2, 40, 3), choices=(0, 1)) for seed in range(20)]
    assert _ids(sample, rows) == _ids(_on_device, rows)
    assert not any(math.isnan(value) for value in _logits().flatten().tolist())
