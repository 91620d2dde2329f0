"""A connection between agents that both live breaks, as in a network that forgets idle ones, and is made again."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import pytest
import torch

from kvferry.transfer.backends.choose import open_backend
from kvferry.transfer.backends.ucx import UcxBackend

from .test_backends import SHAPE, Peer


@pytest.fixture
def peers() -> Iterator[tuple[Peer, Peer]]:
    pytest.importorskip("ucxx", exc_type=ImportError)
    peers = Peer("ucx", "p-2.0.0.0"), Peer("ucx", "d-2.0.0.0")
    yield peers
    for peer in peers:
        peer.end()


@pytest.mark.slow
def test_what_is_written_after_a_connection_broke_is_answered(peers: tuple[Peer, Peer]) -> None:
    writer, target = peers
    region = msgspec.msgpack.encode(target.region).hex()

    def write() -> object:
        target.tell("wait")
        writer.tell(f"post {region}")
        assert writer.read()["state"] == "posted"
        writer.tell("poll")
        state = writer.read()["state"]
        target.read()
        return state

    assert write() == "done"
    target.tell("cut")
    assert target.read()["num_cut"] != 0
    for peer in peers:  # both notice
        peer.tell("progress")
    for peer in peers:
        peer.read()
    assert write() == "done"


def test_a_target_keeps_no_connection_to_writers_that_ended(peers: tuple[Peer, Peer]) -> None:
    target = open_backend("ucx", "d-2.0.0.1")
    assert isinstance(target, UcxBackend)
    region = target.register(torch.zeros(SHAPE), rank=0, tp_size=1, generation=0)

    def progress_until(agent: str, *, is_reached: bool) -> None:
        deadline = time.monotonic() + 60
        while target._own.reaches(agent) != is_reached:
            assert time.monotonic() < deadline
            target.notifications()
            time.sleep(0.001)

    for peer, agent in zip(peers, ("p-2.0.0.0", "d-2.0.0.0"), strict=True):
        peer.tell(f"post {msgspec.msgpack.encode(region).hex()}")
        peer.tell("poll")
        progress_until(agent, is_reached=True)
        assert list(target._own._endpoints) == [agent]
        peer.end()
        progress_until(agent, is_reached=False)
    target.close()
