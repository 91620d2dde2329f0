"""Stop strings: what is shown, whatever the pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.router.api.stops import StopMatcher


def _shown(text: str, stops: tuple[str, ...], cuts: list[int], *, include_stop: bool = False) -> tuple[str, str | None]:
    """All that `text`, cut at `cuts`, shows, and what stopped it."""
    matcher = StopMatcher(stops, include_stop=include_stop)
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    shown = ""
    for start, end in itertools.pairwise(bounds):
        shown += matcher.push(text[start:end])
        if matcher.matched is not None:
            return shown, matcher.matched
    return shown + matcher.release(), None


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("world",))
    assert matcher.push("Hello, wor") == "Hello, "
    assert matcher.push("k, w") == "work, "
    assert matcher.push("orld!") == ""
    assert matcher.matched == "world"


def test_held_text_is_released_at_the_end() -> None:
    matcher = StopMatcher(("END",))
    assert matcher.push("the EN") == "the "
    assert matcher.release() == "EN"
    assert matcher.release() == ""


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "ab")])
def test_a_stop_string_is_shown_only_on_request(include: bool, shown: str) -> None:
    assert _shown("abc", ("b",), [], include_stop=include) == (shown, "b")


def test_the_match_that_ends_first_wins() -> None:
    assert _shown("xabcd", ("abcd", "bc"), []) == ("xa", "bc")


def test_of_matches_that_end_together_the_longest_wins() -> None:
    assert _shown("xabc", ("c", "abc"), []) == ("x", "abc")


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4).map(tuple),
    cuts=st.lists(st.integers(0, 100), max_size=8),
    include_stop=st.booleans(),
)
def test_the_result_does_not_depend_on_the_pieces(
    text: str, stops: tuple[str, ...], cuts: list[int], include_stop: bool
) -> None:
    assert _shown(text, stops, cuts, include_stop=include_stop) == _shown(
        text, stops, list(range(len(text))), include_stop=include_stop
    )
    shown, matched = _shown(text, stops, cuts)
    if matched is None:
        assert shown == text and not any(stop in text for stop in stops)
    else:
        assert text.startswith(shown + matched)
        assert not any(stop in shown for stop in stops)
