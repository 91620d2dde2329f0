"""Embeddings in a simulated fleet: prompts without answers, by the router and the workers that serve them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator import Failure, Router, Scenario, Traffic, simulate
from kvferry.simulator.commands.simulate import main
from kvferry.sizing.steps import Linear, StepWork
from kvferry.tools.load.traces import TraceRow

from .runs import azure, mooncake, one_request, run

STEPS = Linear(step=0.02, mixed=0.0, per_token=1e-4, per_pair=1e-9, per_row=0.002, per_context=1e-8)


def _embedding(scenario: Scenario, share: float = 1.0) -> Scenario:
    return replace(scenario, traffic=replace(scenario.traffic, embedding_share=share))


@pytest.mark.parametrize("prefill", [1, 0], ids=["a prefill worker", "a colocated one"])
def test_an_embedding_takes_its_prompt_and_no_more(prefill: int) -> None:
    scenario = one_request(300, 50, prefill=prefill, steps=STEPS, num_blocks=100)
    world, outcome = run(_embedding(scenario))
    [request] = outcome.requests
    assert (request.ended, request.num_output_tokens, request.is_embedding) == ("finished", 0, True)
    assert request.ttft_s == pytest.approx(STEPS.step_s(StepWork(300, 300 * 150)), rel=0.02)
    assert outcome.embedding_ms.count == 1 and outcome.ttft_ms.count == 0
    assert world.leftovers() == []


def test_embeddings_take_no_pages_from_answers_and_both_end() -> None:
    scenario = _embedding(azure(num_requests=80, steps=STEPS, num_blocks=700, block_tokens=16), 0.5)
    failures = (Failure("prefill-0", 3.0, 1.0), Failure("decode-1", 4.0, 1.0))
    scenario = replace(scenario, failures=failures, router=Router(knows_objectives=False))
    world, outcome = run(scenario)
    assert {request.ended for request in outcome.requests} == {"finished"}
    assert 20 < outcome.embedding_ms.count < 60
    assert all((request.num_output_tokens == 0) == request.is_embedding for request in outcome.requests)
    assert world.leftovers() == []
    assert simulate(scenario).requests == outcome.requests


def test_the_same_requests_are_embedded_whatever_else_changes() -> None:
    drawn = [
        [request.is_embedding for request in simulate(scenario).requests]
        for scenario in (_embedding(azure(num_requests=40), 0.3), _embedding(azure(num_requests=40, prefill=3), 0.3))
    ]
    assert drawn[0] == drawn[1] and any(drawn[0]) and not all(drawn[0])


def test_an_embedding_finds_its_prefix_again() -> None:
    rows = tuple(TraceRow(3.0 * number, 1100, 10, (1, 2)) for number in range(2))
    scenario = replace(mooncake(prefill=1), traffic=Traffic(rows, embedding_share=1.0))
    first, second = simulate(scenario).requests
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 1024)


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="embedding_share"):
        simulate(_embedding(azure(num_requests=1), 1.5))


def test_a_flag_has_prompts_embedded(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trace", "sample:azure-2023-conv", "--requests", "20", "--rate", "8", "--embedding-share", "0.5"]
    assert main(words) == 0
    assert re.search(r"slo: \d+ embeddings, p50 / p90 / p99 [\d.]+ / ", capsys.readouterr().out)
