"""A journal that is cut anywhere, or wrong anywhere, keeps what came before, and goes on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.router.batches.journal import FinishedLine, Journal

TEXTS = st.binary(max_size=12).filter(lambda data: b"\n" not in data)
GROUPS = st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans(), TEXTS), max_size=3), max_size=3)


def first_of(lines: list[FinishedLine]) -> dict[int, tuple[bool, bytes]]:
    found: dict[int, tuple[bool, bytes]] = {}
    for each in lines:
        found.setdefault(each.line, (each.is_ok, each.answer))
    return found


def said_by(journal: Journal) -> dict[int, tuple[bool, bytes]]:
    answers = journal.answers(sorted(journal.places))
    return {line: (is_ok, answer) for line, answer, is_ok in answers if answer is not None}


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(GROUPS)
def test_cut_at_every_byte_it_keeps_a_beginning_and_goes_on(groups: list[list[tuple[int, bool, bytes]]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal")
        journal = Journal(path)
        written: list[FinishedLine] = []
        for group in groups:
            lines = [FinishedLine(*each) for each in {line: (line, ok, text) for line, ok, text in group}.values()]
            journal.append(lines)
            written += lines
        assert said_by(journal) == first_of(written) == said_by(Journal(path))
        data = path.read_bytes()
        order = list(first_of(written).items())
        for end in range(len(data) + 1):
            path.write_bytes(data[:end])
            cut = Journal(path)
            said = said_by(cut)
            assert list(said.items()) == sorted(order[: len(said)])
            assert path.stat().st_size <= end
            cut.append([FinishedLine(99, True, b"new")])
            assert said_by(Journal(path)) == {**said, 99: (True, b"new")}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_wrong_byte_ends_it(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "journal")
        Journal(path).append([FinishedLine(line, True, b"%d" % line * 9) for line in range(9)])
        whole = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        whole[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        said = said_by(Journal(path))
        assert sorted(said) == list(range(bytes(whole[:place]).count(b"\n")))
        assert all(answer == b"%d" % line * 9 for line, (_, answer) in said.items())
