"""A request's time per token, held against its objective: choices run side by side."""

from __future__ import annotations

import pytest

from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.state.decisions import Decision
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


@pytest.mark.parametrize(("queued_s", "stage"), [(1.0, "queue"), (0.4, "prefill")])
def test_what_a_prompt_takes_on_an_empty_worker_is_no_excess(queued_s: float, stage: str) -> None:
    request = ended((1,), 0.0, 1.0)
    request.objectives, request.unloaded_s = Objectives(ttft_s=2.0, ttft_stretch=1.0), 2.0
    request.decisions.append(Decision(0, queued_s, "slo", None, "d-0", "colocated"))
    request.timestamps.update(prefill_start=queued_s, first_token=queued_s + 2.5)
    assert judge(request).missed_stage == stage
