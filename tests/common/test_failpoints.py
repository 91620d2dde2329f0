"""Faults on demand: what is refused, what counts, and that one file is one fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvferry.common import failpoints
from kvferry.common.errors import ConfigError
from kvferry.common.failpoints import Entry, Failpoints, parse


def test_an_entry_names_worker_point_action_count_and_value() -> None:
    text = "prefill.chunk=kill@3, d-0/decode.step=exit@*:417,kv.corrupt=flip"
    assert parse(text) == [
        Entry(None, "prefill.chunk", "kill", 3, None),
        Entry("d-0", "decode.step", "exit", None, 417),
        Entry(None, "kv.corrupt", "flip", 1, None),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("prefill.chunk", "expected"),
        ("prefill.chunk=kill@0", "expected"),
        ("prefill.chunk=kill@x", "expected"),
        ("prefill.chunk=kill:tok", "expected"),
        ("prefil.chunk=kill", "unknown point"),
        ("prefill.chunk=explode", "unknown action"),
        ("d 0/prefill.chunk=kill", "expected"),
    ],
)
def test_what_would_never_act_is_refused_with_what_is_known(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse(text)


def test_nothing_is_armed_without_the_variable() -> None:
    failpoints.arm("", "d-0")
    assert not failpoints.armed
    assert not failpoints.hit("kv.corrupt")


def test_a_point_acts_at_its_count_alone() -> None:
    points = Failpoints("kv.corrupt=flip@3", "d-0")
    assert [points.hit("kv.corrupt") for _ in range(5)] == [False, False, True, False, False]


def test_a_star_acts_at_each_hit_that_carries_the_value() -> None:
    points = Failpoints("decode.step=flip@*:7", "d-0")
    assert [points.hit("decode.step", values) for values in ([1, 7], [1], [], [7])] == [True, False, False, True]


def test_who_is_slow_waits_and_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    assert Failpoints("decode.step=slow@*", "d-0").hit("decode.step")
    assert len(slept) == 1


def test_only_hits_with_the_value_are_counted() -> None:
    points = Failpoints("decode.step=flip@2:7", "d-0")
    assert [points.hit("decode.step", values) for values in ([7], [1], [7])] == [False, False, True]


def test_an_entry_of_another_worker_has_no_effect() -> None:
    points = Failpoints("d-1/kv.corrupt=flip@*", "d-0")
    assert not points.hit("kv.corrupt")
    assert Failpoints("d-1/kv.corrupt=flip@*", "d-1").hit("kv.corrupt")


def test_a_file_that_comes_later_arms_and_is_taken_away_by_the_one_that_acts(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    first, second = (Failpoints(f"@{file}", name) for name in ("d-0", "d-1"))
    assert not first.hit("kv.corrupt")
    file.write_text("kv.corrupt=flip@2")
    hits = [points.hit("kv.corrupt") for points in (first, second, first, second)]
    assert hits == [False, False, True, False]
    assert not file.exists()
    assert not any(points.hit("kv.corrupt") for points in (first, second))


def test_counting_begins_anew_with_each_file(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    points = Failpoints(f"@{file}", "d-0")
    for _ in range(2):
        replacement = tmp_path / "next"
        replacement.write_text("kv.corrupt=flip@2")
        replacement.rename(file)
        assert [points.hit("kv.corrupt") for _ in range(3)] == [False, True, False]


def test_a_file_whose_point_acts_at_each_hit_stays(tmp_path: Path) -> None:
    file = tmp_path / "faults"
    file.write_text("kv.corrupt=flip@*")
    points = Failpoints(f"@{file}", "d-0")
    assert points.hit("kv.corrupt") and points.hit("kv.corrupt") and file.exists()


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -signal.SIGKILL), ("exit", failpoints.EXIT_CODE), ("raise", 7), ("memory", 9)]
)
def test_an_action_ends_the_process_in_its_own_way(action: str, code: int) -> None:
    program = (
        "import sys\n"
        "from kvferry.common import failpoints\n"
        f"failpoints.arm('decode.step={action}', 'd-0')\n"
        "try:\n"
        "    failpoints.hit('decode.step')\n"
        "except failpoints.Failpoint:\n"
        "    sys.exit(7)\n"
        "except MemoryError:\n"
        "    sys.exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == code


def test_a_stopped_process_goes_on_when_it_is_continued() -> None:
    program = (
        "from kvferry.common import failpoints\n"
        "failpoints.arm('decode.step=stop', 'd-0')\n"
        "failpoints.hit('decode.step')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 0
