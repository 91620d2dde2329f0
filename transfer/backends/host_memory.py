"""Another process's memory on this host: many pieces written or read in one system call (Linux, process_vm_writev).

    decode worker   HostMark: who and where it is ─> its agent's metadata
    prefill worker  HostWindow.open: reads the mark there ─> write ... ─> close

UCX's way between processes of a host is the same system call, one for each piece. Small pieces pay for it: measured for
12 KiB, 4.6 µs in a call of its own and 3.1 µs in a vector of 256; for 64 KiB, 12.0 and 10.6.

A window is opened only where random bytes are read back from the other process, so whatever forbids the access
(another host, another namespace of processes, the kernel's rules for tracing) means that there is none. Processes in
different network namespaces are taken for different hosts. A write has ended when the call returns: what failed does
not land later, and a process that has ended is not written to, even if another has its number by then. Nothing that
the other process does stops a write that was begun: how it makes sure that none is left is told in `rotation.py`.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import select
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ...wire.fields import U64, Count, Name
from .base import Piece

SMALL_PIECE_BYTES = 128 << 10  # on average: below it, moving the pieces together is worth the vector's making
_MARK_BYTES = 16
_MAX_PIECES = 1024  # of one call: IOV_MAX

Runs = npt.NDArray[np.uint64]  # [num_runs, 2]: address and bytes, the layout of struct iovec
_Pages = npt.NDArray[np.int32]


class HostMark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A mark that a process shows, so that others can be sure that it is its memory that they reach."""

    host: Name  # boot and network namespace
    pid: Count
    address: U64  # of `content`
    content: Annotated[bytes, msgspec.Meta(min_length=_MARK_BYTES, max_length=_MARK_BYTES)]


class Marker:
    """Our mark. It stands in memory as long as this object lives."""

    def __init__(self) -> None:
        content = secrets.token_bytes(_MARK_BYTES)
        self._buffer = ctypes.create_string_buffer(content, _MARK_BYTES)
        self.mark = HostMark(_host(), os.getpid(), ctypes.addressof(self._buffer), content)


class HostWindow:
    """The memory of one other process."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self._pid = pid
        self._pidfd: int | None = pidfd
        self._end = select.poll()
        self._end.register(pidfd, select.POLLIN)

    @classmethod
    def open(cls, mark: HostMark) -> HostWindow | None:
        """None where the process is not reached in this way."""
        if mark.host != _host() or not mark.host or not hasattr(_libc, "process_vm_writev"):
            return None
        try:
            window = cls(mark.pid, os.pidfd_open(mark.pid))
        except (OSError, OverflowError):  # no process has a number of so many bits
            return None
        if window._read_mark(mark.address) == mark.content:
            return window
        window.close()
        return None

    def _read_mark(self, address: int) -> bytes | None:
        content = ctypes.create_string_buffer(_MARK_BYTES)
        here = np.array([[ctypes.addressof(content), _MARK_BYTES]], dtype=np.uint64)
        there = np.array([[address, _MARK_BYTES]], dtype=np.uint64)
        return content.raw if _call(_libc.process_vm_readv, self._pid, here, there) == _MARK_BYTES else None

    def write(self, here: Runs, there: Runs) -> int:
        """Copy run by run, pairs of equal size. The number of bytes; OSError where not all were written."""
        return self._copy(_libc.process_vm_writev, here, there)

    def read(self, here: Runs, there: Runs) -> int:
        """The other way round. OSError where not all were read."""
        return self._copy(_libc.process_vm_readv, here, there)

    def _copy(self, function: ctypes._NamedFuncPointer, here: Runs, there: Runs) -> int:
        for start in range(0, len(here), _MAX_PIECES):
            if self._pidfd is None or self._end.poll(0):
                raise ProcessLookupError(f"process {self._pid} has ended")
            ours, theirs = here[start : start + _MAX_PIECES], there[start : start + _MAX_PIECES]
            copied, wanted = _call(function, self._pid, ours, theirs), int(ours[:, 1].sum())
            if copied != wanted:
                reason = os.strerror(ctypes.get_errno()) if copied < 0 else f"{copied} of {wanted} bytes copied"
                raise OSError(f"process {self._pid}: {reason}")
        return int(here[:, 1].sum())

    def close(self) -> None:
        """Idempotent."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


class PageArea(NamedTuple):
    """The place of pages in their process."""

    base_addr: int
    page_bytes: int
    num_pages: int

    def runs(self, pages: _Pages, counts: npt.NDArray[np.int64] | int, offset: int, num_bytes: int) -> Runs:
        """`num_bytes` times `counts` from `offset` of each of these pages on."""
        assert len(pages) and pages.min() >= 0 and pages.max() < self.num_pages, "a page outside of the pool"
        runs = np.empty((len(pages), 2), dtype=np.uint64)
        runs[:, 0] = self.base_addr + offset + pages.astype(np.uint64) * np.uint64(self.page_bytes)
        runs[:, 1] = num_bytes * counts
        return runs


def paired_runs(
    here: PageArea, local: _Pages, there: PageArea, remote: _Pages, pieces: tuple[Piece, ...]
) -> tuple[Runs, Runs]:
    """The runs of bytes that the pages' pieces are, in our memory and in theirs. Neighbours on both sides are one."""
    if pieces == (Piece(0, 0, here.page_bytes),) and here.page_bytes == there.page_bytes:
        is_first = np.ones(len(local), dtype=np.bool_)
        is_first[1:] = (np.diff(local) != 1) | (np.diff(remote) != 1)
        first = np.flatnonzero(is_first)
        counts = np.diff(first, append=len(local))
        return here.runs(local[first], counts, 0, here.page_bytes), there.runs(
            remote[first], counts, 0, here.page_bytes
        )
    ours = [here.runs(local, 1, piece.local_offset, piece.num_bytes) for piece in pieces]
    theirs = [there.runs(remote, 1, piece.remote_offset, piece.num_bytes) for piece in pieces]
    return np.concatenate(ours), np.concatenate(theirs)


class PageWindow(NamedTuple):
    """Our pages, and a peer's in its memory on this host."""

    window: HostWindow
    here: PageArea
    there: PageArea
    pieces: tuple[Piece, ...]

    @classmethod
    def open(cls, mark: HostMark, here: PageArea, there: PageArea, pieces: tuple[Piece, ...]) -> PageWindow | None:
        """None where the process is not reached in this way."""
        window = HostWindow.open(mark)
        return None if window is None else cls(window, here, there, pieces)

    def write_small(self, local_pages: Sequence[int], remote_pages: Sequence[int]) -> int | None:
        """None: the pieces are so large that each may be a call of its own. Raises OSError."""
        ours, theirs = self._runs(local_pages, remote_pages)
        return self.window.write(ours, theirs) if ours[:, 1].mean() < SMALL_PIECE_BYTES else None

    def read_small(self, local_pages: Sequence[int], remote_pages: Sequence[int]) -> int | None:
        """Read, as `write_small` writes."""
        ours, theirs = self._runs(local_pages, remote_pages)
        return self.window.read(ours, theirs) if ours[:, 1].mean() < SMALL_PIECE_BYTES else None

    def _runs(self, local_pages: Sequence[int], remote_pages: Sequence[int]) -> tuple[Runs, Runs]:
        local, remote = np.asarray(local_pages, dtype=np.int32), np.asarray(remote_pages, dtype=np.int32)
        return paired_runs(self.here, local, self.there, remote, self.pieces)


def _host() -> str:
    """Equal in two processes of one host that share its network."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    network = Path("/proc/self/ns/net")
    return f"{boot.read_text().strip()}/{network.stat().st_ino}" if boot.exists() and network.exists() else ""


_libc = ctypes.CDLL(None, use_errno=True)  # other threads run during its calls


def _call(function: ctypes._NamedFuncPointer, pid: int, here: Runs, there: Runs) -> int:
    """process_vm_readv or process_vm_writev; -1: errno tells."""
    assert here.flags.c_contiguous and there.flags.c_contiguous and len(here) == len(there)
    function.restype = ctypes.c_ssize_t
    count = ctypes.c_ulong(len(here))
    done: int = function(
        ctypes.c_int(pid), ctypes.c_void_p(here.ctypes.data), count, ctypes.c_void_p(there.ctypes.data), count,
        ctypes.c_ulong(0),
    )  # fmt: skip
    return done
