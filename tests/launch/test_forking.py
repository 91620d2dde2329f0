"""A fork server: a child is as if it had been started by itself, however the server ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import psutil
import pytest

from kvferry.launch.children import ROUTER_PROGRAM, WORKER_PROGRAM, make_fork_server
from kvferry.launch.forking import ForkedProcess, ForkServer, client, server
from kvferry.launch.forking.messages import MAX_PACKET_BYTES, Refused, Report, Start

MODULE = "kvferry.tests.launch.forked"
LIMIT_S = 60.0
ENV = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
async def forks() -> AsyncIterator[ForkServer]:
    made = ForkServer(ENV, {MODULE: (MODULE,)})
    yield made
    await made.close()
    assert not _servers()


def _servers() -> list[psutil.Process]:
    found = psutil.Process().children()
    return [child for child in found if "kvferry.launch.forking.server" in child.cmdline()]


class Told:
    """Our end of what a child says of itself."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)

    async def facts(self) -> dict[str, Any]:
        told = b""
        while not told.endswith(b"}\n"):
            part = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self.ours, 1 << 20), LIMIT_S)
            assert part
            told += part
        facts: dict[str, Any] = json.loads(told)
        return facts

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.close()


async def start(forks: ForkServer, told: Told, *args: str, stderr_fd: int | None = None) -> ForkedProcess:
    argv = (sys.executable, "-m", MODULE, *args)
    fds = {"--told-fd": told.theirs.fileno()}
    return await forks.start(argv, fds, {"OWN": "its own"}, stderr_fd, title="the title")


async def ended(process: ForkedProcess) -> int | None:
    return await asyncio.wait_for(process.wait(), LIMIT_S)


async def test_a_child_has_its_own_arguments_environment_and_group_and_shares_imports(
    forks: ForkServer, told: Told, tmp_path: Path
) -> None:
    with (tmp_path / "errors").open("wb") as errors:
        process = await start(forks, told, "3", "an argument", stderr_fd=errors.fileno())
    facts = await told.facts()
    assert await ended(process) == 3
    [own] = _servers()
    assert facts["args"] == ["an argument"] and facts["flag"] == "--told-fd"
    assert facts["env"] == {"OWN": "its own"}
    assert facts["group"] == process.pid != own.pid == facts["imported_by"]
    assert facts["title"] == "the title"
    # Standard input to error, what it was given, and the folder that it reads.
    assert len(facts["open"]) == 5
    assert (tmp_path / "errors").read_text() == "said\n"
    with pytest.raises(ProcessLookupError):
        process.send_signal(signal.SIGTERM)


async def test_an_environment_of_any_size_and_any_bytes_reaches_a_child(forks: ForkServer, told: Told) -> None:
    env = {f"SERVICE_{number}": "x" * 10_000 for number in range(40)} | {"ODD": os.fsdecode(b"caf\xe9")}
    fds = {"--told-fd": told.theirs.fileno()}
    argv = (sys.executable, "-m", MODULE, "0", os.fsdecode(b"caf\xe9"))
    process = await forks.start(argv, fds, env, None, title="the title")
    facts = await told.facts()
    assert await ended(process) == 0
    assert facts["env"] == env and facts["args"] == [os.fsdecode(b"caf\xe9")]


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("raise", 1), ("signal", -signal.SIGTERM)])
async def test_how_a_child_ends_is_known(forks: ForkServer, told: Told, end: str, code: int) -> None:
    process = await start(forks, told, end)
    assert await ended(process) == code
    assert await ended(process) == code, "whoever asks later is told too"


async def test_how_a_child_ends_is_known_where_the_server_inherits_to_ignore_it(forks: ForkServer, told: Told) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = await start(forks, told, "3")
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert await ended(process) == 3


async def test_a_child_gets_signals(forks: ForkServer, told: Told) -> None:
    process = await start(forks, told, "wait")
    await told.facts()
    process.send_signal(signal.SIGKILL)
    assert await ended(process) == -signal.SIGKILL


async def test_a_server_that_hangs_hides_no_end_and_is_replaced_at_the_next_start(
    forks: ForkServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await start(forks, told, "wait")
    await told.facts()
    [hung] = _servers()
    hung.suspend()
    with monkeypatch.context() as patch:
        patch.setattr(client, "_ANSWER_S", 0.2)
        first.send_signal(signal.SIGKILL)
        assert await ended(first) is None
        second = await start(forks, told, "3")
    await told.facts()
    assert await ended(second) == 3 and not hung.is_running()


async def test_an_interrupt_ends_a_child_that_is_starting_and_says_nothing(
    forks: ForkServer, told: Told, tmp_path: Path
) -> None:
    """It has no handler yet: as an exception the interrupt could be lost behind a fork, or be told as a traceback."""
    with (tmp_path / "errors").open("wb") as errors:
        process = await start(forks, told, "wait", stderr_fd=errors.fileno())
    await told.facts()
    process.send_signal(signal.SIGINT)
    assert await ended(process) == -signal.SIGINT
    assert (tmp_path / "errors").read_text() == ""


async def test_children_go_on_without_their_server_and_the_next_start_brings_up_another(
    forks: ForkServer, told: Told
) -> None:
    first = await start(forks, told, "wait")
    await told.facts()
    [own] = _servers()
    own.kill()
    with contextlib.closing(Told()) as others:
        second = await start(forks, others, "0")
        assert (await others.facts())["imported_by"] not in (own.pid, first.pid)
        assert await ended(second) == 0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(first.wait(), 0.2)
    first.send_signal(signal.SIGTERM)
    assert await ended(first) is None, "nobody was there to see how"


async def test_a_renewed_server_imports_anew_and_the_old_one_ends_after_its_last_child(
    forks: ForkServer, told: Told
) -> None:
    first = await start(forks, told, "wait")
    before = psutil.Process((await told.facts())["imported_by"])
    forks.renew()
    with contextlib.closing(Told()) as others:
        second = await start(forks, others, "0")
        assert (await others.facts())["imported_by"] != before.pid
        assert await ended(second) == 0
    assert len(_servers()) == 2
    told.ours.send(b"x")
    assert await ended(first) == 0, "the old one saw it"
    await asyncio.to_thread(before.wait, LIMIT_S)
    assert len(_servers()) == 1


async def test_many_start_at_once(forks: ForkServer) -> None:
    all_told = [Told() for _ in range(12)]
    processes = await asyncio.gather(*(start(forks, told, str(number)) for number, told in enumerate(all_told)))
    assert await asyncio.gather(*map(ended, processes)) == list(range(12))
    assert len(_servers()) == 1
    for told in all_told:
        told.close()


async def test_a_start_that_is_given_up_leaves_the_server_well(forks: ForkServer, told: Told) -> None:
    assert await ended(await start(forks, told, "0")) == 0
    before = _servers()
    given_up = asyncio.create_task(start(forks, told, "0"))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    with contextlib.closing(Told()) as others:
        assert await ended(await start(forks, others, "7")) == 7
    assert _servers() == before


async def test_a_launcher_holds_nothing_of_a_child_that_has_ended(forks: ForkServer, told: Told) -> None:
    counts = []
    for _ in range(2):
        assert await ended(await start(forks, told, "0")) == 0
        counts.append(psutil.Process().num_fds())
    assert counts[0] == counts[1]


async def test_a_server_that_ends_while_it_is_asked_is_replaced(forks: ForkServer, told: Told) -> None:
    assert await ended(await start(forks, told, "0")) == 0
    [own] = _servers()
    own.suspend()
    second = asyncio.create_task(start(forks, told, "3"))
    await asyncio.sleep(0)
    own.kill()
    assert await ended(await second) == 3


async def test_a_close_ends_every_server_and_no_child(forks: ForkServer, told: Told) -> None:
    first = await start(forks, told, "wait")
    await told.facts()
    forks.renew()
    with contextlib.closing(Told()) as others:
        assert await ended(await start(forks, others, "0")) == 0
    assert len(_servers()) == 2
    await forks.close()
    assert not _servers()
    first.send_signal(signal.SIGKILL)
    assert await ended(first) is None


async def test_what_a_child_was_given_ends_with_it(forks: ForkServer, told: Told) -> None:
    """Its launcher sees so that it has ended."""
    process = await start(forks, told, "0")
    told.theirs.close()
    await told.facts()
    assert await ended(process) == 0
    assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(told.ours, 1), LIMIT_S) == b""


async def test_no_process_for_a_child_is_an_error_of_the_system(
    forks: ForkServer, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as none of root's is refused a fork."""

    def fork() -> NoReturn:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    asks, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reports, its_reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    start = Start(module=MODULE, imports=(), args=(), flags=(), has_stderr=False, env=(), title="")
    with asks, its_end, reports, its_reports:
        with client._file_with(start) as file:
            socket.send_fds(asks, [b"start"], [file.fileno(), its_reports.fileno()])
        asks.close()
        assert server.Server(its_end, ()).serve() is None
        report = msgspec.json.decode(reports.recv(MAX_PACKET_BYTES), type=Report)
        assert report == Refused(error="[Errno 11] Resource temporarily unavailable")
        its_reports.close()
        assert reports.recv(1) == b"", "nothing of it is held"


async def test_what_a_launcher_imports_leaves_one_thread_and_no_gpu() -> None:
    """A fork has only the thread that forks: a lock that another one held would be held for ever."""
    forks = make_fork_server(os.environ, with_workers=True)
    try:
        for program in (ROUTER_PROGRAM, WORKER_PROGRAM):
            argv = (*program, "--help")
            assert forks.can_start(argv)
            process = await forks.start(argv, {}, dict(os.environ), None, title="help")
            assert await ended(process) == 0
        [own] = _servers()
        assert own.num_threads() == 1
        assert any("libtorch" in each.path for each in own.memory_maps()), "torch was imported"
        assert not [file.path for file in own.open_files()]
        assert not any("libcuda.so" in each.path for each in own.memory_maps())
    finally:
        await forks.close()
    assert not _servers()


def test_only_its_own_programs_are_forked() -> None:
    forks = ForkServer({}, {"kvferry.router": ()})
    assert forks.can_start(ROUTER_PROGRAM)
    assert not forks.can_start(WORKER_PROGRAM)
    assert not forks.can_start((sys.executable, "stub.py", "router"))
