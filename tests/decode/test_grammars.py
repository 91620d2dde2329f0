"""Answers that follow a grammar wait until it is ready, nothing else does, and one that is broken ends its request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kvferry.common.batch import RowKind, RowOutput, StepOutput
from kvferry.common.grammar import Grammar, pack_mask
from kvferry.common.request import SamplingParams
from kvferry.tests.fake_grammars import FakeGrammars
from kvferry.wire.results import NoCapacity, TaskRefused, WorkerFailure
from kvferry.wire.tasks import LocalTask, ReserveKV

from .bench import EOS, Bench, first_token

GRAMMAR = Grammar("regex", b"a+")


def _bench() -> tuple[Bench, FakeGrammars]:
    bench, grammars = Bench(), FakeGrammars()
    bench.role = bench.make_role(grammars=grammars)
    return bench, grammars


def _rows(bench: Bench) -> list[tuple[str, int]]:
    batch = bench.step()
    return [] if batch is None else [(str(row.seq.request_id), row.num_scheduled_tokens) for row in batch.rows]


def test_a_grammar_is_compiled_from_the_reservation_on() -> None:
    bench, grammars = _bench()
    bench.send(ReserveKV(spec=bench.spec("a", 6, grammar=GRAMMAR)))
    assert grammars.asked == [GRAMMAR]


def test_a_local_prompt_waits_and_lets_others_pass() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR)))
    bench.send(LocalTask(spec=bench.spec("b", 3)))
    assert _rows(bench) == [("b", 3)]
    grammars.known[GRAMMAR].is_ready = True
    assert sorted(_rows(bench)) == [("a", 9), ("b", 1)]
    bench.run()
    assert bench.tokens("a") == {0: [(index, 9) for index in range(4)]} and bench.role.is_quiet


def test_a_prompt_whose_first_tokens_are_known_does_not_wait_for_its_grammar() -> None:
    bench, grammars = _bench()
    spec = bench.spec("a", 9, n=2, grammar=GRAMMAR)
    bench.send(LocalTask(spec=spec, first_mask=pack_mask(b"\x02" * 64)))
    batch = bench.role.schedule()
    assert batch is not None
    [row] = batch.rows
    assert row.seq.grammar is not None
    row.seq.matcher = row.seq.grammar.matcher()
    bench.complete(batch)
    assert row.num_scheduled_tokens == 9 and bench.tokens("a") == {0: [(0, 9)], 1: [(0, 9)]}
    assert [row.seq.matcher for row in batch.rows] == [None], "it was the mask's"
    assert grammars.awaited == [GRAMMAR], "its first tokens are there, and go on by the grammar"
    assert bench.step() is None
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.step()
    assert batch is not None and [row.seq.grammar for row in batch.rows] == [grammars.known[GRAMMAR]] * 2
    bench.run()
    assert bench.tokens("a") == {choice: [(index, 9) for index in range(4)] for choice in (0, 1)}


def test_a_grammar_that_became_ready_during_the_prompt_is_not_asked_for_again() -> None:
    """Those of many others may have taken its place: it would be compiled anew, and the answer stand still."""
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 20, grammar=GRAMMAR), first_mask=pack_mask(b"\x02" * 64)))
    assert _rows(bench) == [("a", 16)]
    grammars.known.pop(GRAMMAR).is_ready = True
    assert [_rows(bench) for _ in range(3)] == [[("a", 4)], [("a", 1)], [("a", 1)]] and not grammars.known


def test_first_tokens_of_a_grammar_that_is_known_may_force_others() -> None:
    bench, grammars = _bench()
    grammars.get(GRAMMAR, is_awaited=False).is_ready = True
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR), first_mask=pack_mask(b"\x02" * 64)))
    batch = bench.step()
    assert batch is not None and batch.rows[0].seq.grammar is grammars.known[GRAMMAR]


def test_what_has_no_mask_or_goes_on_is_awaited_at_once() -> None:
    bench, grammars = _bench()
    bench.send(ReserveKV(spec=bench.spec("a", 6, grammar=GRAMMAR)))
    assert grammars.awaited == []
    bench.send(LocalTask(spec=bench.spec("b", 6, outputs=([5],), grammar=GRAMMAR)))
    assert grammars.awaited == [GRAMMAR]


def test_if_its_grammar_is_late_a_prompt_is_computed_but_for_its_last_token() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR)))
    grammars.known[GRAMMAR].is_late = True
    assert _rows(bench) == [("a", 8)] and _rows(bench) == []
    grammars.known[GRAMMAR].is_ready = True
    assert _rows(bench) == [("a", 1)]
    bench.run()
    assert bench.tokens("a") == {0: [(index, 9) for index in range(4)]}


def test_an_adopted_answer_waits_with_its_first_token() -> None:
    bench, grammars = _bench()
    bench.hand_over(bench.spec("a", 6, n=2, grammar=GRAMMAR), (first_token(0, 5), first_token(1, 6)))
    assert _rows(bench) == []
    assert bench.tokens("a") == {0: [(0, 5)], 1: [(0, 6)]}
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.step()
    assert batch is not None and [row.seq.grammar for row in batch.rows] == [grammars.known[GRAMMAR]] * 2


def test_a_resumed_answer_and_forked_choices_have_the_grammar() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 6, n=2, outputs=([5, 6], [7]), grammar=GRAMMAR)))
    bench.send(LocalTask(spec=bench.spec("b", 5, n=2, grammar=GRAMMAR)))
    grammars.known[GRAMMAR].is_ready = True
    bench.step()
    batch = bench.step()
    assert batch is not None and len(batch.rows) == 4
    assert all(row.seq.grammar is grammars.known[GRAMMAR] for row in batch.rows)


def test_an_end_token_ends_the_answer_though_ends_are_ignored() -> None:
    bench, grammars = _bench()
    spec = bench.spec("a", 5, grammar=GRAMMAR)
    params = msgspec.structs.replace(spec.sampling, ignore_eos=True)
    bench.send(LocalTask(spec=msgspec.structs.replace(spec, sampling=params)))
    grammars.known[GRAMMAR].is_ready = True
    bench.run(token=EOS)
    assert bench.tokens("a") == {0: [(0, EOS)]} and bench.role.is_quiet


@pytest.mark.parametrize(
    ("sampling", "num_tokens"), [({"ignore_eos": True}, 6), ({"min_tokens": 3}, 3), ({"min_tokens": 0}, 1)]
)
def test_an_end_token_among_those_that_are_allowed_ends_what_it_would_end_without_them(
    sampling: dict[str, Any], num_tokens: int
) -> None:
    bench, grammars = _bench()
    grammar = Grammar("tokens", pack_mask(b"\4\0\0\0"))
    params = SamplingParams(temperature=0.0, max_tokens=6, **sampling)
    bench.send(LocalTask(spec=msgspec.structs.replace(bench.spec("a", 5, grammar=grammar), sampling=params)))
    grammars.known[grammar].is_ready = True
    bench.run(token=EOS)
    assert bench.tokens("a") == {0: [(index, EOS) for index in range(num_tokens)]} and bench.role.is_quiet


def test_a_grammar_that_cannot_be_compiled_ends_its_requests_with_why() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR)))
    bench.hand_over(bench.spec("c", 6, grammar=GRAMMAR), (first_token(0, 5),))
    bench.step()
    grammars.known[GRAMMAR].failure = "it is too much"
    bench.step()
    refused = [message for message in bench.sent if isinstance(message, TaskRefused)]
    assert [(message.request_id, message.reason) for message in refused] == [("a", "grammar"), ("c", "grammar")]
    assert all("it is too much" in message.detail for message in refused)
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0


def test_a_grammar_that_fails_ends_the_attempt_that_is_there_by_now() -> None:
    bench, grammars = _bench()
    specs = [msgspec.structs.replace(bench.spec("a", 9, grammar=GRAMMAR), attempt=attempt) for attempt in range(2)]
    for spec in specs:
        bench.send(LocalTask(spec=spec))
    grammars.known[GRAMMAR].failure = "it is too much"
    bench.step()
    assert [message.attempt for message in bench.sent if isinstance(message, TaskRefused)] == [1]
    assert bench.role.is_quiet


def test_a_grammar_that_is_compiled_anew_and_fails_ends_the_answer_that_waits_for_it() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR), first_mask=pack_mask(b"\x02" * 64)))
    del grammars.known[GRAMMAR]
    bench.step()
    grammars.known[GRAMMAR].failure = "it is too much"
    bench.step()
    assert isinstance(bench.sent[-1], TaskRefused) and bench.role.is_quiet


def test_no_token_follows_the_refusal_of_what_arrived_with_one() -> None:
    bench, grammars = _bench()
    bench.hand_over(bench.spec("a", 6, grammar=GRAMMAR), (first_token(0, 5),))
    grammars.known[GRAMMAR].failure = "it is too much"
    bench.step()
    assert isinstance(bench.sent[-1], TaskRefused) and not bench.tokens("a") and bench.role.is_quiet


def test_an_answer_whose_grammar_breaks_ends_alone_and_leaves_its_blocks_cached() -> None:
    bench, grammars = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 8, grammar=GRAMMAR)))
    grammars.known[GRAMMAR].is_ready = True
    batch = bench.role.schedule()
    assert batch is not None
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False, grammar_failure="stuck")], 0.01, 8))
    failure = bench.last(WorkerFailure)
    assert isinstance(failure, WorkerFailure) and failure.code == "grammar_failed" and "stuck" in failure.reason
    assert bench.role.is_quiet and bench.pool.num_owned_blocks == 0
    assert bench.role.counters().nonfinite_rows == 0
    bench.send(ReserveKV(spec=bench.spec("b", 8)))
    assert isinstance(bench.last(NoCapacity), NoCapacity), "the prompt's blocks are held: they are sound"


def _forcing(bench: Bench, *forced: int) -> tuple[RowKind, int, list[int]]:
    """Have the one row's grammar force tokens; return the row's kind, its first position, and what it fed."""
    batch = bench.role.schedule()
    assert batch is not None
    [row] = batch.rows
    fed = (row.kind, row.start, row.token_ids)
    output = bench.output(batch, 9)
    output.rows[0] = output.rows[0]._replace(forced=forced)
    bench.role.complete(batch, output)
    bench.check()
    return fed


def _answering(num_tokens: int = 6, /, **sampling: object) -> Bench:
    """One request whose prompt fills a block and a half of four tokens."""
    bench, grammars = _bench()
    spec = bench.spec("a", num_tokens, grammar=GRAMMAR)
    spec = msgspec.structs.replace(spec, sampling=SamplingParams(temperature=0.0, **sampling))  # type: ignore[arg-type]
    bench.send(LocalTask(spec=spec))
    grammars.known[GRAMMAR].is_ready = True
    return bench


def test_forced_tokens_come_with_the_drawn_one_and_are_computed_with_the_next_step() -> None:
    bench = _answering(max_tokens=20)
    _forcing(bench, 7, 8, 7)
    assert bench.tokens("a") == {0: [(0, 9), (1, 7), (2, 8), (3, 7)]}
    assert _forcing(bench) == (RowKind.CHUNK, 6, [9, 7, 8, 7])
    assert _forcing(bench) == (RowKind.DECODE, 10, [9])


def test_forced_tokens_end_an_answer_where_it_would_have_ended() -> None:
    for sampling, forced, wanted in (
        ({"max_tokens": 3}, (7, 8, 7), [9, 7, 8]),
        ({"max_tokens": 1}, (7, 8, 7), [9]),
        ({"max_tokens": 20}, (7, EOS, 8), [9, 7, EOS]),
        ({"max_tokens": 20, "stop_token_ids": (8,)}, (7, 8, 7), [9, 7, 8]),
    ):
        bench = _answering(**sampling)
        _forcing(bench, *forced)
        assert bench.tokens("a") == {0: list(enumerate(wanted))} and bench.role.is_quiet


@pytest.mark.parametrize(("num_tokens", "tokens"), [(6, [9, 10]), (7, [9]), (8, [9])])
def test_forced_tokens_without_room_come_one_by_one(num_tokens: int, tokens: list[int]) -> None:
    """Two blocks of four have room for one more than the drawn token, or for that alone, or not even for it."""
    bench = _answering(num_tokens, max_tokens=60)
    bench.pool.allocate(bench.pool.num_blocks - 2)
    batch = bench.role.schedule()
    assert batch is not None
    output = bench.output(batch, 9)
    bench.role.complete(batch, StepOutput([output.rows[0]._replace(forced=tuple(range(10, 30)))], 0.01, num_tokens))
    assert bench.tokens("a") == {0: list(enumerate(tokens))}


def test_a_row_that_was_postponed_is_computed_again() -> None:
    bench = _answering(max_tokens=20)
    assert _forcing(bench) == (RowKind.CHUNK, 0, bench.spec("a", 6).prompt_token_ids()[:6])
    for _ in range(3):
        batch = bench.role.schedule()
        assert batch is not None and batch.may_postpone
        assert [(row.start, row.token_ids) for row in batch.rows] == [(6, [9])]
        bench.role.complete(batch, StepOutput([RowOutput((), is_postponed=True)], 0.01, 1))
        bench.check()
        assert bench.tokens("a") == {0: [(0, 9)]}
    assert _forcing(bench) == (RowKind.DECODE, 6, [9])
    assert bench.tokens("a") == {0: [(0, 9), (1, 9)]}


def test_a_costly_grammar_waits_for_the_tokens_of_the_step_before() -> None:
    bench, grammars = Bench(), FakeGrammars(are_ready=True)
    bench.role = bench.make_role(grammars=grammars, leaving=lambda: lambda: None)
    bench.send(LocalTask(spec=bench.spec("a", 9, grammar=GRAMMAR)))
    for is_costly in (False, True):
        grammars.known[GRAMMAR].is_costly = is_costly
        batch = bench.role.schedule()
        assert batch is not None and (batch.wait_left is not None) == is_costly
        bench.complete(batch)
