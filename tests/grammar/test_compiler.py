"""A worker's grammars: compiled once, on threads, with everybody told when one is ready or never will be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.common.errors import ConfigError
from kvferry.common.grammar import Grammar, pack_mask
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.engine.masks import next_mask
from kvferry.grammar import compiler
from kvferry.grammar.compiler import LATE_S, GrammarCompiler
from kvferry.grammar.matching import Vocabulary, compile_checked
from kvferry.grammar.references import may_recur
from kvferry.grammar.thinking import FirstMatcher
from kvferry.tests.checkpoints import write_tokenizer
from kvferry.tests.fake_clock import FakeClock

LIMIT_S = 30.0  # of a thread that works; never reached


class _Bench:
    """A compiler over a small vocabulary, which is there when `may_load` is set."""

    def __init__(self, path: Path) -> None:
        write_tokenizer(path, 512)
        self._path = path
        self.clock = FakeClock()
        self.may_load = threading.Event()
        self.told = threading.Semaphore(0)
        self.num_loaded = 0
        self.compiler = GrammarCompiler(self._load, self.clock, self.told.release)

    def _load(self) -> Vocabulary:
        assert self.may_load.wait(LIMIT_S)
        self.num_loaded += 1
        return Vocabulary.from_dir(self._path, vocab_size=512, eos_token_ids=frozenset({1}))

    def wait(self) -> None:
        assert self.told.acquire(timeout=LIMIT_S)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[_Bench]:
    bench = _Bench(tmp_path)
    yield bench
    bench.may_load.set()
    bench.compiler.close()


def test_a_grammar_is_there_at_once_and_ready_later(bench: _Bench) -> None:
    found = bench.compiler.get(Grammar("regex", b"a"), is_awaited=True)
    states = [found.is_ready, found.is_late]
    bench.clock.advance(LATE_S)
    states += [found.is_ready, found.is_late]
    bench.may_load.set()
    bench.wait()
    assert states == [False, False, False, True] and (found.is_ready, found.is_late, found.failure) == (True, False, "")
    seq = Sequence(RequestId("r"), 0, 0, [5], 1, SamplingParams(), grammar=found)
    mask = next_mask(seq)
    assert mask is not None and any(mask)


@pytest.mark.parametrize(("bound_s", "is_costly"), [(0.0, True), (LIMIT_S, False)])
def test_what_takes_long_to_compile_is_costly_to_match(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch, bound_s: float, is_costly: bool
) -> None:
    monkeypatch.setattr(compiler, "COSTLY_S", bound_s)
    bench.may_load.set()
    found = bench.compiler.get(Grammar("regex", b"a+"), is_awaited=True)
    bench.wait()
    assert found.is_ready and found.is_costly == is_costly


_TREE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    ("schema", "recurs"),
    [
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}, "b": {"$ref": "#/$defs/a"}}}, False),
        ({"properties": {"$ref": {"type": "object"}, "x": {"$ref": "#/properties/$ref"}}}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": _TREE}}, True),
        ({"$ref": "#/$defs/b", "$defs": {"b": {"$ref": "#/$defs/a"}, "a": {"items": {"$ref": "#/$defs/b"}}}}, True),
        ({"properties": {"x": {"$ref": "#"}}}, True),
        ({"properties": {"x": {"$ref": "https://somewhere/else"}}}, True),
        (True, False),
    ],
    ids=str,
)
def test_a_schema_that_may_hold_itself_is_known(schema: object, recurs: bool) -> None:
    assert may_recur(schema) == recurs


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("tokens", pack_mask(b"\x60" + bytes(63))),
        Grammar("any", b""),
        Grammar("choice", b'["a"]'),
        Grammar("regex", b"a"),
        Grammar("json_object", b""),
        Grammar("lark", b'start: "a"'),
    ],
    ids=lambda grammar: grammar.kind,
)
def test_grammars_of_each_kind_become_ready(bench: _Bench, grammar: Grammar) -> None:
    bench.may_load.set()
    found = bench.compiler.get(grammar, is_awaited=True)
    bench.wait()
    assert (found.is_ready, found.failure) == (True, "")


@pytest.mark.parametrize("kind", ["json_schema", "lark"])
def test_what_recurs_forces_no_tokens(bench: _Bench, kind: str) -> None:
    text = json.dumps({"$ref": "#/$defs/a", "$defs": {"a": _TREE}})
    bench.may_load.set()
    found = bench.compiler.get(
        Grammar(kind, (f"start: %json {text}" if kind == "lark" else text).encode()), is_awaited=True
    )
    bench.wait()
    assert found.is_ready and found.is_costly


def test_an_equal_grammar_is_compiled_once_and_the_vocabulary_read_once(bench: _Bench) -> None:
    bench.may_load.set()
    first = bench.compiler.get(Grammar("regex", b"a"), is_awaited=True)
    assert bench.compiler.get(Grammar("regex", b"a"), is_awaited=True) is first
    assert bench.compiler.get(Grammar("choice", b'["a"]'), is_awaited=True) is not first
    bench.wait()
    bench.wait()
    assert bench.num_loaded == 1


def test_who_can_never_be_ready_says_why_and_is_tried_anew(bench: _Bench) -> None:
    bench.may_load.set()
    found = bench.compiler.get(Grammar("regex", b"("), is_awaited=True)
    bench.wait()
    assert not found.is_ready and "unclosed group" in found.failure
    assert bench.compiler.get(Grammar("regex", b"("), is_awaited=True) is not found


def test_a_grammar_is_compiled_aside_until_an_answer_waits_for_it(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.may_load.set()
    bench.compiler.get(Grammar("regex", b"a"), is_awaited=False)  # with which the vocabulary is read, and not aside
    bench.wait()
    has_begun, may_go, threads, given_way = threading.Event(), threading.Event(), list[str](), list[int]()

    one, other = Grammar("regex", b"b"), Grammar("regex", b"c")

    def compile_here(vocabulary: Vocabulary, grammar: Grammar) -> FirstMatcher:
        if grammar not in (one, other):  # a thread of the test before has not ended yet
            return compile_checked(vocabulary, grammar)
        threads.append(threading.current_thread().name.partition("_")[0])
        if "aside" in threads[-1]:
            has_begun.set()
            assert may_go.wait(LIMIT_S)
        return compile_checked(vocabulary, grammar)

    monkeypatch.setattr(compiler, "compile_checked", compile_here)
    monkeypatch.setattr(compiler, "give_way", given_way.append)
    found = bench.compiler.get(one, is_awaited=False)
    bench.compiler.get(other, is_awaited=False)
    assert has_begun.wait(LIMIT_S), "a busy machine lets it begin late, and the other thread would be done before"
    assert bench.compiler.get(one, is_awaited=True) is found
    bench.wait()
    assert found.is_ready and bench.compiler.get(one, is_awaited=True) is found and len(given_way) == 1
    may_go.set()
    bench.wait()
    bench.wait()
    assert bench.compiler.get(other, is_awaited=False).is_ready
    assert sorted(threads) == ["grammar", "grammar-aside", "grammar-aside"]


def test_a_model_without_ends_fails_its_grammars_and_no_thread(tmp_path: Path) -> None:
    def load() -> Vocabulary:
        raise ConfigError("no end token")

    told = threading.Semaphore(0)
    threads = GrammarCompiler(load, FakeClock(), told.release)
    for text in (b"a", b"b"):
        found = threads.get(Grammar("regex", text), is_awaited=True)
        assert told.acquire(timeout=LIMIT_S)
        assert found.failure == "no end token"
    threads.close()


def test_those_that_were_not_used_for_longest_go(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    bench.may_load.set()
    first, second = (bench.compiler.get(Grammar("regex", text), is_awaited=True) for text in (b"a", b"b"))
    assert bench.compiler.get(Grammar("regex", b"a"), is_awaited=True) is first
    bench.compiler.get(Grammar("regex", b"c"), is_awaited=True)
    assert bench.compiler.get(Grammar("regex", b"a"), is_awaited=True) is first
    assert bench.compiler.get(Grammar("regex", b"b"), is_awaited=True) is not second
    for _ in range(4):
        bench.wait()
    assert second.is_ready, "who has it keeps it"
