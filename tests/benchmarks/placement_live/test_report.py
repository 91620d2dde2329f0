from kvferry.benchmarks.placement_live.report import Run, Setting, bars_of, live_goodput, ratios, run_table
from kvferry.benchmarks.shared.live_load import Figures
from kvferry.benchmarks.shared.pools import Pools
from kvferry.tools.load.stats import describe

SPLIT, NONE = Pools(1, 2), Pools(0, 3)


def _run(policy: str, goodput: float, *, num_failed: int = 0) -> Run:
    nothing = describe(())
    figures = Figures(10, 8, 1, num_failed, (), 10.0, goodput, 0.8, 20.0, nothing, nothing, nothing)
    return Run(Setting(policy, NONE if policy == "colocated" else SPLIT), 1.0, figures)


RUNS = [_run("colocated", 2.0), _run("least_loaded", 3.0), _run("slo", 3.0), _run("slo", 4.5)]


def test_goodput_is_the_mean_over_the_rounds() -> None:
    assert live_goodput(RUNS, 1.0) == {"colocated": 2.0, "least_loaded": 3.0, "slo": 3.75}


def test_ours_is_held_to_the_best_other_and_to_colocated() -> None:
    assert ratios({"colocated": 2.0, "least_loaded": 3.0, "slo": 3.75}) == (1.25, 1.875)
    assert ratios({"slo": 1.0}) == (None, None)


def test_live_and_simulated_must_point_the_same_way() -> None:
    for expected, same in ((3.5, True), (2.5, False)):
        simulated = {run.setting: value for run, value in zip(RUNS, (2.0, 3.0, expected), strict=False)}
        bars = {bar.what: bar for bar in bars_of(RUNS, {(setting, 1.0): value for setting, value in simulated.items()})}
        assert bars["1: live and simulated point the same way"].is_met is same


def test_a_failed_request_misses_the_bar() -> None:
    bars = {bar.what: bar for bar in bars_of([*RUNS, _run("slo", 4.0, num_failed=2)], {})}
    assert bars["requests that failed"].value == 2
    assert not bars["requests that failed"].is_met


def test_a_request_that_failed_while_splits_were_chosen_misses_it_too() -> None:
    bars = {bar.what: bar for bar in bars_of(RUNS, {}, [_run("slo", 1.0, num_failed=1)])}
    failed = bars["requests that failed"]
    assert (failed.value, failed.count, failed.is_met) == (1, 50, False)


def test_the_table_has_a_row_for_each_run() -> None:
    assert run_table(RUNS, {}).row_count == 4
