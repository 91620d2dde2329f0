"""The device's one stream: work is done when it is launched, but the host may know of it only after a wait."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

COUNTS = Counter[str]()  # of this process: launches, waits, uploads, pageable uploads, downloads, replays, captures
_ELAPSED_MS = 0.5  # between any two events: times mean nothing here


class Race(AssertionError):
    """The host and the stream use the same memory in an order that nobody has settled."""


class _Pending(NamedTuple):
    """An effect that the host sees once the stream has come so far."""

    position: int
    is_download: bool
    settle: Callable[[], object]


class Stream:
    """Positions count what was launched."""

    cuda_stream = 0

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.launched = 0
        self.passed = 0  # the host has waited for so much
        self._pending: list[_Pending] = []

    def push(self, settle: Callable[[], object] | None = None, *, is_download: bool = False) -> int:
        self.launched += 1
        if settle is not None:
            self._pending.append(_Pending(self.launched, is_download, settle))
        return self.launched

    def pass_to(self, position: int) -> None:
        self.passed = max(self.passed, position)
        self._settle(lambda pending: pending.position <= position)

    def settle_downloads(self) -> None:
        """Let downloads land: in the stream's order they come before an upload from the memory they went to."""
        self._settle(lambda pending: pending.is_download)

    def _settle(self, is_due: Callable[[_Pending], bool]) -> None:
        due = [pending for pending in self._pending if is_due(pending)]
        self._pending = [pending for pending in self._pending if not is_due(pending)]
        for pending in due:
            pending.settle()

    def synchronize(self) -> None:
        wait("a stream")


STREAM = Stream()


def wait(what: str) -> None:
    """Have the host wait for all that was launched."""
    forbid_in_capture(f"waiting for {what}")
    COUNTS["waits"] += 1
    STREAM.pass_to(STREAM.launched)


class Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._is_timed = enable_timing
        self._position: int | None = None

    def record(self, stream: object = None) -> None:
        self._position = STREAM.push()

    def synchronize(self) -> None:
        forbid_in_capture("waiting for an event")
        if self._position is not None:
            STREAM.pass_to(self._position)

    def query(self) -> bool:
        return self._position is None or self._position <= STREAM.passed

    def elapsed_time(self, later: Event) -> float:
        for event in (self, later):
            if not event._is_timed or event._position is None:
                raise RuntimeError("elapsed_time of an event that is not timed or was never recorded")
            if not event.query():
                raise RuntimeError("elapsed_time of an event that the host has not waited for: device not ready")
        return _ELAPSED_MS


# --- graphs -----------------------------------------------------------------------------------------------------


class CUDAGraph:
    """Stands for torch.cuda.CUDAGraph: the launches of a capture, made again over the same memory by `replay`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.launches: list[Callable[[], object]] | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        forbid_in_capture("a capture")
        _capture.launches = []

    def capture_end(self) -> None:
        COUNTS["captures"] += 1
        self.launches, _capture.launches = _capture.launches, None

    def replay(self) -> None:
        forbid_in_capture("a replay")
        if self.launches is None:
            raise RuntimeError("replay of a graph that was never captured")
        COUNTS["replays"] += 1
        STREAM.push()
        for launch_again in self.launches:
            launch_again()


class _Capture(threading.local):
    """A thread captures into its own graph, as with `capture_error_mode="thread_local"`."""

    launches: list[Callable[[], object]] | None = None


_capture = _Capture()


class graph:
    """Stands for torch.cuda.graph."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: object = None, stream: object = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph = cuda_graph

    def __enter__(self) -> None:
        wait("the device, before a capture")
        self._graph.capture_begin()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._graph.capture_end()


def is_capturing() -> bool:
    return _capture.launches is not None


def forbid_in_capture(what: str) -> None:
    if is_capturing():
        raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def note_launch(launch_again: Callable[[], object] | None) -> None:
    """Count a launch that was made, and keep it for the graph that is captured. None: it leaves nothing to repeat."""
    COUNTS["launches"] += 1
    STREAM.push()
    if _capture.launches is not None and launch_again is not None:
        _capture.launches.append(launch_again)


def launch(kernel: Callable[[], object]) -> None:
    """Run a kernel now, and at each replay of the graph that is captured."""
    kernel()
    note_launch(kernel)
