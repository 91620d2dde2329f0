from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.tools.load.sse import EventSplitter

STREAM = b'data: {"a": 1}\n\n: comment\n\ndata: first line\ndata: second line\n\nevent: x\r\ndata: [DONE]\r\n\r\n'
EVENTS = [b'{"a": 1}', b"first line\nsecond line", b"[DONE]"]


def test_whole_stream_gives_its_events_in_order() -> None:
    assert EventSplitter().push(STREAM) == EVENTS


@pytest.mark.slow
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    splitter = EventSplitter()
    edges = [0, *sorted(cuts), len(STREAM)]
    events = [event for start, end in itertools.pairwise(edges) for event in splitter.push(STREAM[start:end])]
    assert events == EVENTS


@pytest.mark.parametrize("unfinished", [b"data: x", b"data: x\n"])
def test_event_without_its_empty_line_is_held_back(unfinished: bytes) -> None:
    splitter = EventSplitter()
    assert splitter.push(unfinished) == []
    assert splitter.push(b"\n\n") == [b"x"]
