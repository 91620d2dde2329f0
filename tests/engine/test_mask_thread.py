"""Masks that are late hold up nobody else: their rows yield nothing until they are known, and each is found once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as TokenIds

import pytest

from kvferry.common.batch import Batch, BatchRow, GrammarMask, RowOutput
from kvferry.common.request import RequestId, SampledToken, SamplingParams, Sequence
from kvferry.engine.mask_thread import MaskThread
from kvferry.engine.masks import QUICK_S, with_masks_heeded

HUNG_S = 30.0


class _Matcher:
    """Its mask comes when the gate is open: a word, and behind it how many tokens it has taken."""

    def __init__(self, gate: threading.Event, word: int) -> None:
        self._gate = gate
        self._word = bytes([word])
        self.num_users = self.num_masks = self.num_taken = 0

    def accept(self, token_ids: TokenIds[int]) -> None:
        self.num_taken += len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        self.num_taken -= num_tokens

    def mask(self) -> bytes:
        self.num_users += 1
        assert self.num_users == 1, "two threads use one matcher"
        assert self._gate.wait(HUNG_S)
        self.num_users -= 1
        self.num_masks += 1
        return self._word + bytes([self.num_taken] * (self.num_taken > 0))

    def forced(self) -> int | None:
        return None


class _Grammar:
    failure = ""
    is_ready = True
    is_late = False

    def __init__(self, word: int, *, is_open: bool = True, is_costly: bool = False) -> None:
        self.is_costly = is_costly
        self.gate = threading.Event()
        if is_open:
            self.gate.set()
        self.made = _Matcher(self.gate, word)

    def matcher(self) -> _Matcher:
        return self.made


def _row(grammar: _Grammar | None, num_tokens: int = 1, *, samples: bool = True) -> BatchRow:
    seq = Sequence(RequestId("r"), 0, 0, [7] * num_tokens, num_tokens, SamplingParams(), grammar=grammar)
    seq.samples = samples
    return BatchRow(seq, num_tokens)


def _begin(thread: MaskThread, rows: list[BatchRow], *, may_postpone: bool = True) -> Callable[[], object]:
    batch = Batch(rows, may_postpone=may_postpone)
    thread.begin(batch)
    assert batch.masks is not None
    return batch.masks


def _words(masks: object) -> list[bytes | None]:
    """The masks' words; `late` for those that are not known yet."""
    assert isinstance(masks, list)
    return [None if mask is None else b"late" if mask.is_late else mask.words for mask in masks]


def test_a_late_mask_is_not_waited_for_and_comes_in_a_later_step() -> None:
    thread, slow, quick = MaskThread(patience_s=0.02), _Grammar(1, is_open=False), _Grammar(2)
    rows = [_row(quick), _row(slow), _row(None)]
    masks = _begin(thread, rows)
    assert _words(masks()) == [b"\2", b"late", None]
    assert masks() is masks(), "it is decided once"
    assert _words(_begin(thread, rows)()) == [b"\2", b"late", None] and slow.made.num_masks == 0
    slow.gate.set()
    while b"late" in (words := _words(_begin(thread, rows)())):
        pass
    assert words == [b"\2", b"\1", None]


DRAFT = (0, 1, 2)


def _late(patience_s: float = 0.02) -> tuple[MaskThread, _Grammar, Sequence]:
    """Let the masks of a row with a draft be late, and come before the next step."""
    thread, slow = MaskThread(patience_s, idle_s=0.0), _Grammar(0xFF, is_open=False)
    row = _row(slow)
    row.num_scheduled_tokens, row.draft = 1 + len(DRAFT), DRAFT
    assert _words(_begin(thread, [row, _row(None)])()) == [b"late", None]
    slow.gate.set()
    [job] = thread._late
    job.future.result(HUNG_S)
    assert slow.made.num_masks == 1 + len(DRAFT)
    return thread, slow, row.seq


def _masks_of(thread: MaskThread, seq: Sequence, draft: tuple[int, ...]) -> GrammarMask:
    seq.num_computed_tokens = seq.num_tokens - 1
    masks = _begin(thread, [BatchRow(seq, 1 + len(draft), draft), _row(None)])()
    assert isinstance(masks, list) and isinstance(masks[0], GrammarMask)
    return masks[0]


@pytest.mark.parametrize(
    ("draft", "num_behind"),
    [(DRAFT, 3), (DRAFT[:2], 2), ((), 0), ((0, 1, 9), 2), ((0, 1, 2, 3), 3), ((9, 9), 0), ((1, 2), 0)],
)
def test_what_was_found_late_is_taken_whatever_is_drafted_by_then(draft: tuple[int, ...], num_behind: int) -> None:
    """Else a row whose draft is late in every step would never go on."""
    thread, slow, seq = _late()
    behind = tuple(bytes([0xFF, number]) for number in range(1, 1 + num_behind))
    for _ in range(2):  # the first of these steps may have been stopped
        assert _masks_of(thread, seq, draft) == GrammarMask(b"\xff", behind_draft=behind)
    assert slow.made.num_masks == 4, "nothing is looked for once more"


def test_what_was_found_late_behind_a_draft_is_taken_when_the_answer_has_come_so_far() -> None:
    thread, slow, seq = _late()
    seq.token_ids.append(0)
    assert _masks_of(thread, seq, (1, 9)) == GrammarMask(b"\xff\1", behind_draft=(b"\xff\2",))
    seq.token_ids.append(1)
    assert _masks_of(thread, seq, ()) == GrammarMask(b"\xff\2") and slow.made.num_masks == 4
    seq.token_ids.append(7)
    assert _masks_of(thread, seq, (1,)).words == b"\xff\3" and slow.made.num_masks == 6, "another token has come"
    assert not thread._late


def test_what_was_found_late_is_kept_for_rows_that_are_there() -> None:
    thread, _, _ = _late()
    assert len(thread._late) == 1
    thread.begin(Batch([_row(None)], may_postpone=True))
    assert not thread._late


@pytest.mark.parametrize("rows", [[], [None], [2]])
def test_what_was_found_late_is_kept_in_steps_of_prompts_and_of_copies(rows: list[int | None]) -> None:
    """Else an answer would not go on while such steps take turns with those of answers."""
    thread, slow, seq = _late()
    thread.begin(Batch([_row(None if word is None else _Grammar(word)) for word in rows]))
    thread.begin(Batch([], may_postpone=True))
    assert _masks_of(thread, seq, ()).words == b"\xff" and slow.made.num_masks == 1 + len(DRAFT)


def test_an_error_in_a_late_mask_is_raised_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, slow = MaskThread(patience_s=0.02, idle_s=0.0), _Grammar(1, is_open=False)
    rows = [_row(slow), _row(None)]
    monkeypatch.setattr(slow.made, "accept", lambda _: 1 / 0)
    rows[0].num_scheduled_tokens, rows[0].draft = 2, (0,)
    assert _words(_begin(thread, rows)()) == [b"late", None]
    slow.gate.set()
    [job] = thread._late
    assert isinstance(job.future.exception(HUNG_S), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        _begin(thread, rows)


def test_masks_that_take_long_leave_no_time_for_those_behind_drafts() -> None:
    """A row has so many drafted tokens as have masks by the time for which a step would wait for it."""
    thread, seq = MaskThread(patience_s=HUNG_S), _row(_Grammar(1)).seq
    _begin(thread, [BatchRow(seq, 1)])()
    assert seq.draft_limit > 100
    thread = MaskThread(patience_s=0.0)
    _begin(thread, [BatchRow(seq, 1)], may_postpone=False)()
    assert seq.draft_limit == 0


def test_those_behind_a_late_mask_are_found_by_another_thread() -> None:
    thread, slow = MaskThread(patience_s=0.02), _Grammar(1, is_open=False)
    rows = [_row(slow), *(_row(_Grammar(word)) for word in range(2, 20))]
    assert _words(_begin(thread, rows)()) == [b"late", *(bytes([word]) for word in range(2, 20))]
    slow.gate.set()


def test_several_may_be_late() -> None:
    thread, slow = MaskThread(patience_s=0.02), [_Grammar(word, is_open=False) for word in range(4)]
    rows = [*map(_row, slow), _row(_Grammar(9))]
    assert _words(_begin(thread, rows)()) == [b"late"] * 4 + [b"\t"]
    for grammar in slow:
        grammar.gate.set()


@pytest.mark.parametrize("others", ["none", "prompt"])
def test_a_late_mask_is_waited_for_where_nobody_else_would_be_served(others: str) -> None:
    thread, slow = MaskThread(patience_s=0.02, idle_s=HUNG_S), _Grammar(1, is_open=False)
    opened = threading.Timer(1.5, slow.gate.set)  # a busy machine may stand still for some of it
    opened.start()
    rows = [_row(slow)] if others == "none" else [_row(slow), _row(None, 5, samples=False)]
    assert _words(_begin(thread, rows)()) == [b"late"]
    assert slow.gate.is_set() is (others == "none")
    opened.cancel()
    slow.gate.set()


def test_a_late_mask_is_not_waited_for_without_end() -> None:
    """Requests that come meanwhile, and aborts, are looked at between two steps."""
    thread, slow = MaskThread(patience_s=0.02, idle_s=0.02), _Grammar(1, is_open=False)
    rows = [_row(slow)]
    for _ in range(2):
        assert _words(_begin(thread, rows)()) == [b"late"]
    slow.gate.set()


@pytest.mark.parametrize(("num_tokens", "may_postpone"), [(5, True), (1, False)])
def test_chunks_and_steps_that_may_postpone_nothing_wait(num_tokens: int, may_postpone: bool) -> None:
    thread, slow = MaskThread(patience_s=0.02), _Grammar(1, is_open=False)
    opened = threading.Timer(0.2, slow.gate.set)
    opened.start()
    rows = [_row(_Grammar(2)), _row(slow, num_tokens)]
    assert _words(_begin(thread, rows, may_postpone=may_postpone)()) == [b"\2", b"\1"]
    opened.join()


def test_a_costly_matcher_begins_when_the_tokens_of_the_step_before_have_left() -> None:
    thread, costly, plain = MaskThread(patience_s=HUNG_S), _Grammar(1, is_costly=True), _Grammar(2)
    left, waits = threading.Event(), list[int]()

    def wait_left() -> None:
        assert left.wait(HUNG_S)
        waits.append(costly.made.num_masks)

    batch = Batch([_row(plain), _row(costly)], may_postpone=True, wait_left=wait_left)
    thread.begin(batch)
    while not plain.made.num_masks:
        pass
    assert not costly.made.num_masks and not waits
    left.set()
    assert batch.masks is not None and _words(batch.masks()) == [b"\2", b"\1"]
    assert waits == [0], "and nobody else waits"


def test_masks_that_were_quick_are_found_behind_the_forward_pass() -> None:
    thread, quick = MaskThread(patience_s=HUNG_S), _Grammar(3)
    rows = [_row(quick), _row(None)]
    assert _words(_begin(thread, rows)()) == [b"\3", None] and rows[0].seq.mask_s is not None
    masks = _begin(thread, rows)
    assert quick.made.num_masks == 1, "nobody looks for it meanwhile"
    assert _words(masks()) == [b"\3", None] and quick.made.num_masks == 2


@pytest.mark.parametrize("spoil", ["costly", "slow", "new beside it"])
def test_masks_that_may_take_long_are_found_meanwhile(spoil: str) -> None:
    thread, quick = MaskThread(patience_s=HUNG_S), _Grammar(3)
    rows = [_row(quick)]
    _begin(thread, rows)()
    if spoil == "costly":
        quick.is_costly = True
    elif spoil == "slow":
        rows[0].seq.mask_s = 2 * QUICK_S
    else:
        rows.append(_row(_Grammar(4)))
    masks = _begin(thread, rows)
    while quick.made.num_masks < 2:
        pass
    assert _words(masks())[0] == b"\3" and quick.made.num_masks == 2


def test_without_grammars_there_are_no_masks() -> None:
    batch = Batch([_row(None)], may_postpone=True)
    MaskThread().begin(batch)
    assert batch.masks is None


def test_what_a_row_yields_without_its_mask_does_not_count() -> None:
    rows = [_row(_Grammar(1)), _row(_Grammar(2)), _row(None, samples=False), _row(None)]
    batch = Batch(rows, may_postpone=True)
    batch.masks = lambda: [GrammarMask(b"", is_late=True), GrammarMask(b"", "it is stuck"), None]
    plain = RowOutput(((SampledToken(3),),))
    found = with_masks_heeded(batch, [plain, plain, RowOutput(()), plain])
    assert found == [
        RowOutput((), is_postponed=True),
        RowOutput((), is_finite=False, grammar_failure="it is stuck"),
        RowOutput(()),
        plain,
    ]
