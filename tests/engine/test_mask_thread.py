"""Masks that are late hold up nobody else: their rows yield nothing until they are known."""

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
    """Its mask comes when the gate is open."""

    def __init__(self, gate: threading.Event, word: int) -> None:
        self._gate = gate
        self._word = bytes([word])
        self.num_users = self.num_masks = 0

    def accept(self, token_ids: TokenIds[int]) -> None:
        raise AssertionError("there are no tokens")

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("there are no drafts")

    def mask(self) -> bytes:
        self.num_users += 1
        assert self.num_users == 1, "two threads use one matcher"
        assert self._gate.wait(HUNG_S)
        self.num_users -= 1
        self.num_masks += 1
        return self._word

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
