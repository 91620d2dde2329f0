"""The socket at which `kvferry status`, `reload`, `restart` and `drain` reach a running deployment (`running.ask`).

    command   {"command": "restart", "name": "d-0"}                one line
    answer    {"note": "d-0 drains"} ...                           a line for each step
              {"ok": true, ...}                                    the last line

A restart that only waits yet is given up when its asker leaves; all else is carried out. Only this user (and root) may
connect: the kernel says who it is. The socket is there while its launcher is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import structlog

from ..common.errors import KVFerryError
from .launcher import Launcher

_MAX_LINE_BYTES = 1 << 20
_COMMAND_LIMIT_S = 5.0

log = structlog.get_logger(__name__)

Answer = dict[str, object]


@contextlib.asynccontextmanager
async def command_socket(path: Path, launcher: Launcher) -> AsyncIterator[None]:
    """Take commands at `path` while the block runs."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if _uid_of(writer) in (0, os.getuid()):
                await _serve_one(reader, writer, launcher)
        writer.close()

    server = await asyncio.start_unix_server(serve, sock=_bind(path), limit=_MAX_LINE_BYTES)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(FileNotFoundError):  # a runtime folder may go at its user's logout
            os.unlink(path)


def _bind(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of an earlier process with this id
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    path.chmod(0o600)
    return sock


def _uid_of(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", peer)[1])


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, launcher: Launcher) -> None:
    def say(answer: Answer) -> None:
        if not writer.is_closing():
            writer.write(json.dumps(answer).encode() + b"\n")

    try:
        async with asyncio.timeout(_COMMAND_LIMIT_S):
            command = json.loads(await reader.readline())
    except (TimeoutError, ValueError):
        command = None
    if not isinstance(command, dict):
        say({"ok": False, "error": "no command came"})
    else:
        say(await _answer(command, reader, launcher, lambda note: say({"note": note})))
    await writer.drain()


async def _answer(
    command: Answer, reader: asyncio.StreamReader, launcher: Launcher, note: Callable[[str], None]
) -> Answer:
    """Return the last line for whoever asked, whatever happens."""
    try:
        return await _carry_out(command, reader, launcher, note)
    except KVFerryError as error:
        return {"ok": False, "error": str(error)}
    except Exception as error:
        log.exception("command_failed", command=command.get("command"))
        return {"ok": False, "error": f"{type(error).__name__}: {error}; the deployment goes on, its log has more"}


async def _carry_out(
    command: Answer, reader: asyncio.StreamReader, launcher: Launcher, note: Callable[[str], None]
) -> Answer:
    match command.get("command"):
        case "status":
            return {"ok": True, "pid": os.getpid(), **launcher.status()}
        case "reload":
            failures = await launcher.reload()
            return {"ok": not failures, "error": "; ".join(failures)}
        case "restart":
            name = command.get("name")
            restart = launcher.restart(note, str(name) if name is not None else None)
            return {"ok": await _while_asker_stays(reader, restart)}
        case "drain":
            if not launcher.is_ending:  # a second signal ends at once; who drains twice waits for the same end
                launcher.drain()
            return {"ok": True}
    return {"ok": False, "error": f"unknown command {str(command.get('command'))[:64]!r}"}


async def _while_asker_stays(reader: asyncio.StreamReader, work: Coroutine[object, object, bool]) -> bool:
    """Carry it out, and cancel it when the asker leaves."""

    async def leave() -> None:
        with contextlib.suppress(OSError):
            while await reader.read(_MAX_LINE_BYTES):
                pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
        return await working
    finally:
        working.cancel()
        leaving.cancel()
