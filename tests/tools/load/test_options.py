from __future__ import annotations

import math
from pathlib import Path

import pytest

from kvferry.tools.load.options import parse_options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--trace-scale", "inf"), "argument --trace-scale: inf is not finite"),
        (("--trace-scale", "nan"), "argument --trace-scale: nan is not above 0"),
        (("--timeout", "1e999"), "argument --timeout: 1e999 is not finite"),
        (("--timeout", "1e-320"), "argument --timeout: 1e-320 is not from 1e-300 to 1e+300"),
        (("--timeout", "1e308"), "argument --timeout: 1e308 is not from 1e-300 to 1e+300"),
        (("--temperature", "nan"), "argument --temperature: nan is not finite"),
        (("--temperature", "1e999"), "argument --temperature: 1e999 is not finite"),
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


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures"
    figures.write_text("")
    for path, why in (
        (tmp_path, "is a directory"),
        (figures / "x.svg", f"{figures} is no directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(SystemExit) as ended:
            parse_options([flag, str(path)])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    assert parse_options(["--json", str(figures)]).json_path == figures


def test_files_may_lie_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parse_options(["--json=~/run.json", "--trace=~/trace.csv"])
    assert (options.json_path, options.trace) == (tmp_path / "run.json", tmp_path / "trace.csv")
    for flag in ("--json", "--trace"):
        for path in ("~no-such-user/x", ""):
            with pytest.raises(SystemExit):
                parse_options([f"{flag}={path}"])
            assert f"argument {flag}: {path!r} is no path on this machine" in capsys.readouterr().err
