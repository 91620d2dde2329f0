"""What ranks say to rank 0, and it to them: each thing goes to whom it concerns. No rank is a process here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from kvferry.common.adapter import AdapterResult
from kvferry.common.errors import WorkerLost
from kvferry.engine.ranks.frames import FrameKind, FrameSocket
from kvferry.engine.ranks.group import RankGroup
from kvferry.kvcache.disk_tier import DiskResult, DiskTask

ANSWER_S = 60.0


class Others:
    """A group of three ranks, of which the others are sockets of this process."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self.lost: list[str] = []
        self.group = RankGroup(3, lambda rank, payload: self.heard.append((rank, payload)), self.lost.append)
        self.group.on_disk = self.group.on_adapter = self.heard.append
        pairs = [socket.socketpair() for _ in range(2)]
        self.group._sockets = [FrameSocket(ours) for ours, _ in pairs]
        self.sockets = [FrameSocket(theirs) for _, theirs in pairs]

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.group.close()


@pytest.fixture
def others() -> Iterator[Others]:
    others = Others()
    yield others
    others.close()


@pytest.mark.parametrize("kind", [FrameKind.FAILED, FrameKind.BROKE])
def test_what_another_rank_says_goes_to_whom_it_concerns(
    others: Others, kind: FrameKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskResult(DiskTask(True, b"1", 2, 3), "it is full", 0.5)
    adapter = AdapterResult("a", 1, "it is broken")
    for each, payload in (
        (FrameKind.USER, b"hello"),
        (FrameKind.DISK, msgspec.msgpack.encode(disk)),
        (FrameKind.ADAPTER, msgspec.msgpack.encode(adapter)),
        (kind, b"no memory"),
        (FrameKind.USER, b"goodbye"),
    ):
        others.sockets[1].send(each, payload)
    others.sockets[1].close()
    others.group.check()
    others.group._read(2)
    assert others.heard == [(2, b"hello"), disk, adapter, (2, b"goodbye")]
    assert others.lost == ["rank 2: no memory; rank 2 ended"]
    assert others.group.has_failed is (kind == FrameKind.FAILED)
    for _ in range(2):
        with pytest.raises(WorkerLost, match="group of 3: rank 2: no memory; rank 2 ended"):
            others.group.open_disks(b"")
        monkeypatch.setattr(others.group, "_send", lambda *_: None)  # as if it had ended behind that


def test_an_end_that_was_asked_for_is_no_loss(others: Others) -> None:
    reader = threading.Thread(target=others.group._read, args=(1,))
    reader.start()
    others.group.close()
    reader.join(ANSWER_S)
    assert others.sockets[0].receive() == (FrameKind.CLOSE, b"") and not others.lost
    others.group.check()


@pytest.mark.parametrize("answers", [(True, True), (True, False), (False, True)])
def test_disks_are_found_where_every_rank_has_found_its_own(others: Others, answers: tuple[bool, bool]) -> None:
    for sock, answer in zip(others.sockets, answers, strict=True):
        sock.send(FrameKind.OPEN_DISK, msgspec.msgpack.encode(answer))
    readers = [threading.Thread(target=others.group._read, args=(rank,)) for rank in (1, 2)]
    for reader in readers:
        reader.start()
    assert others.group.open_disks(b"these") is all(answers)
    for send in (others.group.send_step, others.group.broadcast, others.group.send_disk, others.group.send_adapter):
        send(b"more")
    wanted = [FrameKind.STEP, FrameKind.USER, FrameKind.DISK, FrameKind.ADAPTER]
    for sock in others.sockets:
        assert sock.receive() == (FrameKind.OPEN_DISK, b"these")
        assert [sock.receive() for _ in wanted] == [(each, b"more") for each in wanted]
    others.close()
    for reader in readers:
        reader.join(ANSWER_S)
