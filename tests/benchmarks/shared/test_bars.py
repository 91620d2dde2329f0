import pytest

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.common.errors import ConfigError


def test_a_figure_at_most_its_bar_meets_it() -> None:
    assert Bar("ratio", 1.02, 1.02).is_met
    assert not Bar("ratio", 1.03, 1.02).is_met


def test_a_figure_at_least_its_bar_meets_it() -> None:
    assert Bar("share", 0.9, 0.9, at_least=True).is_met
    assert not Bar("share", 0.89, 0.9, at_least=True).is_met


def test_a_figure_that_could_not_be_measured_misses_its_bar() -> None:
    assert not Bar("share", None, 0.9, at_least=True).is_met


def test_a_figure_without_a_bar_is_only_shown() -> None:
    bar = Bar("TTFT", None, None)
    assert bar.is_met and bar.ratio is None


def test_the_ratio_is_of_the_bar() -> None:
    assert Bar("time", 30.0, 60.0).ratio == 0.5
    assert Bar("failed", 3, 0).ratio is None


def test_the_table_has_a_row_for_each() -> None:
    table = bar_table("bars", [Bar("a", 1234.5, 1, unit="ms", interval=(1.0, 2.0)), Bar("b", None, None)])
    assert table.row_count == 2
    assert list(table.columns[1].cells) == ["1,234 ms", "none"]


def test_one_missed_bar_is_the_exit_code_and_no_bar_is_no_success() -> None:
    met, missed, shown = Bar("a", 1, 2), Bar("b", None, 2), Bar("c", None, None)
    assert exit_code([met, shown]) == 0
    assert exit_code([met, missed, met]) == 1
    with pytest.raises(ConfigError, match="nothing was measured"):
        exit_code([])
