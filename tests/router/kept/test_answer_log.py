"""A log gives back what was told before a process died, whatever it left of the last record."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.request import SampledToken
from kvferry.router.kept import answer_log
from kvferry.router.kept.answer_log import AnswerLog, Head, Told

HEAD = Head(b"asked", "m", "name", 7, (1, 2**63 - 1), (16, 4))
TOLD = [
    Told(0, (SampledToken(5), SampledToken(6, -0.5, ((6, -0.5), (9, -1.5))))),
    Told(1, (), "stop"),
    Told(0, (SampledToken(7, float("-inf")),), "length"),
]


@contextmanager
def opened(path: Path) -> Iterator[AnswerLog]:
    log = AnswerLog(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND))
    yield log
    log.close()


def written(path: Path) -> bytes:
    with opened(path) as log:
        log.begin(HEAD)
        for told in TOLD:
            log.add(told)
    return path.read_bytes()


def test_what_was_told_is_read_again(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as log:
        assert log.head is None and log.told == []
    written(tmp_path / "a")
    with opened(tmp_path / "a") as log:
        assert (log.head, log.told, sum(len(portion.tokens) for portion in log.told)) == (HEAD, TOLD, 3)


def test_a_log_that_was_cut_anywhere_goes_on_behind_its_last_whole_record(tmp_path: Path) -> None:
    data = written(tmp_path / "whole")
    seen = set()
    for end in range(len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:end])
        with opened(path) as log:
            assert log.told == TOLD[: len(log.told)] and log.head in (None, HEAD)
            seen.add((log.head is not None, len(log.told)))
            before = log.told
            if log.head is None:
                log.begin(HEAD)
            log.add(TOLD[-1])
        with opened(path) as log:
            assert (log.head, log.told) == (HEAD, [*before, TOLD[-1]])
    assert seen == {(False, 0), *((True, number) for number in range(len(TOLD) + 1))}


@given(st.binary(max_size=200), st.integers(0, 2**31))
def test_what_is_no_log_is_emptied(tmp_path_factory: pytest.TempPathFactory, data: bytes, place: int) -> None:
    path = tmp_path_factory.mktemp("log") / "a"
    whole = written(path)
    at = place % len(whole)
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    with opened(path) as log:
        assert log.told == TOLD[: len(log.told)] and log.head in (None, HEAD)
    path.write_bytes(data)
    with opened(path) as log:
        assert log.head is None and log.told == [] and path.stat().st_size == 0


def test_a_record_of_another_shape_empties_the_log(tmp_path: Path) -> None:
    data = written(tmp_path / "a")
    first = 8 + int.from_bytes(data[:4], "little")
    (tmp_path / "a").write_bytes(data[:first] + data[:first])  # a head where something was told
    with opened(tmp_path / "a") as log:
        assert log.head is None and log.num_bytes == 0
    assert (tmp_path / "a").read_bytes() == b""


def test_an_answer_may_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "MAX_BYTES", 200)
    with opened(tmp_path / "a") as log:
        log.begin(HEAD)
        with pytest.raises(OSError, match="more than 200 bytes"):
            for _ in range(100):
                log.add(TOLD[0])
    assert (tmp_path / "a").stat().st_size <= 200
