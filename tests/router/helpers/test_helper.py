"""The helper process: answers in turn, ends what does not answer, is replaced, and knows and holds nothing too long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from kvferry.router.helpers.helper import Helper, HelperLost
from kvferry.router.helpers.program import MEMORY_BYTES
from kvferry.router.helpers.wire import COMMAS, FRAME, PARSE_JSON, REFUSAL, VALUE, HelperRefusal

LIMIT_S = 240.0


def _body(text: str = "{}") -> bytes:
    return COMMAS.pack(1000) + text.encode()


@asynccontextmanager
async def _helper() -> AsyncIterator[Helper]:
    helper = Helper()
    try:
        yield helper
    finally:
        helper.close()


async def _gone(pid: int) -> None:
    """The process has ended and was waited for."""
    async with asyncio.timeout(30):
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, 0)
                await asyncio.sleep(0.01)


def test_a_program_whose_router_is_gone_when_it_answers_ends_without_a_word() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        command = [sys.executable, "-m", "kvferry.router.helpers.program"]
        program = subprocess.Popen(command, stdin=its.fileno(), stderr=subprocess.PIPE)
        its.close()
        ours.sendall(FRAME.pack(PARSE_JSON, len(_body())) + _body())  # read as soon as it is ready
        ours.close()
        _, said = program.communicate(timeout=LIMIT_S)
    assert (program.returncode, said) == (0, b"")


async def test_many_ask_at_once_and_each_gets_its_own_answer() -> None:
    async with _helper() as helper:
        asked = [helper.ask(PARSE_JSON, _body(json.dumps({"n": number})), LIMIT_S) for number in range(50)]
        answers = await asyncio.gather(*asked)
        assert [msgspec.msgpack.decode(payload)["n"] for _, payload in answers] == list(range(50))
        assert {kind for kind, _ in answers} == {VALUE}
        kind, payload = await helper.ask(PARSE_JSON, _body("{"), LIMIT_S)
        assert kind == REFUSAL and msgspec.msgpack.decode(payload, type=HelperRefusal).status == 400


@pytest.mark.slow
async def test_an_answer_of_megabytes_comes_whole() -> None:
    async with _helper() as helper:
        text = "ä" * 5_000_000
        kind, payload = await helper.ask(PARSE_JSON, _body(json.dumps({"a": text})), LIMIT_S)
        assert kind == VALUE and msgspec.msgpack.decode(payload) == {"a": text}


async def test_one_that_does_not_answer_is_killed_and_the_next_gets_another() -> None:
    async with _helper() as helper:
        await helper.ask(PARSE_JSON, _body(), LIMIT_S)
        stopped = helper.pid or 0
        os.kill(stopped, signal.SIGSTOP)
        late = asyncio.create_task(helper.ask(PARSE_JSON, _body(), 0.05))
        next_one = asyncio.create_task(helper.ask(PARSE_JSON, _body('{"a": 1}'), LIMIT_S))
        with pytest.raises(HelperLost) as caught:
            await late
        assert caught.value.is_late
        assert (await next_one)[0] == VALUE
        assert helper.pid not in (None, stopped)
        await _gone(stopped)


async def test_one_that_ended_is_replaced_whether_somebody_waits_or_not() -> None:
    async with _helper() as helper:
        await helper.ask(PARSE_JSON, _body(), LIMIT_S)
        os.kill(helper.pid or 0, signal.SIGSTOP)
        asking = asyncio.create_task(helper.ask(PARSE_JSON, _body(), LIMIT_S))
        await asyncio.sleep(0)
        os.kill(helper.pid or 0, signal.SIGKILL)
        with pytest.raises(HelperLost) as caught:
            await asking
        assert not caught.value.is_late
        await helper.ask(PARSE_JSON, _body(), LIMIT_S)
        os.kill(helper.pid or 0, signal.SIGKILL)
        async with asyncio.timeout(30):
            while helper.pid is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await helper.ask(PARSE_JSON, _body(), LIMIT_S))[0] == VALUE


async def test_who_left_while_waiting_is_not_worked_for_and_confuses_nobody() -> None:
    async with _helper() as helper:
        await helper.ask(PARSE_JSON, _body(), LIMIT_S)
        pid = helper.pid
        first = asyncio.create_task(helper.ask(PARSE_JSON, _body('{"n": 1}'), LIMIT_S))
        second = asyncio.create_task(helper.ask(b"?", b"", LIMIT_S))  # would be its process's end
        third = asyncio.create_task(helper.ask(PARSE_JSON, _body('{"n": 3}'), LIMIT_S))
        await asyncio.sleep(0)
        first.cancel()  # it is being worked for
        second.cancel()
        assert msgspec.msgpack.decode((await third)[1]) == {"n": 3}
        assert helper.pid == pid


async def test_at_the_end_everybody_is_told() -> None:
    helper = Helper()
    asking = [asyncio.create_task(helper.ask(PARSE_JSON, _body(), LIMIT_S)) for _ in range(3)]
    await asyncio.sleep(0)
    helper.close()
    for task in asking:
        with pytest.raises(HelperLost, match="stops"):
            await task


@pytest.mark.slow
async def test_a_process_that_cannot_be_started_is_told_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/program")
    helper = Helper()
    lost = await asyncio.gather(
        *(helper.ask(PARSE_JSON, _body(), LIMIT_S) for _ in range(2000)), return_exceptions=True
    )
    assert all(isinstance(error, HelperLost) and "started" in str(error) for error in lost)


async def test_it_ends_with_who_holds_it_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_SECRET", "hush")
    helper = Helper()
    await helper.ask(PARSE_JSON, _body(), LIMIT_S)
    pid = helper.pid or 0
    assert b"hush" not in Path(f"/proc/{pid}/environ").read_bytes()  # noqa: ASYNC240
    asyncio.get_running_loop().remove_reader(helper._process._socket)  # type: ignore[union-attr]  # the loop holds it
    del helper
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_it_ends_when_its_router_is_killed() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from kvferry.router.helpers.helper import Helper\n"
        "async def main():\n"
        "    helper = Helper()\n"
        "    await helper.ask(b'j', b'\\0\\0\\0\\1{}', 60.0)\n"
        "    print(helper.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240.0)
    try:
        process = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    try:
        assert select.select([process], [], [], 30)[0]
    finally:
        os.close(process)


LIMITED = """
import asyncio, resource, sys
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
from kvferry.router.helpers.helper import Helper
async def main():
    helper = Helper()
    kind, _ = await helper.ask(b"j", b"\\0\\0\\0\\1{}", 60.0)
    print(kind.decode(), open(f"/proc/{helper.pid}/limits").read().split("Max address space")[1].split()[1])
    helper.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("hard", [1 << 30, resource.RLIM_INFINITY])
def test_its_memory_is_bounded_also_where_the_routers_own_is(hard: int) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(hard)], capture_output=True, text=True, timeout=240.0)
    assert done.stdout.split() == ["v", str(min(MEMORY_BYTES, hard) if hard > 0 else MEMORY_BYTES)], done.stderr
