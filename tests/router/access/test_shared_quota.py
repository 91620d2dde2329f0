"""Routers that count together: real processes on one board, one that dies, one that is stopped with the lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.errors import CapacityError
from kvferry.router.access.quota import Allowance, QuotaLimits, Quotas
from kvferry.router.access.shared_accounts import SharedAccounts
from kvferry.settings import quota_board
from kvferry.settings.locks import lock
from kvferry.settings.quota_board import KEY_BYTES, BoardRow, QuotaBoard


@pytest.fixture
def board() -> Iterator[QuotaBoard]:
    board = QuotaBoard.create(3)
    yield board
    board.close()


def quotas_on(path: Path, **limits: int) -> Quotas:
    asked, clock = QuotaLimits(**limits), SystemClock()
    return Quotas(asked, clock, SharedAccounts(QuotaBoard.open(path), asked, clock))


def in_another_process(job: Callable[[], int]) -> int:
    """Run it as a router's process would, and return its small number; it ends without cleaning up."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(job())
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def entered(quotas: Quotas, tenant: bytes, tries: int) -> list[Allowance]:
    found = []
    for _ in range(tries):
        try:
            found.append(quotas.enter(tenant))
        except CapacityError:
            continue
    return found


def test_processes_at_once_let_in_as_many_as_one_may(board: QuotaBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three at once, of which each tries more than all may."""
    monkeypatch.setattr(quota_board, "_WAIT_S", 600.0)  # whoever has the lock may wait for a core here
    path, readers, began_s = board.path, [], time.monotonic()
    for _ in range(3):
        reader, writer = os.pipe()
        if not (pid := os.fork()):
            quotas = quotas_on(path, requests_per_minute=60)
            os.write(writer, b"%d" % sum(len(entered(quotas, tenant, 100)) for tenant in (b"a", b"b")))
            os._exit(0)
        os.close(writer)
        readers.append((reader, pid))
    counts = []
    for reader, pid in readers:
        counts.append(int(os.read(reader, 100)))
        os.close(reader)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    came_back = 2 * (time.monotonic() - began_s)
    assert 120 <= sum(counts) <= 122 + came_back, "60 of each, and one a second"


def test_requests_of_a_router_that_died_count_no_more_for_those_that_live_and_those_that_come(
    board: QuotaBoard,
) -> None:
    path = board.path
    quotas = quotas_on(path, max_concurrency=3)
    assert in_another_process(lambda: len(entered(quotas_on(path, max_concurrency=3), b"a", 9))) == 3
    kept = entered(quotas, b"a", 9)
    assert len(kept) == 3
    assert in_another_process(lambda: len(entered(quotas_on(path, max_concurrency=3), b"a", 9))) == 0
    kept.pop().leave()
    assert in_another_process(lambda: len(entered(quotas_on(path, max_concurrency=3), b"a", 9))) == 1


def test_a_router_with_the_process_id_of_one_that_died_takes_its_column(board: QuotaBoard) -> None:
    assert board.claim() == QuotaBoard.open(board.path).claim() == 0


def test_who_lives_is_asked_only_where_that_decides(board: QuotaBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    quotas, asked = quotas_on(board.path, max_concurrency=2), list[int]()

    def runs(pid: int) -> bool:
        asked.append(pid)
        return True

    monkeypatch.setattr(quota_board, "_runs", runs)
    entered(quotas, b"a", 2)
    assert asked == []
    assert entered(quotas, b"a", 1) == [] and asked == [os.getpid()]


def test_a_board_without_a_column_is_told_and_one_that_is_gone(board: QuotaBoard) -> None:
    readers = []
    for _ in range(6):  # two for each router
        reader, writer = os.pipe()
        if not os.fork():
            os.close(writer)
            QuotaBoard.open(board.path).claim()
            os.read(reader, 1)
            os._exit(0)
        readers.append((reader, writer))
    try:
        _until_full(board)
        with pytest.raises(OSError, match="every column of the board is taken"):
            board.claim()
    finally:
        for reader, writer in readers:
            os.close(writer)
            os.close(reader)
        for _ in readers:
            os.wait()
    with pytest.raises(FileNotFoundError):
        QuotaBoard.open(Path("/proc/self/fd/9999"))


def _until_full(board: QuotaBoard) -> None:
    for _ in range(1000):
        if all(board._memory[4 * place : 4 * place + 4] != bytes(4) for place in range(1, 7)):
            return
        time.sleep(0.01)
    raise AssertionError("the others do not come")


def test_a_router_that_is_stopped_with_the_lock_stops_no_other(
    board: QuotaBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for once, and again when it has gone on."""
    waits = list[float]()

    def noted(fd: int, *, within_s: float, look_every_s: float) -> bool:
        waits.append(within_s)
        return lock(fd, within_s=within_s, look_every_s=look_every_s)

    quotas = quotas_on(board.path, requests_per_minute=2)
    monkeypatch.setattr(quota_board, "lock", noted)
    fcntl.flock(holder := os.open(board.path, os.O_RDWR), fcntl.LOCK_EX)
    assert len(entered(quotas, b"a", 5)) == 2
    os.close(holder)
    assert entered(quotas, b"a", 2) == []
    assert [wait_s > 0 for wait_s in waits] == [True, False, False, False, False, False, True]


def test_who_goes_on_without_the_lock_changes_no_count_of_another_router(board: QuotaBoard) -> None:
    path = board.path
    accounts = SharedAccounts(QuotaBoard.open(path), QuotaLimits(max_concurrency=9), SystemClock())
    with accounts.using(b"a") as account:
        assert in_another_process(lambda: len(entered(quotas_on(path, max_concurrency=9), b"a", 3))) == 3
        account.num_running += 1
    with accounts.using(b"a") as account:
        assert account.num_running == 4


def test_as_many_tenants_as_a_board_has_rows_are_all_known(board: QuotaBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them belong where another one stands."""
    monkeypatch.setattr(quota_board, "NUM_ROWS", 4)
    quotas = quotas_on(board.path, max_concurrency=1)
    assert [len(entered(quotas, b"%d" % tenant, 1)) for tenant in range(4)] == [1, 1, 1, 1]
    assert [len(entered(quotas, b"%d" % tenant, 1)) for tenant in range(4)] == [0, 0, 0, 0]


def test_a_full_board_forgets_one_for_a_newcomer_and_never_counts_below_nothing(
    board: QuotaBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota_board, "NUM_ROWS", 4)
    quotas = quotas_on(board.path, max_concurrency=1)
    kept = [quotas.enter(b"%d" % tenant) for tenant in range(20)]
    for allowance in kept:
        allowance.leave()
    rows = [board.find(b"%d" % tenant + bytes(KEY_BYTES - 1)) for tenant in range(3)]
    assert all(row == BoardRow(None, [0] * 6) for _, row in rows)
    for tenant in range(20):
        quotas.enter(b"%d" % tenant).leave()
