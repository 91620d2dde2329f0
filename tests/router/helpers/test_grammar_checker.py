"""Grammars are compiled elsewhere before anybody follows them; what takes too long is ended and refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvferry.common.errors import CapacityError, RequestError
from kvferry.common.grammar import Grammar, unpack_mask
from kvferry.grammar.matching import Vocabulary, compile_grammar
from kvferry.router.helpers import grammar_checker
from kvferry.router.helpers.grammar_checker import QUICK_BYTES, QUICK_LIMIT_S, TIME_LIMIT_S, GrammarCompilers
from kvferry.router.helpers.helper import HelperLost
from kvferry.router.helpers.wire import VALUE
from kvferry.tests.checkpoints import write_tokenizer

EOS = frozenset({1})


@asynccontextmanager
async def _checking(path: Path, eos: frozenset[int] = EOS) -> AsyncIterator[GrammarCompilers]:
    write_tokenizer(path, 512)
    checker = GrammarCompilers(path, 512, eos)
    try:
        yield checker
    finally:
        checker.close()


def _schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value).encode())


async def _late(*_: object) -> tuple[bytes, bytes]:
    raise HelperLost("it did not answer", is_late=True)


async def _ended(*_: object) -> tuple[bytes, bytes]:
    raise HelperLost("its process ended", has_ended=True)


async def _absent(*_: object) -> tuple[bytes, bytes]:
    raise HelperLost("no process can be started")


LARGE = _schema({"properties": {f"property_{i}": {"type": "string"} for i in range(150)}})
COSTLY = _schema({"properties": {f"property_{i}": {"type": "string"} for i in range(1500)}})


async def test_small_and_large_grammars_have_processes_of_their_own(tmp_path: Path) -> None:
    assert len(LARGE.text) > QUICK_BYTES
    async with _checking(tmp_path) as checker:
        await checker.check(Grammar("regex", b"a+"), "guided_regex")
        assert checker.quick.pid is not None and checker.long.pid is None
        await checker.check(LARGE, "guided_json")
        assert checker.long.pid not in (None, checker.quick.pid)


async def test_what_is_known_asks_nobody(tmp_path: Path) -> None:
    async with _checking(tmp_path) as checker:
        first = await checker.check(Grammar("regex", b"a+"), "guided_regex")
        checker.close()
        assert await checker.check(Grammar("regex", b"a+"), "guided_regex") == first
        assert checker.quick.pid is None


@pytest.mark.parametrize("grammar", [Grammar("regex", b"a+"), Grammar("choice", b'["b", "cc"]'), LARGE])
async def test_a_checked_grammar_has_the_mask_of_first_tokens_that_workers_find(
    tmp_path: Path, grammar: Grammar
) -> None:
    async with _checking(tmp_path) as checker:
        checked = await checker.check(grammar, "guided")
    vocabulary = Vocabulary.from_dir(tmp_path, vocab_size=512, eos_token_ids=EOS)
    assert checked.grammar == grammar
    assert unpack_mask(checked.first_mask) == compile_grammar(vocabulary, grammar).mask()


async def test_a_refusal_names_the_field_and_the_place_in_it(tmp_path: Path) -> None:
    async with _checking(tmp_path) as checker:
        with pytest.raises(RequestError, match=r"'guided_json' has the keyword 'not' at 'items\.not'") as caught:
            await checker.check(_schema({"items": {"not": {"pattern": "x"}}}), "guided_json")
        assert caught.value.param == "guided_json.items.not"
        assert (caught.value.code, caught.value.status) == ("unsupported_grammar", 400)
        await checker.check(_schema({"items": {}}), "guided_json")


async def test_what_takes_too_long_is_refused_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _checking(tmp_path) as checker:
        await checker.check(LARGE, "guided_json")
        pid = checker.long.pid
        monkeypatch.setattr(grammar_checker, "TIME_LIMIT_S", 0.02)
        monkeypatch.setattr(grammar_checker, "QUICK_LIMIT_S", 0.0)
        with pytest.raises(RequestError, match=r"takes more than 0\.02 s to compile") as caught:
            await checker.check(COSTLY, "guided_json")
        assert (caught.value.param, caught.value.code) == ("guided_json", "unsupported_grammar")
        monkeypatch.undo()
        await checker.check(_schema({"properties": {f"p{i}": {} for i in range(400)}}), "guided_json")
        assert checker.long.pid not in (None, pid), "its process was ended"


async def test_a_small_grammar_that_is_costly_gets_what_is_left_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    async def compiled(_kind: bytes, _payload: bytes, limit_s: float) -> tuple[bytes, bytes]:
        limits.append(limit_s)
        return VALUE, b"mask"

    async with _checking(tmp_path) as checker:
        monkeypatch.setattr(checker.quick, "ask", _late)
        monkeypatch.setattr(checker.long, "ask", compiled)
        assert (await checker.check(Grammar("regex", b"a"), "guided_regex")).first_mask == b"mask"
        await checker.check(LARGE, "guided_json")
    assert limits == [TIME_LIMIT_S - QUICK_LIMIT_S, TIME_LIMIT_S]


async def test_the_grammars_are_known_that_were_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_checker, "MAX_KNOWN", 2)
    asked: list[bytes] = []

    async def compiled(_kind: bytes, payload: bytes, _limit_s: float) -> tuple[bytes, bytes]:
        asked.append(msgspec.msgpack.decode(payload, type=Grammar).text)
        return VALUE, b"mask"

    async with _checking(tmp_path) as checker:
        monkeypatch.setattr(checker.quick, "ask", compiled)
        for text in (b"a", b"b", b"a", b"c", b"a", b"b"):
            await checker.check(Grammar("regex", text), "guided_regex")
    assert asked == [b"a", b"b", b"c", b"b"]


async def test_what_ends_its_process_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _checking(tmp_path) as checker:
        for helper in (checker.quick, checker.long):
            monkeypatch.setattr(helper, "ask", _ended)
        with pytest.raises(RequestError, match="takes more memory") as caught:
            await checker.check(Grammar("regex", b"a"), "guided_regex")
        assert caught.value.status == 400


async def test_where_no_process_can_be_had_the_client_may_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _checking(tmp_path) as checker:
        monkeypatch.setattr(checker.quick, "ask", _absent)
        with pytest.raises(CapacityError, match="no process"):
            await checker.check(Grammar("regex", b"a"), "guided_regex")


async def test_a_model_that_cannot_follow_grammars_says_so(tmp_path: Path) -> None:
    async with _checking(tmp_path, frozenset()) as checker:
        with pytest.raises(RequestError, match="the model has no end token") as caught:
            await checker.check(Grammar("regex", b"a"), "guided_regex")
        assert caught.value.status == 400
