"""A connection between agents that both live breaks, as in a network that forgets idle ones, and is made again."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from .test_backends import Peer


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
