"""The request's state machine, its tokens and its stream."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import InvalidTransition
from kvferry.common.grammar import CheckedGrammar, Grammar
from kvferry.common.request import SampledToken, SamplingParams, unpack_ids
from kvferry.router.state.choice_state import MAX_EARLY_TOKENS, ChoiceState
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.results import ChoiceTokens

S = RequestStatus
EDGES = {
    S.QUEUED: {S.RESERVED, S.PREFILLING, S.FINISHED, S.ABORTED, S.FAILED},
    S.RESERVED: {S.QUEUED, S.PREFILLING, S.FINISHED, S.ABORTED, S.FAILED},
    S.PREFILLING: {S.QUEUED, S.DECODING, S.FINISHED, S.ABORTED, S.FAILED},
    S.DECODING: {S.QUEUED, S.FINISHED, S.ABORTED, S.FAILED},
    S.FINISHED: set(),
    S.ABORTED: set(),
    S.FAILED: set(),
}


def make(n: int = 1, max_tokens: int = 8) -> RouterRequest:
    return RouterRequest("r-0", [1, 2, 3], SamplingParams(max_tokens=max_tokens), n=n)


def update(first: int, number: int, finish: str | None = None, choice: int = 0) -> ChoiceTokens:
    return ChoiceTokens(choice, first, tuple(SampledToken(100 + first + i) for i in range(number)), finish)


def ids(state: ChoiceState) -> list[int]:
    return [token.token_id - 100 for token in state.tokens]


@pytest.mark.parametrize("start", list(S))
@pytest.mark.parametrize("to", list(S))
def test_every_edge_is_in_the_table_and_no_other(start: RequestStatus, to: RequestStatus) -> None:
    request = make()
    request.status = start
    if to in EDGES[start]:
        request.advance(to, 1.0)
        assert request.status is to
    else:
        with pytest.raises(InvalidTransition, match=f"{start.name} -> {to.name}"):
            request.advance(to, 1.0)
        assert request.status is start


def test_the_mask_of_first_tokens_is_of_no_answer_that_goes_on() -> None:
    request = make()
    assert request.first_mask == b""
    request.grammar = CheckedGrammar(Grammar("json_object", b""), b"mask")
    assert request.first_mask == b"mask"
    request.choices[0].accept(update(0, 1))
    assert request.first_mask == b""


def test_the_phases_before_the_first_token_are_those_of_its_attempt() -> None:
    request = make()
    for to, at_s in ((S.RESERVED, 1.0), (S.QUEUED, 2.0), (S.RESERVED, 3.0), (S.PREFILLING, 4.0)):
        request.advance(to, at_s)
    request.timestamps["first_token"] = 5.0
    for to, at_s in ((S.QUEUED, 6.0), (S.RESERVED, 7.0), (S.PREFILLING, 8.0), (S.DECODING, 9.0), (S.FINISHED, 10.0)):
        request.advance(to, at_s)
    assert request.timestamps == {
        "reserved": 3.0,
        "prefill_start": 4.0,
        "first_token": 5.0,
        "arrived": 9.0,
        "finished": 10.0,
    }


def test_early_tokens_are_kept_up_to_a_bound() -> None:
    state = ChoiceState(1000)
    drops = state.accept(update(1, MAX_EARLY_TOKENS + 2))
    assert drops.overflow == 2 and state.tokens == [] and state.has_gap
    state.accept(update(0, 1))
    assert ids(state) == list(range(MAX_EARLY_TOKENS + 1)) and not state.has_gap


def test_nothing_is_accepted_after_the_finish_reason() -> None:
    state = ChoiceState(1000)
    state.accept(update(0, 2, "stop"))
    drops = state.accept(update(2, 1))
    assert ids(state) == [0, 1] and state.finish == "stop" and drops.overflow == 1


def test_a_finish_that_comes_early_waits_for_its_tokens() -> None:
    state = ChoiceState(1000)
    state.accept(update(1, 0, "length"))
    assert (state.finish, state.has_gap) == (None, True)
    state.accept(update(0, 1))
    assert (state.finish, state.has_gap) == ("length", False)


def test_a_worker_cannot_send_more_than_max_tokens() -> None:
    state = ChoiceState(2)
    assert state.accept(update(0, 5)).overflow == 3
    assert ids(state) == [0, 1]


def test_a_new_attempt_forgets_what_came_early() -> None:
    state = ChoiceState(100)
    state.accept(update(0, 1))
    state.accept(update(3, 2, "stop"))
    state.forget_early()
    state.accept(update(1, 2))
    assert ids(state) == [0, 1, 2] and state.finish is None
    state.accept(update(3, 3))
    assert ids(state) == [0, 1, 2, 3, 4, 5] and state.finish is None


@pytest.mark.slow
@given(st.data())
def test_any_order_of_pieces_gives_every_index_once(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, total))) | {0, total})
    pieces = [update(a, b - a, "stop" if b == total else None) for a, b in itertools.pairwise(cuts)]
    doubled = data.draw(st.lists(st.sampled_from(pieces), max_size=5))
    state = ChoiceState(100)
    for piece in data.draw(st.permutations(pieces + doubled)):
        state.accept(piece)
        assert ids(state) == list(range(len(state.tokens)))
    assert len(state.tokens) == total and state.finish == "stop"


def test_a_spec_holds_the_unfinished_choices_with_their_tokens() -> None:
    request = make(n=3)
    assert request.spec(None).outputs == () and request.spec(2.5).remaining_s == 2.5
    request.choices[0].accept(update(0, 1, "stop"))
    request.choices[2].accept(update(0, 2))
    request.attempt_number = 4
    spec = request.spec(None)
    assert spec.choices == (1, 2) and spec.attempt == 4 and unpack_ids(spec.prompt) == [1, 2, 3]
    assert [spec.output_token_ids(i) for i in range(2)] == [[], [100, 101]]


def make_stream(request: RouterRequest) -> TokenStream:
    return TokenStream(request, lambda: None, lambda choice: None)


def test_choices_take_turns_and_tokens_of_one_update_are_joined() -> None:
    request = make(n=2)
    stream = make_stream(request)
    for choice in (0, 1):
        request.choices[choice].accept(update(0, 1, choice=choice))
        request.choices[choice].accept(update(1, 2, choice=choice))
    first, second = stream.next_nowait(), stream.next_nowait()
    assert first is not None and (first.choice, len(first.tokens)) == (0, 3)
    request.choices[0].accept(update(3, 1))
    assert second is not None and (second.choice, len(second.tokens)) == (1, 3)
    third = stream.next_nowait()
    assert third is not None and third.choice == 0 and stream.next_nowait() is None


def test_a_held_stream_yields_nothing_until_it_is_let_go_or_the_request_ends() -> None:
    request = make()
    stream = make_stream(request)
    stream.is_held = True
    request.choices[0].accept(update(0, 1))
    assert stream.next_nowait() is None
    request.advance(S.FAILED, 1.0)
    assert stream.next_nowait() is not None


async def test_a_stream_ends_after_every_finish_reason_was_yielded() -> None:
    request = make(n=2)
    stream = make_stream(request)
    request.choices[0].accept(update(0, 1, "stop"))
    request.choices[1].accept(update(0, 0, "length", choice=1))
    finishes = [(u.choice, u.finish) async for u in stream]
    assert finishes == [(0, "stop"), (1, "length")]


def test_an_end_that_is_taken_in_parts_comes_with_the_last_one() -> None:
    request = make()
    stream = make_stream(request)
    request.choices[0].accept(update(0, 5, "stop"))
    parts = [(len(one.tokens), one.finish) for _ in range(3) for one in stream.take(2)]
    assert parts == [(2, None), (2, None), (1, "stop")] and stream.is_exhausted()


def test_choices_take_turns_where_little_is_taken() -> None:
    request = make(n=2)
    stream = make_stream(request)
    for choice in (0, 1):
        request.choices[choice].accept(update(0, 4, choice=choice))
    assert [one.choice for _ in range(4) for one in stream.take(2)] == [0, 1, 0, 1]


def test_a_held_stream_has_no_middle() -> None:
    request = make()
    stream = make_stream(request)
    request.choices[0].accept(update(0, 2))
    assert len(stream.middle(9)) == 2
    stream.is_held = True
    assert not stream.middle(9)
