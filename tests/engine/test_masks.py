"""Matchers are derived from a sequence's tokens: whatever happened to it, its mask is that of its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence as TokenIds
from types import SimpleNamespace

import msgspec
import pytest

from kvferry.common.batch import Batch, BatchRow, GrammarMask, RowOutput
from kvferry.common.grammar import Grammar, GrammarBroken
from kvferry.common.request import (
    FinishReason,
    RequestId,
    RequestSpec,
    SampledToken,
    SamplingParams,
    Sequence,
    finish_reason,
    pack_ids,
)
from kvferry.engine import masks
from kvferry.engine.masks import find_mask, forced_after, next_mask, with_forced, with_masks_heeded


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
    assert "too ambiguous" in found.failure and grammar.log == [[1]]
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
def test_an_end_token_ends_an_answer_that_a_grammar_ends_whatever_else_is_asked(params: SamplingParams) -> None:
    for ends_by_grammar, reason in ((True, FinishReason.STOP), (False, None)):
        found = finish_reason(
            params,
            1,
            num_output_tokens=2,
            num_tokens=5,
            eos_token_ids=frozenset({1}),
            max_model_len=99,
            ends_by_grammar=ends_by_grammar,
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


def test_no_more_are_forced_at_once_than_a_step_has_room_for() -> None:
    class Endless(_Matcher):
        def forced(self) -> int | None:
            return 1

    seq = _sequence(_Grammar())
    seq.matcher = Endless([])
    assert forced_after(seq, (2,)) == (1,) * masks.MAX_FORCED


def test_rows_go_on_with_forced_tokens_where_one_answer_was_drawn_by_a_grammar() -> None:
    plain, several, silent, stopped = (_sequence(_Grammar(), 1) for _ in range(4))
    several.pending_choices, silent.samples = (0, 1), False
    run = (SampledToken(15),)
    rows = [(plain, (run,)), (several, (run, run)), (silent, ()), (stopped, ()), (_sequence(None, 1), (run,))]
    for seq, _ in rows[:4]:
        next_mask(seq)
    batch = Batch([BatchRow(seq, seq.num_tokens) for seq, _ in rows])
    outputs = with_forced(batch, [RowOutput(runs) for _, runs in rows])
    assert [output.forced for output in outputs] == [(16, 17), (), (), (), ()]
    assert [output.runs for output in outputs] == [runs for _, runs in rows]


def test_tokens_with_log_probabilities_are_not_forced() -> None:
    seq = _sequence(_Grammar(), 1)
    seq.sampling = SamplingParams(logprobs=0)
    assert _forced(seq, 15) == ()


@pytest.mark.parametrize(("kind", "ends"), [("regex", True), ("json_schema", True), ("tokens", False), ("any", False)])
def test_grammars_of_texts_end_their_answers_and_those_of_tokens_do_not(kind: str, ends: bool) -> None:
    spec = RequestSpec(
        request_id="r", attempt=0, prompt=pack_ids([5]), sampling=SamplingParams(), grammar=Grammar(kind, b"")
    )
    assert Sequence.of(spec, 0).ends_by_grammar is ends
    assert not Sequence.of(msgspec.structs.replace(spec, grammar=None), 0).ends_by_grammar


_TOO_MUCH = GrammarBroken("it is too much")


class _Panic(BaseException):
    """As the library's, which is no Exception."""


class _Wide(_Matcher):
    """All tokens may come at every place; a mask takes its thread so many seconds."""

    words = b"\xff" * 16

    def __init__(self, clock: list[float], mask_s: float, breaks_at: int, error: BaseException) -> None:
        super().__init__([])
        self._clock, self._mask_s, self._breaks_at, self._error = clock, mask_s, breaks_at, error

    def mask(self) -> bytes:
        if len(self._taken) >= self._breaks_at:
            raise self._error
        self._clock[0] += self._mask_s
        return self.words


def _found_behind(
    monkeypatch: pytest.MonkeyPatch,
    draft: tuple[int, ...],
    *,
    mask_s: float = 0.0,
    breaks_at: int = 99,
    error: BaseException = _TOO_MUCH,
) -> tuple[GrammarMask, Sequence]:
    """Look for the masks of a draft in a thread that has a second."""
    clock, seq = [0.0], _sequence(_Grammar())
    monkeypatch.setattr(masks, "time", SimpleNamespace(thread_time=lambda: clock[0]))
    monkeypatch.setattr(masks, "MOST_S", math.inf)
    seq.matcher = _Wide(clock, mask_s, breaks_at, error)
    mask = find_mask(BatchRow(seq, 1 + len(draft), draft), 1.0)
    assert not mask.failure
    return mask, seq


@pytest.mark.parametrize(("mask_s", "num_behind"), [(0.0, 4), (0.2, 4), (0.3, 2), (0.5, 1), (0.6, 0), (9.0, 0)])
def test_masks_behind_a_draft_are_looked_for_while_there_is_time(
    monkeypatch: pytest.MonkeyPatch, mask_s: float, num_behind: int
) -> None:
    mask, seq = _found_behind(monkeypatch, (5, 6, 7, 8), mask_s=mask_s)
    assert len(mask.behind_draft) == num_behind
    assert isinstance(seq.matcher, _Wide) and not seq.matcher._taken, "the matcher stands where it stood"


@pytest.mark.parametrize(
    ("draft", "num_behind"), [((0, 127, 5), 3), ((5, 128, 6), 1), ((-1, 5), 0), ((9, 5), 0), ((5, 9, 6), 1)]
)
def test_masks_behind_a_draft_end_at_a_token_that_may_not_come(
    monkeypatch: pytest.MonkeyPatch, draft: tuple[int, ...], num_behind: int
) -> None:
    """Of 128 tokens, of which one may not."""
    monkeypatch.setattr(_Wide, "words", (~(1 << 9) & (1 << 128) - 1).to_bytes(16, "little"))
    mask, _ = _found_behind(monkeypatch, draft)
    assert len(mask.behind_draft) == num_behind


@pytest.mark.parametrize("breaks_at", [1, 2, 3])
@pytest.mark.parametrize("error", [_TOO_MUCH, _Panic()])
def test_a_grammar_that_fails_behind_a_draft_fails_where_the_answer_comes_so_far(
    monkeypatch: pytest.MonkeyPatch, breaks_at: int, error: BaseException
) -> None:
    mask, seq = _found_behind(monkeypatch, (5, 6, 7), breaks_at=breaks_at, error=error)
    assert len(mask.behind_draft) == breaks_at - 1 and not seq.grammar_failure
    assert next_mask(seq) == b"", "a matcher that is broken is not asked again"


def test_a_mask_without_tokens_is_a_failure() -> None:
    seq = _sequence(_Grammar())
    seq.matcher = _Matcher([])
    assert "no token of the vocabulary" in find_mask(BatchRow(seq, 1)).failure


def test_what_was_drawn_without_a_mask_does_not_count() -> None:
    def heeded(num_behind: int, *runs: tuple[int, ...]) -> list[list[int]]:
        row = BatchRow(_sequence(_Grammar()), 2)
        batch = Batch([row], masks=lambda: [GrammarMask(b"\xff", behind_draft=(b"\xff",) * num_behind)])
        [output] = with_masks_heeded(batch, [RowOutput(tuple(tuple(map(SampledToken, run)) for run in runs))])
        return [[token.token_id for token in run] for run in output.runs]

    assert heeded(0, (5, 6, 7)) == [[5]] and heeded(1, (5, 6, 7)) == [[5, 6]]
    assert heeded(2, (5, 6, 7)) == [[5, 6, 7]] and heeded(4, (5, 6)) == [[5, 6]]
    assert heeded(0, (5,), (6,)) == [[5], [6]], "several choices of one prompt have its mask"
