from dataclasses import replace

from kvferry.benchmarks.batches.batches import KillResult, Pair, bars_of
from kvferry.benchmarks.shared.bars import exit_code

KILLED = KillResult(500, 160, 500, 0, 0, "completed", 100.0)
PAIRS = [Pair([0.1, 0.2], [0.104, 0.2], 30), Pair([0.1, 0.1], [0.105, 0.1], 40)]


def test_lines_and_first_tokens_are_held_to_their_bars() -> None:
    assert exit_code(bars_of(KILLED, PAIRS)) == 0
    slow = [Pair(pair.alone_s, [1.06 * value for value in pair.alone_s], 30) for pair in PAIRS]
    for killed, pairs, missed in (
        (KILLED, slow, "median ratio of equal requests, beside / alone"),
        (replace(KILLED, num_answered=499), PAIRS, "lines without an answer"),
        (replace(KILLED, num_doubled=1), PAIRS, "lines answered twice"),
        (replace(KILLED, num_failed=1), PAIRS, "lines that failed"),
    ):
        bars = bars_of(killed, pairs)
        assert [bar.what for bar in bars if not bar.is_met] == [missed]
        assert exit_code(bars) == 1
