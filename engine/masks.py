"""The masks of a step's rows, and what a grammar forces behind what was drawn.

What a grammar leaves no choice about needs no logits: such tokens come with the one that was drawn before them, and
cost no step of their own. They are the same that masks would have let through one by one. When masks are found:
`mask_thread.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence as TokenIds

import structlog

from ..common.batch import Batch, BatchRow, GrammarMask, RowOutput
from ..common.grammar import GrammarBroken, Matcher
from ..common.request import Sequence

MAX_FORCED = 32  # in one step. Larger: its row computes as many more at once, and others wait for it
# All masks of a step. Larger: rows without a grammar wait; smaller: threads for a little work.
QUICK_S = 0.002
# One mask, of its thread's own time. Two thousand properties beside which any name may stand take 0.04 s (a vocabulary
# of 49,000, Zen 4). Alternatives in each other take seconds, and so does the token behind the mask, during which no
# other thread runs Python: a worker that sends no heartbeat is ended.
MOST_S = 0.25

log = structlog.get_logger(__name__)


def find_mask(row: BatchRow, patience_s: float = math.inf) -> GrammarMask:
    """Return the mask of a row that samples by a grammar. What has failed does so again at once.

    `patience_s`: of the thread's own time. Masks behind a draft that would take more of it are not looked for.
    """
    if row.seq.grammar_failure:
        return GrammarMask(b"", row.seq.grammar_failure)
    began_s = time.thread_time()
    try:
        words = next_mask(row.seq)
        behind = masks_behind(row.seq, words, row.draft, began_s, patience_s) if row.draft else ()
    except GrammarBroken as error:
        log.warning("grammar_broken", request_id=row.seq.request_id, choice=row.seq.choice, error=str(error))
        return _failed(row.seq, str(error))
    except Exception:
        raise
    except BaseException as error:  # a panic of the library: others' answers go on
        log.error("grammar_panic", request_id=row.seq.request_id, error=repr(error))
        return _failed(row.seq, "the matcher has failed")
    return mask_of(words, behind)


def mask_of(words: bytes, behind: tuple[bytes, ...]) -> GrammarMask:
    """Make a row's mask of that of its next token, and those behind its draft."""
    return GrammarMask(words, "" if any(words) else "no token of the vocabulary can follow", behind)


def _failed(seq: Sequence, reason: str) -> GrammarMask:
    """Remember why, and return it: whose mask was late is asked again."""
    seq.grammar_failure = reason
    return GrammarMask(b"", reason)


def next_mask(seq: Sequence) -> bytes:
    """Return the mask of the token after the sequence's last one. Raises GrammarBroken."""
    matcher = matcher_of(seq)
    catch_up(seq, matcher)
    return _mask_of(matcher)


def _mask_of(matcher: Matcher) -> bytes:
    """Return the next mask. Raises GrammarBroken where to take a token behind it might take long, too."""
    began_s = time.thread_time()
    words = matcher.mask()
    if time.thread_time() - began_s > MOST_S:
        raise GrammarBroken("the grammar is too ambiguous: to follow it takes too long")
    return words


def masks_behind(
    seq: Sequence, words: bytes, draft: tuple[int, ...], began_s: float, patience_s: float
) -> tuple[bytes, ...]:
    """Return the masks after each token of a draft: up to one that may not come, or until it would take too long.

    `words`: the mask before the draft, which the thread has looked for since `began_s`. Where the grammar fails behind
    a drafted token, no mask is there: if the answer comes so far, its own mask tells why.
    """
    assert seq.matcher is not None
    masks: list[bytes] = []
    try:
        for num_found, token_id in enumerate(draft, 1):
            spent_s = time.thread_time() - began_s
            if spent_s + spent_s / num_found > patience_s:  # with one more, which takes as long as those before
                break
            if not (0 <= token_id < 8 * len(words) and words[token_id >> 3] >> (token_id & 7) & 1):
                break
            seq.matcher.accept((token_id,))
            masks.append(words := _mask_of(seq.matcher))
        if masks:
            seq.matcher.rollback(len(masks))
    except GrammarBroken:  # as it does behind an end: a new matcher stands where this one stood
        seq.matcher = None
    except Exception:
        raise
    except BaseException as error:  # a panic of the library: so does that
        log.error("grammar_panic", request_id=seq.request_id, error=repr(error))
        seq.matcher = None
    return tuple(masks)


def matcher_of(seq: Sequence) -> Matcher:
    """Return the sequence's own matcher. One that has taken more tokens than there are is of no use: a new one."""
    assert seq.grammar is not None
    if seq.matcher is None or seq.num_matched_tokens > seq.num_output_tokens:
        seq.matcher, seq.num_matched_tokens = seq.grammar.matcher(), 0
    return seq.matcher


def catch_up(seq: Sequence, matcher: Matcher) -> None:
    """Have the matcher take the tokens of the answer that it has not: one after a step, all of them after a resume.

    One by one: other threads run Python between two.
    """
    for token_id in seq.token_ids[seq.num_prompt_tokens + seq.num_matched_tokens :]:
        matcher.accept((token_id,))
        seq.num_matched_tokens += 1


def with_forced(batch: Batch, outputs: list[RowOutput]) -> list[RowOutput]:
    """Return a step's output with the tokens that must follow what was drawn."""
    return [
        output._replace(forced=forced_after(row.seq, [token.token_id for token in output.runs[0]]))
        if row.seq.grammar is not None and output.runs and row.choices == (row.seq.choice,)
        else output
        for row, output in zip(batch.rows, outputs, strict=True)
    ]


def forced_after(seq: Sequence, run: TokenIds[int]) -> tuple[int, ...]:
    """Return the tokens that must follow a run, which comes next.

    None are forced where log-probabilities are wanted of them, or where it would take long to find them out: they come
    one by one, by their masks.
    """
    if seq.sampling.logprobs is not None or seq.matcher is None or seq.num_matched_tokens != seq.num_output_tokens:
        return ()
    is_costly = seq.grammar is not None and seq.grammar.is_costly
    if is_costly or (seq.mask_s is not None and seq.mask_s > QUICK_S):  # all of the step's tokens would wait for that
        return ()
    forced: list[int] = []
    try:
        seq.matcher.accept(run)
        seq.num_matched_tokens += len(run)
        while len(forced) < MAX_FORCED and (following := seq.matcher.forced()) is not None:
            forced.append(following)
            seq.matcher.accept((following,))
            seq.num_matched_tokens += 1
    except GrammarBroken:  # behind an end. If it was anything else, the next mask of a new matcher tells
        seq.matcher = None
    except Exception:
        raise
    except BaseException as error:  # a panic of the library: as above
        log.error("grammar_panic", request_id=seq.request_id, error=repr(error))
        seq.matcher = None
    return tuple(forced)


def with_masks_heeded(batch: Batch, outputs: list[RowOutput]) -> list[RowOutput]:
    """Return a step's output with nothing that was drawn where a grammar's mask has failed, is late, or is not there.

    Behind a draft a mask may be missing: what comes there is drawn in a later step.
    """
    if batch.masks is None:
        return outputs
    masks = iter(batch.masks())
    found = [next(masks) if row.samples else None for row in batch.rows]
    return [output if mask is None else _heeded(mask, output) for mask, output in zip(found, outputs, strict=True)]


def _heeded(mask: GrammarMask, output: RowOutput) -> RowOutput:
    if mask.is_late:
        return RowOutput((), is_postponed=True)
    if mask.failure:
        return RowOutput((), is_finite=False, grammar_failure=mask.failure)
    num_masks = 1 + len(mask.behind_draft)
    if all(len(run) <= num_masks for run in output.runs):
        return output
    return output._replace(runs=tuple(run[:num_masks] for run in output.runs))
