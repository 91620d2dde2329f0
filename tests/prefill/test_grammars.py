"""Prompts whose answers follow a grammar: which first tokens may come is in the task, and nothing is compiled."""

from __future__ import annotations

import pytest

from kvferry.common.batch import RowOutput, StepOutput
from kvferry.common.grammar import Grammar
from kvferry.common.request import FinishReason
from kvferry.engine.masks import find_mask
from kvferry.tests.fake_grammars import FakeGrammars
from kvferry.wire.results import FirstToken, WorkerFailure

from .test_role import EOS, FIRST_MASK, _Bench

GRAMMAR = Grammar("regex", b"a+")


def _bench(budget: int = 512) -> tuple[_Bench, FakeGrammars]:
    grammars = FakeGrammars()
    return _Bench(num_blocks=200, budget=budget, grammars=grammars), grammars


def test_a_prompt_waits_for_no_grammar_and_its_first_token_has_the_mask_that_came() -> None:
    bench, grammars = _bench()
    bench.task("a", 9, grammar=GRAMMAR)
    batch = bench.begin()
    assert batch is not None and batch.rows[0].num_scheduled_tokens == 9 and not grammars.asked
    mask = find_mask(batch.rows[0])
    assert mask is not None and mask.words == FIRST_MASK and not mask.failure
    bench.end(batch, EOS)
    [first] = [message for _, message in bench.sent if isinstance(message, FirstToken)]
    assert [choice.finish for choice in first.choices] == ["stop", "stop"], "an end that its grammar lets come"


@pytest.mark.parametrize(("kind", "finish"), [("regex", FinishReason.STOP), ("tokens", None)])
def test_an_end_that_is_ignored_ends_what_a_grammar_ends(kind: str, finish: FinishReason | None) -> None:
    bench, _ = _bench()
    bench.task("a", 9, grammar=Grammar(kind, b"a+"), ignore_eos=True)
    batch = bench.begin()
    assert batch is not None
    bench.end(batch, EOS)
    [first] = [message for _, message in bench.sent if isinstance(message, FirstToken)]
    assert [choice.finish for choice in first.choices] == [finish] * 2


def test_a_long_prompt_has_the_mask_with_its_last_chunk() -> None:
    bench, _ = _bench(budget=8)
    bench.task("a", 20, grammar=GRAMMAR)
    sampled = []
    while (batch := bench.begin()) is not None:
        sampled.append((batch.rows[0].num_scheduled_tokens, batch.rows[0].samples))
        bench.end(batch)
    assert sampled == [(8, False), (8, False), (4, True)]


def test_a_prompt_that_is_computed_for_its_kv_alone_has_no_mask() -> None:
    bench, grammars = _bench()
    bench.task("a", 9, grammar=GRAMMAR, sample=False)
    batch = bench.begin()
    assert batch is not None and batch.rows[0].num_scheduled_tokens == 9 and not grammars.asked
    assert not batch.rows[0].samples and batch.rows[0].seq.grammar is None


def test_a_grammar_that_breaks_ends_the_request_and_leaves_its_blocks_cached() -> None:
    bench, _ = _bench()
    bench.task("a", 9, grammar=GRAMMAR)
    batch = bench.begin()
    assert batch is not None
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False, grammar_failure="stuck")], 0.01, 9))
    [failure] = [message for _, message in bench.sent if isinstance(message, WorkerFailure)]
    assert failure.code == "grammar_failed" and bench.role.counters().nonfinite_rows == 0
