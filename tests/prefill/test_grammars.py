"""Prompts whose answers follow a grammar: all but their last token is computed while it is compiled."""

from __future__ import annotations

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.grammar import Grammar
from kvferry.tests.fake_grammars import FakeGrammars
from kvferry.wire.results import FirstToken, TaskRefused, WorkerFailure

from .test_role import EOS, _Bench

GRAMMAR = Grammar("regex", b"a+")


def _bench(budget: int = 512) -> tuple[_Bench, FakeGrammars]:
    grammars = FakeGrammars()
    return _Bench(num_blocks=200, budget=budget, grammars=grammars), grammars


def _rows(batch: Batch | None) -> list[tuple[str, int]]:
    return [] if batch is None else [(str(row.seq.request_id), row.num_scheduled_tokens) for row in batch.rows]


def test_a_prompt_waits_with_an_open_grant_and_lets_others_pass() -> None:
    bench, grammars = _bench()
    bench.task("a", 9, grammar=GRAMMAR)
    assert grammars.asked == [GRAMMAR] and bench.begin() is None
    assert bench.shipping.opened == ["a"], "its grant would lapse"
    bench.task("b", 9, first=50)
    batch = bench.begin()
    assert batch is not None and _rows(batch) == [("b", 9)]
    bench.end(batch)
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.begin()
    assert batch is not None and _rows(batch) == [("a", 9)]
    assert bench.shipping.opened == ["a", "b"]


def test_if_its_grammar_is_late_a_prompt_is_computed_but_for_its_last_token() -> None:
    bench, grammars = _bench()
    bench.task("a", 100, grammar=GRAMMAR)
    grammars.known[GRAMMAR].is_late = True
    batch = bench.begin()
    assert batch is not None and _rows(batch) == [("a", 99)] and not batch.rows[0].samples
    bench.end(batch)
    assert bench.begin() is None
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.begin()
    assert batch is not None and _rows(batch) == [("a", 1)] and batch.rows[0].samples
    bench.end(batch, EOS)
    [first] = [message for _, message in bench.sent if isinstance(message, FirstToken)]
    assert [choice.finish for choice in first.choices] == ["stop", "stop"]


def test_a_cached_prompt_of_which_one_token_is_left_waits() -> None:
    bench, grammars = _bench()
    bench.task("a", 101)
    batch = bench.begin()
    assert batch is not None
    bench.end(batch)
    bench.task("b", 101, grammar=GRAMMAR)
    grammars.known[GRAMMAR].is_late = True
    assert bench.begin() is None
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.begin()
    assert batch is not None and _rows(batch) == [("b", 1)] and batch.rows[0].samples


def test_a_prompt_that_is_computed_for_its_kv_alone_needs_no_grammar() -> None:
    bench, grammars = _bench()
    bench.task("a", 9, grammar=GRAMMAR, sample=False)
    assert not grammars.asked and _rows(bench.begin()) == [("a", 9)]


def test_a_grammar_that_cannot_be_compiled_refuses_its_task() -> None:
    bench, grammars = _bench()
    bench.task("a", 100, grammar=GRAMMAR)
    grammars.known[GRAMMAR].is_late = True
    batch = bench.begin()
    assert batch is not None
    bench.end(batch)
    grammars.known[GRAMMAR].failure = "it is too much"
    assert bench.begin() is None
    [refused] = [message for _, message in bench.sent if isinstance(message, TaskRefused)]
    assert refused.reason == "grammar" and "it is too much" in refused.detail
    assert bench.shipping.cancelled


def test_a_grammar_that_breaks_ends_the_request_and_leaves_its_blocks_cached() -> None:
    bench, grammars = _bench()
    bench.task("a", 9, grammar=GRAMMAR)
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.begin()
    assert batch is not None
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False, grammar_failure="stuck")], 0.01, 9))
    [failure] = [message for _, message in bench.sent if isinstance(message, WorkerFailure)]
    assert failure.code == "grammar_failed" and bench.role.counters().nonfinite_rows == 0
