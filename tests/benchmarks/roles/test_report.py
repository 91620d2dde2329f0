import pytest

from kvferry.benchmarks.roles.report import Case, RoleChange, Run, Sent, bars_of


def _run(name: str, good_until_s: float, good_from_s: float, seconds: int = 90) -> Run:
    """Two requests a second; good before the one time and from the other on."""
    sent = [half / 2 for half in range(2 * seconds)]
    return Run(
        name, "1+2", tuple(Sent(at_s, at_s < good_until_s or at_s >= good_from_s, is_failed=False) for at_s in sent)
    )


def _case(wrong: Run, stuck: Run | None = None) -> Case:
    return Case("decode", "load", 90.0, 5.0, _run("best", 90, 90), wrong, stuck)


def test_recovery_is_the_end_of_the_first_of_three_good_windows() -> None:
    assert _case(_run("wrong", 0, 20)).recovered_s == 25.0


def test_nothing_is_recovered_where_the_best_split_had_nothing_good() -> None:
    nothing = _run("best", 0, 90)
    assert Case("decode", "load", 30.0, 5.0, nothing, _run("wrong", 0, 90), None).recovered_s is None
    late = Case("decode", "load", 90.0, 5.0, _run("best", 40, 90), _run("wrong", 0, 90), None)
    assert late.recovered_s is None  # nobody was good after 40 s


def test_a_window_in_which_nobody_was_good_is_no_step_back() -> None:
    sparse = _run("best", 90, 90)
    gap = Run("best", "1+2", tuple(sent for sent in sparse.requests if not 40 <= sent.at_s < 45))
    wrong = Run("wrong", "2+1", tuple(sent for sent in _run("wrong", 0, 20).requests if not 40 <= sent.at_s < 45))
    assert Case("decode", "load", 90.0, 5.0, gap, wrong, None).recovered_s == 25.0


def test_one_good_window_is_no_recovery() -> None:
    assert _case(_run("wrong", 5, 40)).recovered_s == 45.0


def test_who_falls_back_had_not_recovered() -> None:
    assert _case(_run("wrong", 20, 40)).recovered_s == 45.0


def test_a_run_that_never_recovers_has_no_time() -> None:
    case = _case(_run("wrong", 0, 90))
    assert case.recovered_s is None
    assert not next(bar for bar in bars_of(case) if bar.unit == "s").is_met


def test_goodput_after_the_minute_is_held_to_the_best_splits() -> None:
    assert _case(_run("wrong", 0, 20)).later_share == 1.0
    assert _case(_run("wrong", 0, 75)).later_share == 0.5


def test_windows_count_requests_by_their_arrival() -> None:
    case = _case(_run("wrong", 0, 20))
    assert case.goodput(case.best)[0] == (2.5, 2.0)
    assert len(case.goodput(case.best)) == 18


def test_what_is_stuck_is_compared_in_its_own_second_half() -> None:
    assert _case(_run("wrong", 0, 0), _run("stuck", 0, 30, seconds=40)).stuck_share() == pytest.approx(0.5, abs=0.03)


def test_a_failed_request_misses_the_bar() -> None:
    wrong = Run("wrong", "2+1", (Sent(0.0, False, True),), (RoleChange(3.0, "p-0", "decode"),))
    bars = {bar.what: bar for bar in bars_of(_case(wrong))}
    assert bars["requests that failed"].value == 1 and not bars["requests that failed"].is_met
    assert bars["role changes"].value == 1
