import pytest

from kvferry.benchmarks.shared.live_load import Objectives, Unloaded
from kvferry.benchmarks.shared.measured_steps import Curve, MeasuredSteps
from kvferry.benchmarks.shared.pools import Pools
from kvferry.benchmarks.shared.twin import Machine, figures_of, lone_ttft_s, time_around, twin
from kvferry.common.errors import ConfigError
from kvferry.router.state.step_fit import StepCosts
from kvferry.simulator import quiet_simulation, simulate
from kvferry.simulator.costs.network import Link
from kvferry.tools.load.traces import TraceRow

STEPS = MeasuredSteps(
    Curve(StepCosts(0.002, 0.0005), (1.0,), 0.0, 50), Curve(StepCosts(0.01, row_s=0.001), (1.0,), 0.0, 50), 0.0
)
MACHINE = Machine(STEPS, Link(1e9, 0.0005), 1000, 16, 20_000, 64, 512)
OBJECTIVES = Objectives(Unloaded(((100, 0.06), (1000, 0.6)), 0.011), 0.033)
ROWS = [TraceRow(float(number), 200, 11) for number in range(6)]


def test_a_twin_answers_every_request_to_the_token_at_the_measured_pace() -> None:
    quiet_simulation()
    outcome = simulate(twin(MACHINE, ROWS, Pools(1, 1), "least_loaded", OBJECTIVES))
    figures = figures_of(outcome, OBJECTIVES, span_s=5.0)
    assert figures.num_sent == figures.num_good == 6 and figures.num_refused == 0
    assert {request.num_output_tokens for request in outcome.requests} == {11}
    assert figures.tpot_ms.p50 == pytest.approx(11.0, rel=0.1)
    assert figures.ttft_ms.p50 is not None and figures.ttft_ms.p50 >= 102.0


def test_a_colocated_twin_has_no_prefill_workers() -> None:
    outcome = simulate(twin(MACHINE, ROWS, Pools(0, 2), "least_loaded", OBJECTIVES))
    assert figures_of(outcome, OBJECTIVES, span_s=5.0).num_local == 6


def test_what_a_lone_request_takes_beyond_its_simulation_is_found() -> None:
    simulated_s = lone_ttft_s(twin(MACHINE, ROWS, Pools(1, 1), "least_loaded", OBJECTIVES))
    assert len(simulated_s) == len(ROWS)
    assert time_around(simulated_s, [ttft_s + 0.004 for ttft_s in simulated_s]) == pytest.approx(0.004)
    assert time_around(simulated_s, [0.0] * len(ROWS)) == 0.0


def test_shared_blocks_that_do_not_fit_the_workers_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="length-scale"):
        twin(MACHINE, [TraceRow(0.0, 40, 1, (1, 2), 20)], Pools(1, 1), "slo", OBJECTIVES)
