"""How a simulated colocated worker shares its time between prompts and running answers."""

from __future__ import annotations

from statistics import fmean

import pytest

from kvferry.router.dispatch.placer import Placer
from kvferry.simulator import Fleet, Router, Scenario, Traffic, simulate
from kvferry.sizing.steps import Linear
from kvferry.tools.load.traces import TraceRow

# A CPU's steps: a row costs a tenth of what reading the weights does.
STEPS = Linear(step=0.02, mixed=0.0, per_token=1e-3, per_pair=1e-9, per_row=0.002, per_context=1e-8)


def _colocated(num_waiting: int) -> Scenario:
    """Four long answers, beside which so many prompts come at once."""
    rows = [TraceRow(0.0, 100, 1000)] * 4 + [TraceRow(3.0, 1000, 4)] * num_waiting
    return Scenario(
        traffic=Traffic(tuple(rows)),
        fleet=Fleet(prefill=0, decode=1, steps=STEPS, num_blocks=1500, block_tokens=16, has_objective=False),
        router=Router(policy="slo", knows_objectives=False),
    )


def _first_tokens_s(num_waiting: int) -> list[float]:
    requests = simulate(_colocated(num_waiting)).requests[4:]
    return [request.ttft_s for request in requests if request.ttft_s is not None]


def test_many_prompts_that_wait_get_more_of_a_worker_than_one() -> None:
    [alone] = _first_tokens_s(1)
    many = _first_tokens_s(8)
    assert len(many) == 8 and max(many) < 8 * 0.8 * alone


def test_a_worker_that_nobody_tells_of_the_queue_keeps_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    told = fmean(_first_tokens_s(8))
    monkeypatch.setattr(Placer, "_tokens_behind", lambda self, tracked: 0)
    assert told < 0.8 * fmean(_first_tokens_s(8))


def test_decode_workers_take_what_prefill_workers_cannot_and_streams_keep_half_their_pace() -> None:
    """A prefill worker that computes 1.4 of these prompts in a second gets two."""
    steps = Linear(step=0.01, mixed=0.0, per_token=1.4e-3, per_pair=1e-9, per_row=0.0015, per_context=1e-7)
    rows = tuple(TraceRow(0.5 * number, 512, 64) for number in range(60))
    fleet = Fleet(prefill=1, decode=1, steps=steps, num_blocks=4000, block_tokens=16, has_objective=False)
    shared, split = (
        simulate(Scenario(traffic=Traffic(rows), fleet=fleet, router=router)).requests
        for router in (
            Router(policy="slo", knows_objectives=False),
            Router(policy="slo", knows_objectives=False, local_prefill=False),
        )
    )
    ttft_s = [max(request.ttft_s or 0.0 for request in requests) for requests in (shared, split)]
    tpot_s = [fmean(request.tpot_s or 0.0 for request in requests) for requests in (shared, split)]
    assert ttft_s[0] < 0.4 * ttft_s[1] and tpot_s[0] < 3.5 * tpot_s[1]
