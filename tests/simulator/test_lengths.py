"""Prompts and answers that the model's context has no room for, in runs, in their bound and in what is sized."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator import Fleet, Outcome, Router, Scenario, Traffic, capacity, simulate
from kvferry.simulator.lengths import TOO_LONG, with_means
from kvferry.simulator.oracle import bound
from kvferry.tools.load.traces import TraceRow

CONTEXT = 4096


def scenario(*rows: TraceRow, policy: str = "least_loaded", **traffic: object) -> Scenario:
    return Scenario(
        traffic=replace(Traffic(rows), **traffic),  # type: ignore[arg-type]
        fleet=Fleet(prefill=1, decode=1, max_model_len=CONTEXT),
        router=Router(policy=policy),
    )


def ends(outcome: Outcome) -> list[tuple[str, int, str]]:
    return [(request.ended, request.num_output_tokens, request.error) for request in outcome.requests]


@pytest.mark.parametrize("policy", ["least_loaded", "slo"])
def test_a_prompt_without_room_is_refused_as_the_router_refuses_it(policy: str) -> None:
    rows = (TraceRow(float(number), length, 20) for number, length in enumerate((CONTEXT, 100, 5 * CONTEXT)))
    outcome = simulate(scenario(*rows, policy=policy))
    refused = ("refused", 0, TOO_LONG)
    assert ends(outcome) == [refused, ("finished", 20, ""), refused]
    assert (outcome.num_too_long, outcome.num_good, outcome.num_cut) == (2, 1, 0)
    assert outcome.attainment == pytest.approx(1 / 3) and outcome.goodput_per_s == pytest.approx(1 / 2)


def test_an_answer_ends_where_the_context_does() -> None:
    rows = (TraceRow(0.0, CONTEXT - 1, 20), TraceRow(1.0, CONTEXT - 20, 20), TraceRow(2.0, CONTEXT - 300, 900))
    cut = scenario(*rows)
    outcome = simulate(cut)
    assert ends(outcome) == [("finished", 1, ""), ("finished", 20, ""), ("finished", 300, "")]
    assert [request.is_cut for request in outcome.requests] == [True, False, True]
    assert (outcome.num_cut, outcome.num_too_long) == (2, 0)
    stepped = simulate(replace(cut, jumps=False))
    for one, other in zip(outcome.requests, stepped.requests, strict=True):
        assert (one.tpot_s, one.end_s) == pytest.approx((other.tpot_s, other.end_s))


def test_an_embedding_takes_no_room_behind_its_prompt() -> None:
    rows = (TraceRow(0.0, CONTEXT, 20), TraceRow(1.0, CONTEXT + 1, 20))
    outcome = simulate(scenario(*rows, embedding_share=1.0))
    assert [request.ended for request in outcome.requests] == ["finished", "refused"]


def test_no_rate_is_searched_where_too_many_prompts_have_no_room() -> None:
    rows = [TraceRow(float(number), 100, 5) for number in range(8)]
    rows += [TraceRow(float(number), 5000, 5) for number in (8, 9)]
    with pytest.raises(ConfigError, match=r"share: 2 of 10 prompts are too long for the model's 4,096 tokens"):
        capacity(scenario(*rows), share=0.9)
    with pytest.raises(ConfigError, match="10 requests are good even if all come at once"):  # so few are, of the rest
        capacity(scenario(*rows), share=0.8)


def test_an_oracle_serves_no_prompt_without_room() -> None:
    short, long = TraceRow(0.0, 1000, 50), TraceRow(1.0, 100_000, 50)
    alone, both = bound(scenario(short), share=1.0), bound(scenario(short, long), share=1.0)
    assert both.goodput_per_s == alone.goodput_per_s
    assert both.rate_per_s == pytest.approx(2 * alone.rate_per_s)
    with pytest.raises(ConfigError, match="the trace's prompts are all too long for the model's 4,096 tokens"):
        bound(scenario(replace(long, arrival_s=0.0)))


@pytest.mark.parametrize(("prompt", "output"), [(6000, None), (6000, 1500), (3, 2), (None, 300)])
def test_lengths_have_the_means_that_are_wanted_within_the_context(prompt: int | None, output: int | None) -> None:
    rows = [TraceRow(float(number), 40 * number**2, 10 + number % 50) for number in range(40)]
    found = with_means(rows, prompt, output, 8192)
    assert all(row.num_prompt_tokens + row.num_output_tokens <= 8192 for row in found)
    if prompt is not None:
        assert mean(row.num_prompt_tokens for row in found) == pytest.approx(prompt, abs=0.5)
    if output is not None:
        assert mean(row.num_output_tokens for row in found) == pytest.approx(output, abs=0.5)


def test_lengths_that_nothing_is_wanted_of_stay_as_far_as_there_is_room() -> None:
    rows = [TraceRow(0.0, 100, 10, (1, 2)), TraceRow(1.0, 9000, 10)]
    assert with_means(rows, None, None, 8192) == (rows[0], replace(rows[1], num_prompt_tokens=8182))


@pytest.mark.parametrize(
    ("prompt", "output", "why"), [(8190, None, "context: 8,190"), (None, 5000, "output_len: 5,000")]
)
def test_means_without_room_are_refused(prompt: int | None, output: int | None, why: str) -> None:
    with pytest.raises(ConfigError, match=f"{why} tokens are more than the model's context has room for: "):
        with_means([TraceRow(0.0, 100, 10), TraceRow(1.0, 200, 10)], prompt, output, 8192)
