"""Step-time models: what they learn, and what they do not let in."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.router.state.step_fit import StepCosts, StepFit, step_s
from kvferry.wire.workers import StepSample

TRUE = StepCosts(base_s=0.004, token_s=1e-4, pair_s=2e-8, row_s=3e-4, context_s=5e-7)


def draw(rng: random.Random, costs: StepCosts = TRUE, noise: float = 0.0) -> StepSample:
    tokens = rng.choice((16, 64, 256, 512))
    context = rng.randrange(0, 8000)
    rows = rng.randrange(0, 32)
    sample = StepSample(1.0, tokens, round(tokens * (context + tokens / 2)), rows, rows * rng.randrange(100, 2000))
    return StepSample(
        step_s(costs, sample) * (1 + noise * rng.uniform(-1, 1)),
        sample.prefill_tokens,
        sample.prefill_pairs,
        sample.decode_rows,
        sample.decode_context,
    )


def trained(num: int = 200, noise: float = 0.0, costs: StepCosts = TRUE) -> tuple[StepFit, random.Random]:
    fit, rng = StepFit(), random.Random(7)
    for _ in range(num):
        fit.observe(draw(rng, costs, noise))
    return fit, rng


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.01), (0.2, 0.05)])
def test_costs_are_found_again(noise: float, error: float) -> None:
    fit, rng = trained(400, noise)
    for _ in range(50):
        sample = draw(rng)
        assert step_s(fit.costs, sample) == pytest.approx(sample.step_s, rel=error)


def test_one_slow_step_changes_nothing() -> None:
    fit, rng = trained()
    before = fit.costs
    hiccup = draw(rng)
    assert not fit.observe(StepSample(50 * hiccup.step_s, hiccup.prefill_tokens, hiccup.prefill_pairs))
    assert fit.num_outliers == 1 and fit.costs == before


def test_a_machine_that_has_become_slower_is_believed_after_a_while() -> None:
    fit, rng = trained()
    slower = StepCosts(*(4 * getattr(TRUE, name) for name in ("base_s", "token_s", "pair_s", "row_s", "context_s")))
    for _ in range(600):
        fit.observe(draw(rng, slower))
    sample = draw(rng, slower)
    assert step_s(fit.costs, sample) == pytest.approx(sample.step_s, rel=0.1)


def test_what_was_never_seen_costs_nothing() -> None:
    fit = StepFit()
    assert not fit.is_known and fit.costs == StepCosts()
    fit.observe(StepSample(0.01, 0, 0, 1, 100))
    assert fit.costs.token_s == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(1e-5, 100),
            st.integers(0, 10**5),
            st.integers(0, 10**10),
            st.integers(0, 512),
            st.integers(0, 10**8),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_costs_are_never_negative_and_never_wild(steps: list[tuple[float, int, int, int, int]]) -> None:
    fit = StepFit()
    for step in steps:
        fit.observe(StepSample(*step))
    costs = fit.costs
    assert all(value >= 0 for value in (costs.base_s, costs.token_s, costs.pair_s, costs.row_s, costs.context_s))
