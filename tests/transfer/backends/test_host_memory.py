"""Writing into the memory of a process of this host; most tests take their own process for the other one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from kvferry.transfer.backends.base import Piece
from kvferry.transfer.backends.choose import allows_host_memory
from kvferry.transfer.backends.host_memory import HostMark, HostWindow, Marker, PageArea, Runs, paired_runs

PAGE = 64
CHILD = """
import json, sys, msgspec
from kvferry.transfer.backends.host_memory import Marker
marker = Marker()
print(json.dumps(msgspec.to_builtins(marker.mark)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def marker() -> Marker:
    return Marker()


@pytest.fixture
def window(marker: Marker) -> Iterator[HostWindow]:
    window = HostWindow.open(marker.mark)
    if window is None:
        pytest.skip("this kernel does not let processes write to each other's memory")
    yield window
    window.close()
    window.close()


def _area(pages: np.ndarray) -> PageArea:
    return PageArea(pages.ctypes.data, PAGE, len(pages))


def _int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def _pairs(runs: Runs, area: PageArea) -> list[tuple[int, int]]:
    return [(int(address) - area.base_addr, int(num_bytes)) for address, num_bytes in runs]


def test_thousands_of_pieces_arrive_where_they_belong(window: HostWindow) -> None:
    rng = np.random.default_rng(1)
    ours = rng.integers(0, 256, (3000, PAGE), dtype=np.uint8)
    theirs = np.zeros_like(ours)
    local, remote = rng.permutation(3000).astype(np.int32), rng.permutation(3000).astype(np.int32)
    whole = (Piece(0, 0, PAGE),)
    assert window.write(*paired_runs(_area(ours), local, _area(theirs), remote, whole)) == ours.nbytes
    assert np.array_equal(theirs[remote], ours[local])


def test_neighbours_on_both_sides_are_one_run() -> None:
    here, there = PageArea(1000, PAGE, 100), PageArea(9000, PAGE, 100)
    local, remote = _int32(3, 4, 5, 7, 8, 9), _int32(13, 14, 20, 21, 22, 24)
    ours, theirs = paired_runs(here, local, there, remote, (Piece(0, 0, PAGE),))
    assert _pairs(ours, here) == [(3 * PAGE, 2 * PAGE), (5 * PAGE, PAGE), (7 * PAGE, 2 * PAGE), (9 * PAGE, PAGE)]
    assert [start for start, _ in _pairs(theirs, there)] == [13 * PAGE, 20 * PAGE, 21 * PAGE, 24 * PAGE]


def test_parts_of_pages_are_a_run_each() -> None:
    here, there = PageArea(0, PAGE, 10), PageArea(0, 2 * PAGE, 10)
    pieces = (Piece(0, 32, 16), Piece(32, 96, 16))
    ours, theirs = paired_runs(here, _int32(1, 2), there, _int32(5, 6), pieces)
    assert _pairs(ours, here) == [(64, 16), (128, 16), (96, 16), (160, 16)]
    assert _pairs(theirs, there) == [(672, 16), (800, 16), (736, 16), (864, 16)]


@pytest.mark.parametrize("page", [-1, 10])
def test_pages_outside_of_the_pool_are_our_bug(page: int) -> None:
    area = PageArea(0, PAGE, 10)
    with pytest.raises(AssertionError, match="outside of the pool"):
        paired_runs(area, _int32(page), area, _int32(0), (Piece(0, 0, PAGE),))


def test_memory_that_is_not_there_fails_the_write(window: HostWindow) -> None:
    ours = np.zeros((1, PAGE), dtype=np.uint8)
    with pytest.raises(OSError, match="process"):
        window.write(_area(ours).runs(_int32(0), 1, 0, PAGE), np.array([[0, PAGE]], dtype=np.uint64))


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"?" * 16},
        {"host": "another"},
        {"host": ""},
        {"pid": 2**22 + 1},
        {"pid": 2**31},
        {"address": 8},
    ],
)
def test_a_mark_that_is_not_found_opens_nothing(marker: Marker, change: dict[str, object]) -> None:
    assert HostWindow.open(msgspec.structs.replace(marker.mark, **change)) is None


def test_a_process_that_has_ended_is_not_written_to(window: HostWindow) -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdin is not None
        mark = msgspec.convert(json.loads(child.stdout.readline()), HostMark)
        theirs = HostWindow.open(mark)
        assert theirs is not None
        ours = np.zeros((1, 16), dtype=np.uint8)
        run = np.array([[ours.ctypes.data, 16]], dtype=np.uint64)
        there = np.array([[mark.address, 16]], dtype=np.uint64)
        assert theirs.write(run, there) == 16
        assert HostWindow.open(mark) is None  # its mark is overwritten
        child.stdin.close()
        child.wait(20)
    with pytest.raises(ProcessLookupError, match=str(mark.pid)):
        theirs.write(run, there)
    theirs.close()
    with pytest.raises(ProcessLookupError):
        theirs.write(run, there)


@pytest.mark.parametrize(
    ("transports", "is_allowed"),
    [("all", True), ("sm,tcp", True), ("cma,posix,self", True), ("tcp", False), ("^cma", False), ("^ib", True)],
)
def test_the_operators_choice_of_transports_is_respected(transports: str, is_allowed: bool) -> None:
    assert allows_host_memory(transports) is is_allowed
