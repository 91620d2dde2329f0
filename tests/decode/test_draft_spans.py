"""What a draft model computes, beside a book of what it was fed: never on top of a token that was rejected."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.batch import UNDRAFTED, Batch, BatchRow
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.draft_spans import DraftSpans

BLOCK = 4
PARAMS = SamplingParams(temperature=0.0, max_tokens=1000)


def sequence(num_prompt_tokens: int = 6, num_computed: int | None = None) -> Sequence:
    tokens = list(range(num_prompt_tokens + 1))
    computed = num_prompt_tokens if num_computed is None else num_computed
    return Sequence(RequestId("r"), 0, 0, tokens, num_prompt_tokens, PARAMS, num_computed_tokens=computed)


class Book:
    """Which token the draft model was fed at each position, the last time."""

    def __init__(self, spans: DraftSpans, seq: Sequence) -> None:
        self.spans, self.seq = spans, seq
        self.fed = dict(enumerate(seq.token_ids[: seq.num_computed_tokens]))

    def step(self, num_drafted: int, num_right: int) -> BatchRow:
        seq = self.seq
        draft = tuple(range(1000, 1000 + num_drafted)) if num_drafted else ()
        row = BatchRow(seq, 1 + num_drafted, (UNDRAFTED,) * num_drafted)
        self.spans.assign([row])
        assert row.draft_span is not None
        first, end = row.draft_span
        known = [*seq.token_ids, *draft]
        if first < end:  # what it is fed goes on from what is right
            assert [self.fed[position] for position in range(first)] == seq.token_ids[:first]
            self.fed |= {position: known[position] for position in range(first, end)}
        said = [*draft[:num_right], 500 + seq.num_tokens]
        self.spans.observe(Batch([row]))
        seq.token_ids += said
        seq.num_computed_tokens += len(said)
        whole = seq.num_computed_tokens // BLOCK * BLOCK
        assert [self.fed[position] for position in range(whole)] == seq.token_ids[:whole]
        return row


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_it_goes_on_from_what_is_right_and_leaves_no_full_block_incomplete(steps: list[tuple[int, int]]) -> None:
    book = Book(DraftSpans(BLOCK), sequence())
    for num_drafted, num_right in steps:
        book.step(num_drafted, min(num_drafted, num_right))
    assert book.spans.num_prompt_tokens == 0  # they had come with their keys and values


def test_one_that_drafts_nothing_is_left_alone_until_a_block_is_full() -> None:
    book = Book(DraftSpans(BLOCK), sequence(num_prompt_tokens=4))
    spans = [book.step(0, 0).draft_span for _ in range(8)]
    assert spans == [(5, 5), (6, 6), (7, 7), (4, 8), (9, 9), (10, 10), (11, 11), (8, 12)]


def test_known_tokens_are_fed_from_where_it_was_left() -> None:
    book = Book(DraftSpans(BLOCK), sequence(num_prompt_tokens=4))
    for _ in range(2):
        book.step(0, 0)
    book.seq.token_ids += [7, 8, 9]  # that a grammar forces
    row = BatchRow(book.seq, 4)
    book.spans.assign([row])
    assert (row.start, row.draft_span) == (6, (4, 10))


def test_what_is_computed_anew_is_fed_whole_though_its_first_row_is_one_token() -> None:
    book = Book(DraftSpans(BLOCK), sequence(num_prompt_tokens=6))
    book.step(2, 1)
    seq = book.seq
    seq.num_computed_tokens = 0  # preempted; there is room for one token beside other rows, and then for more
    book.spans.assign([first := BatchRow(seq, 1)])
    book.spans.observe(Batch([first]))
    seq.num_computed_tokens = 1
    book.spans.assign([second := BatchRow(seq, 6)])
    assert (first.draft_span, second.draft_span) == ((1, 1), (0, 7))


def test_full_blocks_that_others_have_filled_meanwhile_are_left_alone() -> None:
    """A preempted sequence finds more of them in the cache than it had computed; they are shared."""
    spans = DraftSpans(BLOCK)
    seq = sequence(num_prompt_tokens=12, num_computed=0)
    first = BatchRow(seq, 4)
    spans.assign([first])
    spans.observe(Batch([first]))
    assert first.draft_span == (0, 4)
    seq.num_computed_tokens = 8
    rest = BatchRow(seq, 4)
    spans.assign([rest])
    assert rest.draft_span == (8, 12)


def test_who_is_forked_has_a_whole_copy_and_computed_prompt_tokens_are_counted() -> None:
    spans, seq = DraftSpans(BLOCK), sequence(num_computed=5)
    del seq.token_ids[6:]
    seq.pending_choices = (0, 1)
    row = BatchRow(seq, 1)
    spans.assign([row])
    assert row.draft_span == (5, 6)
    chunk = BatchRow(sequence(num_computed=2), 4)
    spans.assign([chunk])
    assert chunk.draft_span == (2, 6)
    spans.observe(Batch([row, chunk]))
    assert spans.num_prompt_tokens == 1 + 4
    for known in (seq, chunk.seq):
        spans.forget(known)
    assert not spans._computed
