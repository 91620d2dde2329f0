"""Large bodies are parsed in a process of their own: a parser in this one would hold up every thread for as long.

    router ─ length, bound, bytes ─> child: `parse_json` ─ "v", length, value as MessagePack ─> router
                                                          └ "e", length, why not ─┘

The child is started when it is first needed, has bounded memory and none of the router's secrets, ends with the router,
and is replaced where it does not answer in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import struct
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import msgspec

from ..common.errors import CapacityError, RequestError
from .strict_json import MAX_COMMAS, parse_json

INLINE_BYTES = 32 * 2**10  # parsed where they are: a fraction of a millisecond
TIME_LIMIT_S = 10.0
_MEMORY_BYTES = 4 * 2**30
_REQUEST = struct.Struct(">II")  # length, bound of commas
_REPLY = struct.Struct(">cI")
_SECRET_PREFIX = "KVFERRY_"


class _Refusal(msgspec.Struct):
    """A RequestError on its way."""

    message: str
    code: str | None
    status: int


class JsonParser:
    """One large body at a time: others wait on the parser's thread, which itself only waits for the child."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="json")
        self._child: _Child | None = None

    async def parse(self, data: bytes, max_commas: int = MAX_COMMAS) -> dict[str, object]:
        """As `parse_json`. Raises CapacityError where the child failed."""
        if len(data) <= INLINE_BYTES:
            return parse_json(data, max_commas)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._parse, data, max_commas)

    def _parse(self, data: bytes, max_commas: int) -> dict[str, object]:
        child = self._child = self._child or _Child()
        try:
            kind, reply = child.ask(data, max_commas)
        except OSError:
            child.end()
            self._child = None
            raise CapacityError(f"a body of {len(data)} bytes could not be parsed", status=503) from None
        if kind == b"e":
            refusal = msgspec.msgpack.decode(reply, type=_Refusal)
            raise RequestError(refusal.message, code=refusal.code, status=refusal.status)
        return msgspec.msgpack.decode(reply, type=dict[str, object])

    def close(self) -> None:
        """End the child and the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            self._child.end()


class _Child:
    """The process. It ends when nobody refers to it any more."""

    def __init__(self) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(_SECRET_PREFIX)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvferry.router.json_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,  # a terminal's Ctrl-C is the router's to act on
        )
        self.end = weakref.finalize(self, _end, self._process)

    def ask(self, data: bytes, max_commas: int) -> tuple[bytes, bytes]:
        """Raises OSError where it ends or does not answer in time."""
        to_child, from_child = self._process.stdin, self._process.stdout
        assert to_child is not None and from_child is not None
        timer = threading.Timer(TIME_LIMIT_S, self._process.kill)
        timer.start()
        try:
            to_child.write(_REQUEST.pack(len(data), max_commas))
            to_child.write(data)
            to_child.flush()
            kind, size = _REPLY.unpack(_read(from_child, _REPLY.size))
            return kind, _read(from_child, size)
        finally:
            timer.cancel()


def _read(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise BrokenPipeError
    return data


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what it did not take
                pipe.close()
    process.wait()


def _answer(data: bytes, max_commas: int) -> tuple[bytes, bytes]:
    try:
        return b"v", msgspec.msgpack.encode(parse_json(data, max_commas))
    except RequestError as error:
        refusal = _Refusal(str(error), error.code, error.status)
    except (OverflowError, MemoryError) as error:
        what = "a number out of range" if isinstance(error, OverflowError) else "more than there is memory for"
        refusal = _Refusal(f"the body has {what}", "invalid_json", 400)
    return b"e", msgspec.msgpack.encode(refusal)


def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Until the router is gone."""
    while len(head := requests.read(_REQUEST.size)) == _REQUEST.size:
        size, max_commas = _REQUEST.unpack(head)
        data = requests.read(size)
        if len(data) < size:
            return
        kind, reply = _answer(data, max_commas)
        replies.write(_REPLY.pack(kind, len(reply)) + reply)
        replies.flush()


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    _serve(sys.stdin.buffer, sys.stdout.buffer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
