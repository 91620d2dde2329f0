"""Planted bugs of grammars: matchers that stand where their answers do not."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as TokenIds
from dataclasses import replace

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.grammar import Matcher
from kvferry.common.request import SampledToken, Sequence
from kvferry.decode.results import StepResults
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.engine import masks
from kvferry.wire.first_mask import FirstMask
from kvferry.wire.tasks import LocalTask, PrefillTask

from .oracle import VOCAB_SIZE
from .planting import Planted


def _matcher_of_first_choice(seq: Sequence) -> Matcher:
    """All choices of a request share the matcher that the first of them made."""
    assert seq.grammar is not None
    if isinstance(seq.grammar, FirstMask):
        return seq.grammar
    if seq.matcher is None:
        shared = getattr(seq.grammar, "shared", None)
        if shared is None:
            shared = seq.grammar.shared = {}  # type: ignore[attr-defined]
        seq.matcher = shared.setdefault((seq.request_id, seq.attempt), seq.grammar.matcher())
    return seq.matcher


def _take_last_token(seq: Sequence, matcher: Matcher) -> None:
    """A new matcher is not brought up to what the answer has already: it takes the newest token alone."""
    if seq.num_output_tokens > seq.num_matched_tokens:
        matcher.accept(seq.token_ids[-1:])
        seq.num_matched_tokens = seq.num_output_tokens


def _force_the_first(seq: Sequence, run: list[int]) -> tuple[int, ...]:
    """One of several tokens that may come is taken for the only one."""
    if seq.matcher is None or isinstance(seq.matcher, FirstMask):
        return ()
    seq.matcher.accept(run)
    seq.num_matched_tokens += len(run)
    allowed = int.from_bytes(seq.matcher.mask(), "little")
    return ((allowed & -allowed).bit_length() - 1,)


def _masks_before(seq: Sequence, words: bytes, draft: tuple[int, ...], *times_s: float) -> tuple[bytes, ...]:
    """Every drafted token is judged by the mask before the first."""
    return (words,) * len(draft)


def _complete_all(scheduler: DecodeScheduler, batch: Batch, postponed: Container[int] = ()) -> list[bool]:
    """A row that was postponed counts as computed."""
    return _complete(scheduler, batch)


_complete = DecodeScheduler.complete


def _take_postponed(results: StepResults, batch: Batch, output: StepOutput) -> None:
    """The token that a row would have yielded without its mask is taken for the answer's."""
    rows = [RowOutput(((SampledToken(0),),)) if row.is_postponed else row for row in output.rows]
    _take(results, batch, replace(output, rows=rows))


_take = StepResults.take


def _first_mask_of_any(task: PrefillTask | LocalTask) -> FirstMask | None:
    """The grammar that a task comes with is passed over: any token may be the first."""
    return None if task.spec.grammar is None else FirstMask(b"\xff" * (VOCAB_SIZE // 8))


def _pass_over(mask: FirstMask, token_ids: TokenIds[int]) -> None:
    """Whatever comes, the same may come next."""


def _keep_first_mask(results: StepResults, seq: Sequence, result: RowOutput) -> None:
    """The grammar that came with the prompt stays its answer's."""
    request = results._requests.request_of(seq)
    request.grammar = seq.grammar
    _on_sampled(results, seq, result)


_on_sampled = StepResults._on_sampled


BUGS = (
    Planted("a mask of another choice", frozenset({"G1"}), patches=((masks, "matcher_of", _matcher_of_first_choice),)),
    Planted(
        "a new matcher misses what came before",
        frozenset({"G1"}),
        patches=((masks, "catch_up", _take_last_token),),
    ),
    Planted(
        "a token is forced though others may come",
        frozenset({"I6"}),
        patches=((masks, "forced_after", _force_the_first),),
    ),
    Planted(
        "drafts are judged by the mask before them",
        frozenset({"G1"}),
        patches=((masks, "masks_behind", _masks_before),),
    ),
    Planted(
        "a postponed row counts as computed",
        frozenset({"I16"}),
        patches=((DecodeScheduler, "complete", _complete_all),),
        within_seeds=200,
    ),
    Planted(
        "a token is drawn without its mask",
        frozenset({"I6"}),
        patches=((StepResults, "take", _take_postponed),),
    ),
    Planted(
        "a first token is drawn by another mask",
        frozenset({"G1"}),
        patches=((PrefillTask, "first_grammar", _first_mask_of_any),),
    ),
    Planted(
        "a first token is drawn by another mask where the decode worker computes the prompt",
        frozenset({"G1"}),
        patches=((LocalTask, "first_grammar", _first_mask_of_any),),
    ),
    Planted(
        "an answer goes on by the mask of its first token",
        frozenset({"G1"}),
        patches=((FirstMask, "accept", _pass_over), (StepResults, "_on_sampled", _keep_first_mask)),
    ),
    Planted(
        "nobody waits for a grammar",
        frozenset({"crash"}),
        patches=((Sequence, "can_sample", property(lambda seq: True)),),
    ),
)
