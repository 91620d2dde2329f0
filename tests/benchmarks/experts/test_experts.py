from kvferry.benchmarks.experts.experts import Report, Row
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.benchmarks.shared.rates import MeasuredRates
from kvferry.tools.load.environment import describe_environment


def _report(*rows: Row) -> Report:
    rates = MeasuredRates(1e12, 1e10, "m", "r")
    return Report("m", "r", "none", 1, 128, rates, rows, (), 40, describe_environment("experts", []))


def test_every_number_of_rows_is_held_to_the_bar() -> None:
    assert exit_code(_report(Row(1, 1.2, 1.0), Row(8, 1.1, 1.0)).bars()) == 0
    assert exit_code(_report(Row(1, 1.0, 1.0), Row(8, 1.3, 1.0)).bars()) == 1
    assert exit_code(_report(Row(8, 5.0, 1.0)).bars()) == 1
