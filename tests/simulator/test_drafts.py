"""Drafts of a simulated fleet: what is right of them saves steps, and nothing but time changes."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest

from kvferry.common.errors import ConfigError
from kvferry.simulator import Drafts, Outcome, Router, Scenario, simulate
from kvferry.simulator.commands.simulate import main
from kvferry.sizing.steps import Linear, StepWork

from .runs import azure, mooncake, one_request, run

# A CPU's steps as `--steps` fits them: a row costs a tenth of what reading the weights does.
STEPS = Linear(step=0.02, mixed=0.0, per_token=1e-4, per_pair=1e-9, per_row=0.002, per_context=1e-8)


def test_right_drafts_bring_several_tokens_a_step() -> None:
    """All of 5 are right: six tokens a step, but for the first one and each 64th, which are plain."""
    scenario = one_request(400, 601, prefill=0, steps=STEPS, num_blocks=100)
    plain = simulate(scenario).requests[0]
    _, outcome = run(replace(scenario, fleet=replace(scenario.fleet, drafts=Drafts(1.0))))
    [drafted] = outcome.requests
    assert 490 < outcome.num_accepted_tokens <= outcome.num_draft_tokens <= 500
    assert plain.tpot_s is not None and drafted.tpot_s is not None
    alone, verified = (StepWork(decode_rows=1, decode_context=700, draft_tokens=number) for number in (0, 5))
    steps_s = 100 * STEPS.step_s(verified) + 2 * STEPS.step_s(alone)
    assert drafted.tpot_s * 600 == pytest.approx(steps_s, rel=0.02)
    assert plain.tpot_s > 4 * drafted.tpot_s


def test_what_is_right_is_fed_twice_where_layers_keep_states() -> None:
    scenario = one_request(400, 601, prefill=0, steps=STEPS, num_blocks=100)
    fleet = replace(scenario.fleet, drafts=Drafts(1.0), keeps_states=True)
    _, outcome = run(replace(scenario, fleet=fleet))
    [drafted] = outcome.requests
    assert 490 < outcome.num_accepted_tokens <= outcome.num_draft_tokens <= 500
    alone, verified = (StepWork(decode_rows=1, decode_context=700, draft_tokens=number) for number in (0, 10))
    steps_s = 100 * STEPS.step_s(verified) + 2 * STEPS.step_s(alone)
    assert drafted.tpot_s is not None and drafted.tpot_s * 600 == pytest.approx(steps_s, rel=0.02)


def test_drafts_that_are_seldom_right_are_given_up() -> None:
    """Another token costs as much as another step."""
    scenario = one_request(400, 2000, prefill=0, steps=replace(STEPS, per_row=0.02), num_blocks=100)
    plain, drafted = (
        simulate(replace(scenario, fleet=replace(scenario.fleet, drafts=drafts))) for drafts in (None, Drafts(0.05))
    )
    assert drafted.num_draft_tokens < 100
    assert drafted.requests[0].tpot_s == pytest.approx(plain.requests[0].tpot_s, rel=0.05)


def test_a_draft_model_takes_its_part_of_every_step() -> None:
    """Prompts take it longer too; each token of the longest draft is a step of the draft model."""
    share = 0.05
    scenario = one_request(400, 601, prefill=0, steps=STEPS, num_blocks=100)
    plain, drafted = (
        simulate(replace(scenario, fleet=replace(scenario.fleet, drafts=drafts))).requests[0]
        for drafts in (None, Drafts(1.0, model_share=share))
    )
    assert plain.ttft_s is not None and drafted.ttft_s is not None and drafted.tpot_s is not None
    assert drafted.ttft_s == pytest.approx((1 + share) * plain.ttft_s, rel=0.02)
    alone, verified = (StepWork(decode_rows=1, decode_context=700, draft_tokens=number) for number in (0, 5))
    steps_s = 100 * (STEPS.step_s(verified) + 5 * share * STEPS.step_s(alone)) + 2 * STEPS.step_s(alone)
    assert drafted.tpot_s * 600 == pytest.approx(steps_s, rel=0.02)


def test_keys_and_values_of_a_draft_model_take_their_part_of_memory_and_of_the_wire() -> None:
    plain, drafted = (azure(num_requests=1, drafts=drafts).fleet for drafts in (None, Drafts(0.7, model_share=0.25)))
    assert drafted.kv_token_bytes == 1.25 * plain.kv_token_bytes
    assert drafted.blocks(16) == int(plain.blocks(16) / 1.25)


def test_a_draft_model_that_costs_too_much_is_asked_seldom() -> None:
    """Each of its tokens takes most of a step, and half of them are wrong."""
    scenario = one_request(400, 2000, prefill=0, steps=STEPS, num_blocks=200)
    plain, drafted = (
        simulate(replace(scenario, fleet=replace(scenario.fleet, drafts=drafts)))
        for drafts in (None, Drafts(0.5, model_share=0.9))
    )
    assert 0 < drafted.num_draft_tokens < 200
    assert drafted.requests[0].tpot_s == pytest.approx(plain.requests[0].tpot_s, rel=0.05)


@pytest.mark.parametrize(
    "scenario",
    [
        azure(num_requests=60, steps=STEPS, num_blocks=3000, block_tokens=16),
        azure(num_requests=60, steps=STEPS, num_blocks=700, block_tokens=16, prefill=0),
        mooncake(num_requests=30, steps=STEPS, num_blocks=200, host_blocks=400),
    ],
    ids=["split", "full, colocated", "host memory"],
)
@pytest.mark.parametrize(
    ("model_share", "keeps_states"),
    [(0.0, False), (0.1, False), (0.0, True)],
    ids=["ngrams", "a draft model", "ngrams, states"],
)
def test_answers_end_where_they_do_without_drafts(scenario: Scenario, model_share: float, keeps_states: bool) -> None:
    """Whatever is drafted and preempted: each request has its tokens, and gives its blocks back."""
    scenario = replace(scenario, router=Router(knows_objectives=False))
    plain = undrafted(scenario)
    scenario = replace(
        scenario, fleet=replace(scenario.fleet, drafts=Drafts(0.6, model_share=model_share), keeps_states=keeps_states)
    )
    world, outcome = run(scenario)
    assert world.leftovers() == []
    assert [request.num_output_tokens for request in outcome.requests] == [
        request.num_output_tokens for request in plain.requests
    ]
    assert 0 < outcome.num_accepted_tokens < outcome.num_draft_tokens


@functools.cache
def undrafted(scenario: Scenario) -> Outcome:
    """The outcome that every kind of draft is held against."""
    return simulate(scenario)


def test_equal_drafts_have_equal_outcomes() -> None:
    scenario = azure(num_requests=30, steps=STEPS, num_blocks=3000, block_tokens=16, drafts=Drafts(0.6))
    assert simulate(scenario).requests == simulate(scenario).requests


@pytest.mark.parametrize("drafts", [Drafts(1.5), Drafts(0.5, 17), Drafts(0.0), Drafts(0.5, model_share=1.0)])
def test_what_is_no_share_or_too_much_is_refused(drafts: Drafts) -> None:
    with pytest.raises(ConfigError, match=r"draft_acceptance|num_speculative_tokens|draft_model_share"):
        simulate(azure(num_requests=1, drafts=drafts))


def test_a_flag_has_tokens_drafted(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trace", "sample:azure-2023-conv", "--requests", "10", "--rate", "8", "--policy", "least_loaded"]
    assert main([*words, "--draft-acceptance", "0.7"]) == 0
    assert re.search(r"of [\d,]+ drafted tokens [\d.]+% were right", capsys.readouterr().out)
