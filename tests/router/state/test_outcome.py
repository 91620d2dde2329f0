"""A request's time per token, held against its objective: choices run side by side."""

from __future__ import annotations

import pytest

from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.outcome import judge
from kvferry.router.state.request import RequestStatus, RouterRequest


def ended(lengths: tuple[int, ...], span_s: float, tpot_s: float) -> RouterRequest:
    """A request whose choices are so long, and whose last token came `span_s` after its first."""
    request = RouterRequest(
        "r", [1, 2, 3], SamplingParams(max_tokens=200), n=len(lengths), objectives=Objectives(tpot_s=tpot_s)
    )
    for choice, length in zip(request.choices, lengths, strict=True):
        choice.tokens.extend([SampledToken(5)] * length)
    request.timestamps.update(queued=0.0, prefill_start=0.0, first_token=0.1, last_token=0.1 + span_s)
    request.status = RequestStatus.FINISHED
    return request


@pytest.mark.parametrize("lengths", [(101,), (101, 101), (1, 101), (101, 40, 1)])
def test_the_time_per_token_is_that_of_the_longest_choice(lengths: tuple[int, ...]) -> None:
    outcome = judge(ended(lengths, 6.0, 0.06))
    assert outcome.tpot_s == pytest.approx(0.06)
    assert judge(ended(lengths, 6.0, 0.061)).is_good
    assert judge(ended(lengths, 6.0, 0.059)).missed_stage == "decode"


def test_choices_of_one_token_have_no_time_per_token() -> None:
    outcome = judge(ended((1, 1), 0.5, 0.01))
    assert outcome.tpot_s is None and outcome.is_good
