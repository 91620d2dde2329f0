"""Matchers are derived from a sequence's tokens: whatever happened to it, its mask is that of its answer."""

from __future__ import annotations

from collections.abc import Sequence as TokenIds

import pytest

from kvferry.common.batch import BatchRow
from kvferry.common.grammar import GrammarBroken
from kvferry.common.request import FinishReason, RequestId, SamplingParams, Sequence, finish_reason
from kvferry.engine import masks
from kvferry.engine.masks import find_mask, forced_after, next_mask


class _Matcher:
    """Its mask is what it has taken."""

    def __init__(self, log: list[TokenIds[int]]) -> None:
        self._taken = b""
        self._log = log

    def accept(self, token_ids: TokenIds[int]) -> None:
        if 99 in token_ids:
            raise GrammarBroken("99")
        self._log.append(list(token_ids))
        self._taken += bytes(token_ids)

    def rollback(self, num_tokens: int) -> None:
        self._taken = self._taken[:-num_tokens] if num_tokens else self._taken

    def mask(self) -> bytes:
        return self._taken

    def forced(self) -> int | None:
        """Two tokens force the two that follow them."""
        last = self._taken[-1:]
        return last[0] + 1 if last and last[0] % 10 in (5, 6) else None


class _Grammar:
    failure = ""
    is_costly = False

    def __init__(self, *, is_ready: bool = True, is_late: bool = False) -> None:
        self.is_ready = is_ready
        self.is_late = is_late
        self.log: list[TokenIds[int]] = []
        self.num_made = 0

    def matcher(self) -> _Matcher:
        self.num_made += 1
        return _Matcher(self.log)


def _sequence(grammar: _Grammar | None, *output: int) -> Sequence:
    return Sequence(RequestId("r"), 0, 0, [7, 8, *output], 2, SamplingParams(), grammar=grammar)


def test_without_a_grammar_there_is_no_mask() -> None:
    assert next_mask(_sequence(None, 1)) is None


def test_one_matcher_takes_each_token_once() -> None:
    grammar = _Grammar()
    seq = _sequence(grammar)
    assert next_mask(seq) == b""
    for token in (1, 2, 3):
        seq.token_ids.append(token)
        assert next_mask(seq) == next_mask(seq) == bytes(range(1, token + 1))
    assert grammar.num_made == 1 and grammar.log == [[1], [2], [3]]


def test_a_resumed_answer_is_replayed_token_by_token() -> None:
    """Other threads run Python between two."""
    grammar = _Grammar()
    assert next_mask(_sequence(grammar, 1, 2, 3)) == bytes((1, 2, 3))
    assert grammar.log == [[1], [2], [3]]


def test_a_mask_that_takes_too_long_ends_its_row_before_its_token_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MOST_S", -1.0)
    grammar = _Grammar()
    row = BatchRow(_sequence(grammar, 1), 1)
    found = find_mask(row)
    assert found is not None and "too ambiguous" in found.failure and grammar.log == [[1]]
    monkeypatch.undo()
    assert find_mask(row) == found, "its row was postponed meanwhile: the mask was late"


def test_a_matcher_that_is_ahead_of_its_answer_is_made_anew() -> None:
    grammar = _Grammar()
    seq = _sequence(grammar, 1, 2, 3)
    next_mask(seq)
    del seq.token_ids[-2:]
    assert next_mask(seq) == bytes((1,)) and grammar.num_made == 2


def test_a_token_that_does_not_fit_is_told() -> None:
    with pytest.raises(GrammarBroken):
        next_mask(_sequence(_Grammar(), 1, 99))


@pytest.mark.parametrize("params", [SamplingParams(min_tokens=9), SamplingParams(ignore_eos=True)])
def test_an_end_token_ends_an_answer_that_follows_a_grammar_whatever_else_is_asked(params: SamplingParams) -> None:
    for follows_grammar, reason in ((True, FinishReason.STOP), (False, None)):
        found = finish_reason(
            params,
            1,
            num_output_tokens=2,
            num_tokens=5,
            eos_token_ids=frozenset({1}),
            max_model_len=99,
            follows_grammar=follows_grammar,
        )
        assert found is reason


def test_a_sequence_waits_until_its_grammar_is_ready_unless_it_does_not_sample() -> None:
    assert _sequence(_Grammar()).can_sample and _sequence(None).can_sample
    waiting, unsampled = _sequence(_Grammar(is_ready=False)), _sequence(_Grammar(is_ready=False))
    unsampled.samples = False
    assert not waiting.can_sample and unsampled.can_sample
    late = _sequence(_Grammar(is_ready=False, is_late=True))
    assert [seq.num_computable_tokens for seq in (waiting, unsampled, late)] == [0, 2, 1]


def _forced(seq: Sequence, token_id: int) -> tuple[int, ...]:
    next_mask(seq)
    return forced_after(seq, (token_id,))


def test_tokens_without_another_choice_follow_the_one_that_was_drawn() -> None:
    grammar = _Grammar()
    seq = _sequence(grammar, 1)
    assert _forced(seq, 15) == (16, 17)
    seq.token_ids += (15, 16, 17)
    assert next_mask(seq) == bytes((1, 15, 16, 17)) and grammar.num_made == 1
    assert _forced(seq, 2) == ()


def test_forced_tokens_that_were_not_taken_are_forgotten() -> None:
    grammar = _Grammar()
    seq = _sequence(grammar, 1)
    assert _forced(seq, 15) == (16, 17)
    seq.token_ids += (15, 16)
    assert next_mask(seq) == bytes((1, 15, 16)) and grammar.num_made == 2
    assert forced_after(seq, (17,)) == ()


def test_nothing_is_forced_where_it_takes_long_to_match_a_token() -> None:
    grammar = _Grammar()
    grammar.is_costly = True
    seq = _sequence(grammar, 1)
    assert _forced(seq, 15) == () and grammar.log == [[1]], "the engine's thread has matched nothing"
    seq.token_ids.append(15)
    assert next_mask(seq) == bytes((1, 15)) and grammar.num_made == 1


def test_nothing_is_forced_behind_a_mask_that_took_long() -> None:
    grammar = _Grammar()
    seq = _sequence(grammar, 1)
    seq.mask_s = 2 * masks.QUICK_S
    assert _forced(seq, 15) == () and grammar.log == [[1]]


def test_a_drawn_token_that_does_not_fit_forces_nothing() -> None:
    assert _forced(_sequence(_Grammar(), 1), 99) == ()


def test_an_end_is_forced_though_no_matcher_takes_it() -> None:
    class Ending(_Matcher):
        def forced(self) -> int | None:
            return 99

    grammar = _Grammar()
    seq = _sequence(grammar, 1)
    next_mask(seq)
    seq.matcher = Ending([])
    assert forced_after(seq, (2,)) == (99,)
    assert next_mask(seq) == bytes((1,)), "a matcher that is broken is not asked again"


def test_tokens_with_log_probabilities_are_not_forced() -> None:
    seq = _sequence(_Grammar(), 1)
    seq.sampling = SamplingParams(logprobs=0)
    assert _forced(seq, 15) == ()
