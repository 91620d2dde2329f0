from kvferry.benchmarks.restart.load import Tally
from kvferry.benchmarks.restart.restart import RestartResult, bars_of
from kvferry.benchmarks.shared.bars import exit_code


def test_a_failure_misses_the_bar_and_so_do_clients_that_asked_nothing() -> None:
    tally = Tally(num_requests=100, num_tokens=6400)
    result = RestartResult(2, 6, 30.0, 16.0, tally)
    assert exit_code(bars_of(result)) == 0
    tally.fail("no [DONE]")
    assert exit_code(bars_of(result)) == 1
    assert exit_code(bars_of(RestartResult(2, 6, 30.0, 16.0, Tally()))) == 1
