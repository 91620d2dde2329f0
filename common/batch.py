"""One engine step as plain data: which sequence computes how many tokens, and what it yields.

Schedulers make a `Batch`, the engine fills tensors from it and answers with a `StepOutput`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import NamedTuple, Protocol

from .request import Pooling, SampledToken, Sequence

UNDRAFTED = -1  # stands in a draft for a token that the engine's draft model is to say


class RowKind(Enum):
    """A row is computed and timed by its kind."""

    DECODE = "decode"  # the token that came last, behind those fed again: a step's time grows with its context
    VERIFY = "verify"  # that and a draft of those after it: each of them is judged by logits
    CHUNK = "chunk"  # several tokens that are known: a step's time grows with their number


class GrammarMask(NamedTuple):
    """The tokens that may come next in an answer that follows a grammar."""

    words: bytes  # bit i of the little-endian 32-bit words: token i may
    failure: str = ""  # why none can be told: the request ends
    behind_draft: tuple[bytes, ...] = ()  # the words after each of a draft's first tokens; behind them nothing counts
    is_late: bool = False  # it is not known yet: the row yields nothing, and a later step computes it again


@dataclass(slots=True)
class BatchRow:
    """One sequence's part of a step: positions [start, end) are fed, the last ones with a draft of what comes."""

    seq: Sequence
    num_scheduled_tokens: int
    draft: tuple[int, ...] = ()  # proposed next tokens, which are fed after those that are known
    # Where the engine has a draft model: the positions whose keys and values that computes. None: all that is fed.
    draft_span: tuple[int, int] | None = None

    @property
    def kind(self) -> RowKind:
        if self.draft:
            return RowKind.VERIFY
        return RowKind.DECODE if self.num_scheduled_tokens == 1 + self.seq.num_fed_again else RowKind.CHUNK

    @property
    def start(self) -> int:
        return self.seq.num_computed_tokens

    @property
    def end(self) -> int:
        return self.seq.num_computed_tokens + self.num_scheduled_tokens

    @property
    def num_known_tokens(self) -> int:
        """Count the fed tokens that the sequence has."""
        return self.num_scheduled_tokens - len(self.draft)

    @property
    def token_ids(self) -> list[int]:
        """Return what is fed."""
        return [*self.seq.token_ids[self.start : self.start + self.num_known_tokens], *self.draft]

    @property
    def samples(self) -> bool:
        """Tell whether the row feeds the last known token, so that its logits choose the next one."""
        seq = self.seq
        return seq.samples and seq.num_computed_tokens + self.num_known_tokens == len(seq.token_ids)

    @property
    def pooled_tokens(self) -> range:
        """Return the fed tokens, counted from the row's first, whose hidden states are part of an embedding."""
        seq, count = self.seq, self.num_scheduled_tokens
        match seq.pooling:
            case Pooling.MEAN:
                return range(count)
            case Pooling.CLS:
                return range(1 if seq.num_computed_tokens == 0 else 0)
            case Pooling.LAST:
                return range(count - 1 if self.end == len(seq.token_ids) else count, count)
            case None:
                return range(0)

    @property
    def draft_model_span(self) -> tuple[int, int]:
        """Return the positions that a draft model computes, to draft and behind the step."""
        return self.draft_span if self.draft_span is not None else (self.start, self.end)

    @property
    def draft_model_rest(self) -> range:
        """Return those of them that it computes behind the step, of which drafting has not fed any."""
        first, end = self.draft_model_span
        return range(self.end - 1 if self.draft else first, end)

    @property
    def choices(self) -> tuple[int, ...]:
        """Return the choices that are sampled from this row's logits."""
        return self.seq.pending_choices or (self.seq.choice,)


@dataclass(slots=True)
class Batch:
    """Rows that decode stand first, then those that verify, chunks last.

    Blocks are copied before the rows are computed, in this order: out to host memory, in from there, between blocks.
    Without rows a batch is these copies alone.
    """

    rows: list[BatchRow]
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to); ~to: a thin one
    swap_out: list[tuple[int, int]] = field(default_factory=list)  # (block, slot in host memory)
    swap_in: list[tuple[int, int]] = field(default_factory=list)  # (slot, block)
    may_postpone: bool = False  # a row that decodes or verifies may yield nothing, as its mask is late
    # Returns when the tokens of the step before have left. None: they have, or nothing in this one would hold them up.
    wait_left: Callable[[], object] | None = None
    # Returns what may come next in each row that samples, in their order, when that is known (`GrammarMask`).
    masks: Callable[[], Rows[GrammarMask | None]] | None = None  # None: anything in every row

    @property
    def num_tokens(self) -> int:
        return sum(row.num_scheduled_tokens for row in self.rows)

    @property
    def has_pooled(self) -> bool:
        return any(row.seq.pooling is not None for row in self.rows)

    @property
    def has_drafts(self) -> bool:
        return any(row.draft for row in self.rows)


Run = tuple[SampledToken, ...]  # tokens of one choice that follow each other


class RowOutput(NamedTuple):
    """The result of one row: what comes next for each of `BatchRow.choices`; nothing where the row does not sample.

    A run of more than one token comes from an engine that computed the earlier ones in the same step. It writes their
    keys and values where the sequence's blocks have room for them, and nowhere else. Tokens that a grammar forces come
    behind the run without having been computed.
    """

    runs: tuple[Run, ...]
    # Entry i is about prompt token start + i + 1 (given the tokens before it); only where prompt_logprobs was asked.
    prompt_logprobs: tuple[SampledToken, ...] = ()
    is_finite: bool = True  # False: some of its logits are no distribution. Its request ends, with nothing of this row
    grammar_failure: str = ""  # why the answer's grammar cannot be followed any further: as if not finite
    forced: tuple[int, ...] = ()  # what must follow the run, by the answer's grammar
    is_postponed: bool = False  # nothing of it counts, as if the row had not been in the step
    pooled: bytes = b""  # the sum of the hidden states of `BatchRow.pooled_tokens`, float32; empty: there are none


def row_output(
    row: BatchRow, tokens: tuple[SampledToken, ...], prompt_logprobs: tuple[SampledToken, ...] = ()
) -> RowOutput:
    """Make a row's output of each choice's sampled token: of logits that are no distribution none, or NaN."""
    if (row.samples and not tokens) or any(token.is_nan for token in prompt_logprobs):
        return RowOutput((), is_finite=False)
    return RowOutput(tuple((token,) for token in tokens), prompt_logprobs)


def verified_output(row: BatchRow, tokens: Iterable[tuple[SampledToken, ...]]) -> RowOutput:
    """Make the output of a row that verifies: what would have been drawn one token at a time.

    `tokens[i]`: drawn after the first i drafted tokens, which counts while these are what was drawn. So the draft
    decides how many tokens a step yields, and never which.
    """
    run: list[SampledToken] = []
    for index, drawn in enumerate(tokens):
        if not drawn:  # no distribution there: a later step finds it again, if the answer comes so far
            break
        run.append(drawn[0])
        if index < len(row.draft) and drawn[0].token_id != row.draft[index]:
            break
    return RowOutput((tuple(run),)) if run else RowOutput((), is_finite=False)


def drawn_output(
    row: BatchRow, tokens: Iterator[tuple[SampledToken, ...]], prompt_logprobs: tuple[SampledToken, ...]
) -> RowOutput:
    """Make a row's output of what was drawn for it, which stands next in `tokens`."""
    if row.draft:
        return verified_output(row, list(islice(tokens, 1 + len(row.draft))))
    return row_output(row, next(tokens) if row.samples else (), prompt_logprobs)


@dataclass(slots=True)
class StepOutput:
    rows: list[RowOutput]  # as Batch.rows
    step_s: float  # seconds of the whole step
    num_tokens: int
    swap_s: float = 0.0  # seconds of the step that copies from and to host memory took
    draft_s: float = 0.0  # seconds of it that the draft model took
    is_stopped: bool = False  # it ended early, as nobody wanted it any more: its rows are postponed


def stopped_output(batch: Batch, step_s: float, swap_s: float = 0.0) -> StepOutput:
    """Make the output of a step that was stopped: its copies have been made, and nothing else counts."""
    rows = [RowOutput((), is_postponed=True)] * len(batch.rows)
    return StepOutput(rows, step_s, batch.num_tokens, swap_s, is_stopped=True)


class GpuEvent(Protocol):
    """A point in a GPU's work: a layer's kernels are queued when the host says that it is done."""

    def query(self) -> bool:
        """Has the work before it been done? Never blocks; from any thread."""
        ...
