"""Routers share a folder of answers: one tells an answer at a time, the one whose client came last."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from kvferry.common.errors import ConfigError, RequestError
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.kept import answers as answers_module
from kvferry.router.kept.answers import KEEP_S, KeptAnswers, take
from kvferry.router.kept.kept_answer import AnswerKey
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RouterRequest

KEY = AnswerKey("name", b"asked")
HOLDER = """
import asyncio, sys
from pathlib import Path
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.kept.kept_answer import AnswerKey

async def main():
    kept = await KeptAnswers(Path(sys.argv[1])).take(AnswerKey("name", b"asked"), "m")
    kept.settle([SamplingParams(max_tokens=8, seed=3)], "r")
    kept.add(0, [SampledToken(5)], None)
    print("told", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A router that tells the answer, in a process of its own."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"told\n"
        try:
            yield process
        finally:
            process.kill()


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def swept(answers: KeptAnswers, key: AnswerKey) -> None:
    (await answers.take(key, "m")).close()
    assert answers.sweeper.sweeping is not None
    await answers.sweeper.sweeping


def read_only(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def settle(kept: object, seed: int = 1, limit: int = 8) -> list[SamplingParams]:
    return kept.settle([SamplingParams(max_tokens=limit, seed=seed)], "r")  # type: ignore[attr-defined, no-any-return]


async def test_another_try_finds_what_was_drawn_and_told(tmp_path: Path) -> None:
    first = await KeptAnswers(tmp_path).take(KEY, "m")
    assert not first.is_repeated
    settle(first)
    first.add(0, [SampledToken(5), SampledToken(6)], None)
    first.add(0, [SampledToken(7)], "length")
    first.close()
    first.close()

    again = await KeptAnswers(tmp_path).take(KEY, "m")
    assert again.is_repeated and again.num_told_tokens == 3
    [params] = settle(again, seed=99, limit=2)
    assert (params.seed, params.max_tokens) == (1, 8)
    request = RouterRequest("r-0", [1], params)
    assert list(again.restore([request])) == [request]
    assert [token.token_id for token in request.choices[0].tokens] == [5, 6, 7]
    assert request.choices[0].finish == "length" and not request.unfinished
    again.close()


async def test_each_choice_gets_its_own_tokens(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    kept.settle([SamplingParams(max_tokens=8)] * 2, "r")
    for index in (3, 0, 1, 3, 2):
        kept.add(index, [SampledToken(10 * index), SampledToken(10 * index + 1)], "stop" if index == 2 else None)
    kept.close()
    kept = await answers.take(KEY, "m")
    requests = [RouterRequest(f"r-{number}", [1], SamplingParams(max_tokens=8), n=2) for number in range(2)]
    assert list(kept.restore(iter(requests))) == requests
    choices = [choice for request in requests for choice in request.choices]
    assert [[token.token_id for token in choice.tokens] for choice in choices] == [
        [0, 1],
        [10, 11],
        [20, 21],
        [30, 31, 30, 31],
    ]
    assert [choice.finish for choice in choices] == [None, None, "stop", None]
    kept.close()


@pytest.mark.parametrize("is_same_router", [True, False])
async def test_whoever_comes_back_gets_the_answer_of_who_still_tells_it(tmp_path: Path, is_same_router: bool) -> None:
    answers = KeptAnswers(tmp_path)
    others = answers if is_same_router else KeptAnswers(tmp_path)
    first = await answers.take(KEY, "m")
    settle(first)
    first.on_wanted = first.close
    second = await others.take(KEY, "m")
    assert second.head is not None and len(others) == 1
    second.close()
    assert len(answers) == 0 and not names_in(tmp_path / "wanted")


async def test_an_answer_is_handed_over_after_a_look_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, others, list_of, num_looks = KeptAnswers(tmp_path), KeptAnswers(tmp_path), os.listdir, 0
    first = await answers.take(KEY, "m")
    settle(first)
    first.on_wanted = first.close

    def failing_first(path: Path) -> list[str]:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 1:
            raise OSError(errno.EIO, "Input/output error")
        return list_of(path)

    monkeypatch.setattr(os, "listdir", failing_first)
    (await others.take(KEY, "m")).close()
    assert num_looks > 1


async def test_a_mark_that_a_dead_router_left_ends_nobodys_answer(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    (tmp_path / "wanted" / KEY.name).touch()
    kept = await answers.take(KEY, "m")
    wishes = list[None]()
    kept.on_wanted = lambda: wishes.append(None)
    await asyncio.sleep(0.3)
    assert not wishes and not names_in(tmp_path / "wanted")
    kept.close()


async def test_of_many_who_come_back_each_gets_the_answer_in_the_end(tmp_path: Path) -> None:
    routers = [KeptAnswers(tmp_path) for _ in range(2)]
    first = await routers[0].take(KEY, "m")
    first.on_wanted = first.close

    async def come_back(number: int) -> None:
        kept = await routers[number % 2].take(KEY, "m")
        kept.on_wanted = kept.close

    await asyncio.gather(*map(come_back, range(5)))
    assert sum(map(len, routers)) == 1 and not names_in(tmp_path / "wanted")
    for router in routers:
        for kept in list(router._held.values()):
            kept.close()


async def test_an_answer_that_is_not_handed_over_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "HAND_OVER_S", 0.3)
    first = await KeptAnswers(tmp_path).take(KEY, "m")
    with pytest.raises(StreamError) as error:
        await KeptAnswers(tmp_path).take(KEY, "m")
    assert (error.value.code, error.value.status) == ("idempotency_key_in_use", 409)
    first.close()
    assert not names_in(tmp_path / "wanted")


async def test_a_key_stands_for_one_request(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    kept.close()
    for version in ("m", "another"):
        with pytest.raises(RequestError) as error:
            await answers.take(AnswerKey("name", b"something else"), version)
        assert (error.value.code, error.value.status) == ("idempotency_key_reused", 422)
    assert len(answers) == 0
    (await answers.take(KEY, "m")).close()


async def test_of_many_answers_one_look_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, due = KeptAnswers(tmp_path), list[object]()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *call: due.append(call))
    held = [await answers.take(AnswerKey(name, b""), "m") for name in "abc"]
    assert len(due) == 1
    for kept in held:
        kept.close()


async def test_events_of_an_answer_that_is_not_here_are_refused(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    with pytest.raises(StreamError) as error:
        await answers.take(AnswerKey("name", b"asked", after=3), "m")
    assert (error.value.code, error.value.status) == ("answer_not_kept", 409)
    assert len(answers) == 0


async def test_another_version_of_the_model_begins_anew(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    kept.add(0, [SampledToken(5)], None)
    kept.close()
    kept = await answers.take(KEY, "another")
    assert kept.head is None and not kept.is_repeated
    settle(kept, seed=2)
    kept.close()
    kept = await answers.take(KEY, "another")
    assert kept.begun.seeds == (2,)
    kept.close()


async def test_answers_leave_open_files_to_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (7, 7))
    answers = KeptAnswers(tmp_path)
    held = [await answers.take(AnswerKey(name, b""), "m") for name in "ab"]
    with pytest.raises(OSError, match="2 answers are kept at once"):
        await answers.take(AnswerKey("c", b""), "m")
    assert await take(answers, AnswerKey("c", b""), "m", []) is None
    held.pop().close()
    (await answers.take(AnswerKey("c", b""), "m")).close()
    held.pop().close()


async def test_a_record_that_did_not_fit_ends_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full takes a part of it."""
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    kept.add(0, [SampledToken(5)], None)
    monkeypatch.undo()
    assert not kept.is_kept and names_in(tmp_path) == {"wanted"}
    kept.close()


async def test_an_answer_goes_on_where_its_disk_takes_no_changes_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept as far as it came, and can be gone on with from there."""
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    kept.add(0, [SampledToken(5)], None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", read_only)
        patch.setattr(os, "unlink", read_only)
        kept.add(0, [SampledToken(6)], None)
    assert not kept.is_kept
    kept.close()
    again = await answers.take(KEY, "m")
    assert [portion.tokens[0].token_id for portion in again.told] == [5]
    again.close()


async def test_a_dead_routers_answer_is_free_and_whole(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    kept = await KeptAnswers(tmp_path).take(KEY, "m")
    assert [portion.tokens[0].token_id for portion in kept.told] == [5]
    kept.close()


async def test_a_stopped_router_keeps_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "HAND_OVER_S", 0.3)
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(StreamError, match="another connection"):
            await KeptAnswers(tmp_path).take(KEY, "m")


async def test_old_answers_are_deleted_and_those_under_way_are_not(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path)
    for name in ("old", "told", "new"):
        kept = await answers.take(AnswerKey(name, b""), "m")
        settle(kept)
        kept.close()
    told = await answers.take(AnswerKey("told", b""), "m")
    for name in ("old", "told"):
        os.utime(tmp_path / name, (time.time() - KEEP_S - 1,) * 2)
    await swept(KeptAnswers(tmp_path), AnswerKey("another", b""))
    assert names_in(tmp_path) == {"told", "new", "another", "wanted"}
    told.close()


async def test_the_oldest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "MAX_BYTES", 25_000)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(bytes(10_000))
        os.utime(tmp_path / str(number), (time.time() - 100 + number,) * 2)
    await swept(KeptAnswers(tmp_path), KEY)
    assert names_in(tmp_path) == {"2", "3", "name", "wanted"}


async def test_an_answer_that_can_not_be_kept_any_more_is_found_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    kept.add(0, [SampledToken(5)], None)
    assert not kept.is_kept
    kept.add(0, [SampledToken(6)], None)
    monkeypatch.undo()
    kept.close()
    again = await answers.take(KEY, "m")
    assert again.head is None
    again.close()


async def test_a_folder_that_vanishes_costs_no_answer(tmp_path: Path) -> None:
    answers = KeptAnswers(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert await take(answers, KEY, "m", []) is None
    assert await take(None, KEY, "m", []) is None and await take(answers, None, "m", []) is None


def test_a_folder_that_can_not_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"answers_dir: cannot use .*file"):
        KeptAnswers(tmp_path / "file")


async def test_who_stops_waiting_for_a_long_answer_leaves_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_module, "_READ_INLINE", 0)
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    kept.close()
    taking = asyncio.create_task(answers.take(KEY, "m"))
    await asyncio.sleep(0)
    taking.cancel()
    await asyncio.wait([taking])
    assert taking.cancelled()
    again = await answers.take(KEY, "m")
    assert again.head is not None
    again.close()


@pytest.mark.parametrize("fault", ["the file", "its mark", "what another model has told"])
@pytest.mark.parametrize("inline", [0, 1 << 20], ids=["on a thread", "at once"])
async def test_an_answer_that_cannot_be_opened_now_is_free_for_who_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, inline: int
) -> None:
    monkeypatch.setattr(answers_module, "_READ_INLINE", inline)
    answers = KeptAnswers(tmp_path)
    kept = await answers.take(KEY, "m")
    settle(kept)
    kept.close()
    assert answers.sweeper.sweeping is not None
    await answers.sweeper.sweeping
    before = len(os.listdir("/proc/self/fd"))

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        match fault:
            case "the file":
                patch.setattr(os, "read", fails)
            case "its mark":
                patch.setattr(Path, "unlink", fails)
            case _:
                patch.setattr(os, "ftruncate", fails)
        with pytest.raises(OSError, match="Input/output error"):
            await answers.take(KEY, "other" if fault.startswith("what") else "m")
    assert len(os.listdir("/proc/self/fd")) == before and len(answers) == 0
    again = await answers.take(KEY, "m")
    assert again.head is not None
    again.close()
