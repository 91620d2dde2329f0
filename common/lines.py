"""Lines leave by a thread where their reader may stand still, so that whoever writes one waits for nobody.

A pipe, a socket and a terminal are full while nobody reads (a pager, a log shipper that hangs, Ctrl-S), for however
long, and no question to the kernel tells beforehand whether a line fits: other processes write there too. What waits
for too slow a reader is bounded: later lines are lost, and their number is told when there is room again. A file takes
lines at once, from whoever writes them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import stat
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TextIO

_MAX_WAITING_BYTES = 1 << 20  # some thousand lines
_LAST_WORDS_S = 1.0  # in which a process that ends gets rid of its lines, if somebody reads


class _Writer:
    """The thread of a process that writes, in order, what others hand it. Thread-safe."""

    def __init__(self) -> None:
        self.on_lost: Callable[[int], object] = lambda count: None
        self.renew()

    def renew(self) -> None:
        """Begin anew: behind a fork there is no thread, and what waits is the parent's to write."""
        self._waiting: SimpleQueue[tuple[int, bytes] | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_bytes = 0  # of what waits, and of what is being written
        self._num_lost = 0
        self._lock = threading.Lock()

    def put(self, fd: int, line: bytes) -> None:
        with self._lock:
            if self._num_bytes and self._num_bytes + len(line) > _MAX_WAITING_BYTES:
                self._num_lost += 1
                return
            self._num_bytes += len(line)
        self._waiting.put((fd, line))
        if self._thread is None:
            self._start()

    def drain(self) -> None:
        """Wait until all that came before is written, for a moment at most."""
        if self._thread is None:
            return
        for _ in range(2):  # that lines were lost is told behind those that waited
            is_written = threading.Event()
            self._waiting.put(is_written)
            if not is_written.wait(_LAST_WORDS_S):
                return

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            thread = threading.Thread(target=self._run, name="lines", daemon=True)
            with contextlib.suppress(RuntimeError):  # the system has no room for one, or the interpreter ends
                thread.start()
                self._thread = thread
                return
        with contextlib.suppress(Empty):  # whoever writes waits
            while True:
                self._take(self._waiting.get_nowait())

    def _run(self) -> None:
        while True:
            self._take(self._waiting.get())

    def _take(self, item: tuple[int, bytes] | threading.Event) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        fd, line = item
        _write(fd, line)
        num_lost = 0
        with self._lock:
            self._num_bytes -= len(line)
            if self._num_bytes <= _MAX_WAITING_BYTES // 2:
                num_lost, self._num_lost = self._num_lost, 0
        if num_lost:
            self.on_lost(num_lost)


_writer = _Writer()
atexit.register(_writer.drain)  # as early as this is imported: after what others register, and may tell of
os.register_at_fork(after_in_child=_writer.renew)


class Lines:
    """A stream whose lines may get lost: that its disk is full, or its reader gone, ends nobody who serves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self._fd = _fd_of_reader(stream)

    def write(self, text: str) -> int:
        if self._fd is not None:
            _writer.put(self._fd, text.encode(self.encoding, "backslashreplace"))
        else:
            with contextlib.suppress(OSError):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back; `drain` waits until it is out."""
        if self._fd is None:
            with contextlib.suppress(OSError):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


def drain() -> None:
    """Wait until the lines of this process are out, for a moment at most: before it ends, or others write there."""
    _writer.drain()


def on_lost(tell: Callable[[int], object]) -> None:
    """Have it told, on the writer's thread, how many lines were lost."""
    _writer.on_lost = tell


def _fd_of_reader(stream: TextIO) -> int | None:
    """Return the stream's descriptor where it is no file: somebody may read at its other end, or not."""
    try:
        fd = stream.fileno()
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError):  # it is in memory
        return None
    return None if stat.S_ISREG(mode) else fd


def _write(fd: int, line: bytes) -> None:
    """Write all of it, however long that takes; none if nobody will read it any more."""
    with contextlib.suppress(OSError):
        while line:
            try:
                line = line[os.write(fd, line) :]
            except BlockingIOError:  # whoever shares the descriptor wants it so
                writable = select.poll()
                writable.register(fd, select.POLLOUT)
                writable.poll()
