from __future__ import annotations

import math

import pytest

from kvferry.tools.load.options import parse_options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trace-scale", "inf"), "argument --trace-scale: inf is not finite"),
        (("--trace-scale", "nan"), "argument --trace-scale: nan is not above 0"),
        (("--timeout", "1e999"), "argument --timeout: 1e999 is not finite"),
        (("--num-warmups", "-1"), "argument --num-warmups: -1 is below 0"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(
    words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_options(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_requests_can_come_all_at_once_and_without_warmup() -> None:
    options = parse_options(["--request-rate", "inf", "--num-warmups", "0"])
    assert options.request_rate == math.inf
    assert options.num_warmups == 0
