"""Both network backends between two processes: the same tests, byte for byte."""

from __future__ import annotations

import hashlib
import itertools
import json
import select
import socket
import sys
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
import torch
from structlog.testing import capture_logs

from kvferry.common.errors import ConfigError, TransferError
from kvferry.transfer.backends.base import (
    Piece,
    TransferBackend,
    TransferHandle,
    TransferState,
    page_rows,
    rotated_name,
)
from kvferry.transfer.backends.choose import open_backend, set_ucx_defaults
from kvferry.transfer.backends.nixl import NixlBackend
from kvferry.transfer.backends.nixl_api import load_api
from kvferry.transfer.backends.ucx import UcxBackend
from kvferry.wire.grants import RegionInfo

from ...forks import Forks
from .peer_forks import PEERS

LAYERS, BLOCKS = 4, 32
SHAPE = [LAYERS, BLOCKS, 2, 3, 16, 64]  # pages of 24 KiB
PAGE_BYTES = 2 * 3 * 16 * 64 * 4
WHOLE = (Piece(0, 0, PAGE_BYTES),)
HEAD_BYTES = PAGE_BYTES // 6

set_ucx_defaults("127.0.0.1")
_incarnations = itertools.count(1)  # agent names are never used again


class Peer:
    """A process that runs backend_peer.py."""

    def __init__(self, name: str, agent: str) -> None:
        script = Path(__file__).parent / "backend_peer.py"
        self.process = PEERS[name].Popen(
            [sys.executable, str(script), name, agent, json.dumps(SHAPE)],
            stdin=Forks.PIPE,
            stdout=Forks.PIPE,
            text=True,
        )
        self.region = msgspec.msgpack.decode(bytes.fromhex(str(self.read()["region"])), type=RegionInfo)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, object]:
        """The next line of JSON; libraries print lines of their own."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                value: dict[str, object] = json.loads(line)
                return value
        raise AssertionError("the peer process ended")

    def has_answered(self, within_s: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["nixl", "ucx"], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("ucxx" if request.param == "ucx" else "nixl_cu12", exc_type=ImportError)
    return str(request.param)


@pytest.fixture
def backend(name: str) -> Iterator[TransferBackend]:
    backend = open_backend(name, f"p-0.{next(_incarnations)}.0.0")
    yield backend
    backend.close()
    backend.close()


@pytest.fixture
def pages() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def peer(name: str) -> Iterator[Peer]:
    """One process for all tests of a backend; each begins with pages of zeros."""
    peer = Peer(name, "d-0.0.0.0")
    yield peer
    peer.end()


@pytest.fixture(autouse=True)
def _zeros(request: pytest.FixtureRequest) -> None:
    if "peer" in request.fixturenames:
        peer = request.getfixturevalue("peer")
        peer.tell("clear")
        peer.read()


def _until_ended(backend: TransferBackend, handle: TransferHandle) -> TransferState:
    deadline = time.monotonic() + 20
    while (state := backend.poll(handle)) is TransferState.PENDING:
        assert time.monotonic() < deadline, "the write neither ends nor fails"
        time.sleep(0.0002)
    return state


def _write_and_wait(backend: TransferBackend, peer: Peer, local: list[int], remote: list[int]) -> str:
    """Ship pages with a notification; the hash of the peer's pages afterwards."""
    peer.tell("wait")
    handle = backend.write(peer.region.agent, local, remote, b"arrived")
    assert _until_ended(backend, handle) is TransferState.DONE
    backend.release(handle)
    backend.release(handle)
    answer = peer.read()
    assert answer["notifications"] == [[backend.agent, b"arrived".hex()]]
    return str(answer["digest"])


def _digest(rows: torch.Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_pages_arrive_byte_exact_and_telemetry_counts_them(
    backend: TransferBackend, peer: Peer, pages: torch.Tensor
) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    backend.connect(peer.region, WHOLE)
    local_blocks, remote_blocks = [3, 4, 5, 9], [20, 21, 7, 0]
    local = [layer * BLOCKS + block for layer in range(LAYERS) for block in local_blocks]
    remote = [layer * BLOCKS + block for layer in range(LAYERS) for block in remote_blocks]
    expected = torch.zeros(LAYERS * BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    expected[remote] = page_rows(pages)[local]
    assert _write_and_wait(backend, peer, local, remote) == _digest(expected)
    assert backend.telemetry_bytes == len(local_blocks) * LAYERS * PAGE_BYTES


@pytest.mark.slow
def test_pages_are_read_byte_exact_into_their_places(backend: TransferBackend, peer: Peer, pages: torch.Tensor) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    peer.tell("number")
    peer.read()
    local, remote = [3, 4, 5, 9, 127], [20, 21, 7, 0, 99]
    expected = pages.clone().view(LAYERS * BLOCKS, -1)
    expected[local] = torch.tensor(remote, dtype=torch.float32)[:, None]
    peer.tell("progress")
    handle = backend.read(peer.region.agent, local, remote)
    assert _until_ended(backend, handle) is TransferState.DONE
    backend.release(handle)
    peer.read()
    assert torch.equal(pages.view(LAYERS * BLOCKS, -1), expected)
    assert backend.telemetry_bytes == handle.num_bytes == len(local) * PAGE_BYTES


@pytest.mark.slow
def test_a_large_contiguous_read_is_one_piece(backend: TransferBackend, peer: Peer, pages: torch.Tensor) -> None:
    """Too large for the vector of small pieces that NIXL's backend reads by itself."""
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    peer.tell("number")
    peer.read()
    every = list(range(LAYERS * BLOCKS))
    peer.tell("progress")
    handle = backend.read(peer.region.agent, every, every)
    assert _until_ended(backend, handle) is TransferState.DONE
    backend.release(handle)
    peer.read()
    assert torch.equal(pages.view(LAYERS * BLOCKS, -1)[:, 0], torch.arange(LAYERS * BLOCKS, dtype=torch.float32))


def test_reading_from_an_unknown_agent_is_refused(backend: TransferBackend, pages: torch.Tensor) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    with pytest.raises(TransferError, match="not connected"):
        backend.read("d-9.1.0.0", [0], [0])


@pytest.mark.slow
def test_a_read_from_a_dead_peer_fails(name: str, pages: torch.Tensor) -> None:
    peer = Peer(name, f"d-0.{next(_incarnations)}.0.0")
    backend = open_backend(name, f"p-0.{next(_incarnations)}.0.0")
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    peer.end()
    every = list(range(LAYERS * BLOCKS))
    for pages_read in (every, every[::3]):
        try:
            handle = backend.read(peer.region.agent, pages_read, pages_read)
        except TransferError:
            continue
        assert _until_ended(backend, handle) is TransferState.FAILED
        backend.release(handle)
    backend.close()


@pytest.mark.slow
def test_head_slices_land_in_their_places(backend: TransferBackend, peer: Peer, pages: torch.Tensor) -> None:
    """One head of K and of V, to another place in the peer's page."""
    backend.register(pages, rank=0, tp_size=1, generation=0)
    runs = (Piece(2 * HEAD_BYTES, 0, HEAD_BYTES), Piece(5 * HEAD_BYTES, 3 * HEAD_BYTES, HEAD_BYTES))
    backend.connect(peer.region, runs)
    local, remote = [1, 2, 40, 127], [6, 5, 100, 3]
    expected = torch.zeros(LAYERS * BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    for ours, theirs in zip(local, remote, strict=True):
        for run in runs:
            source = page_rows(pages)[ours, run.local_offset : run.local_offset + run.num_bytes]
            expected[theirs, run.remote_offset : run.remote_offset + run.num_bytes] = source
    assert _write_and_wait(backend, peer, local, remote) == _digest(expected)
    assert backend.telemetry_bytes == 4 * 2 * HEAD_BYTES


@pytest.mark.slow
def test_pages_of_a_process_of_this_host_are_written_without_its_help(pages: torch.Tensor) -> None:
    """In one call where they are scattered; its agent never makes progress."""
    pytest.importorskip("nixl_cu12", exc_type=ImportError)
    peer = Peer("nixl", f"d-0.{next(_incarnations)}.0.0")
    backend = NixlBackend(f"p-0.{next(_incarnations)}.0.0")
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    local = list(range(0, 120, 3))
    remote = local[::-1]
    if backend._peers[peer.region.agent].window is None:
        pytest.skip("this kernel does not let processes write to each other's memory")
    handle = backend.write(peer.region.agent, local, remote)
    assert backend.poll(handle) is TransferState.DONE
    backend.release(handle)
    expected = torch.zeros(LAYERS * BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    expected[remote] = page_rows(pages)[local]
    peer.tell("show")
    assert peer.read()["digest"] == _digest(expected)
    assert backend.telemetry_bytes == len(local) * PAGE_BYTES
    window = backend._peers[peer.region.agent].window
    peer.end()
    with pytest.raises(TransferError, match="has ended") as caught:
        backend.write(peer.region.agent, local, remote)
    assert caught.value.peer == peer.region.agent
    backend.close()
    assert window is not None and window.window._pidfd is None


def test_notification_of_its_own_reaches_the_peer(backend: TransferBackend, peer: Peer, pages: torch.Tensor) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    peer.tell("wait")
    backend.notify(peer.region.agent, b"hello")
    while not peer.has_answered(0.001):
        assert backend.notifications() == []  # a first message needs progress on both sides
    assert peer.read()["notifications"] == [[backend.agent, b"hello".hex()]]


@pytest.mark.slow
def test_writes_to_a_killed_peer_fail(name: str) -> None:
    """The writer loads one library, as a worker does. This process has both, and so two copies of UCX with hooks of
    their own around memory: the second may get no cache of registered memory, and then ends the process where it gives
    up a write to a dead peer (UCX 1.21, `ucs_rcache_region_invalidate` without a cache).
    """
    writer, peer = Peer(name, "p-1.0.0.0"), Peer(name, "d-1.0.0.0")
    region = msgspec.msgpack.encode(peer.region).hex()

    def write() -> str:
        writer.tell(f"post {region}")
        state = str(writer.read()["state"])
        if state == "posted":
            writer.tell("poll")
            state = str(writer.read()["state"])
        return state

    peer.tell("wait")
    assert write() == "done"
    peer.end()
    states = [write()]
    while states[-1] == "done" and len(states) < 1000:
        states.append(write())
    writer.end()
    assert states[-1] == "failed" or (states[-1].startswith("raised: ") and "d-1.0.0.0" in states[-1])


@pytest.mark.slow
def test_a_write_is_done_where_nixl_counts_nothing(
    peer: Peer, pages: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an operator may have it. It is asked once: it prints a line whenever it is."""
    monkeypatch.setenv("NIXL_TELEMETRY_ENABLE", "n")
    backend = open_backend(name, f"p-0.{next(_incarnations)}.0.0")
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    with capture_logs() as logs:
        for _ in range(2):
            _write_and_wait(backend, peer, [3, 4], [20, 21])
    assert backend.telemetry_bytes == 4 * PAGE_BYTES
    assert [line["event"] for line in logs] == ["nixl_counts_no_bytes"] * (name == "nixl")
    backend.close()


@pytest.mark.slow
def test_without_an_interface_there_is_no_agent_and_later_there_is_one(
    backend: TransferBackend, peer: Peer, pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(peer.region, WHOLE)
    every = list(range(LAYERS * BLOCKS))
    under_way = backend.read(peer.region.agent, every, every)
    monkeypatch.setenv("UCX_NET_DEVICES", "nosuch0")
    with pytest.raises(TransferError, match="making an agent"):
        backend.rotate(1)
    with pytest.raises(TransferError, match="no agent here") as caught:
        backend.connect(peer.region, WHOLE)
    assert not caught.value.may_land
    agent = peer.region.agent
    for post in (backend.write, backend.read):
        with pytest.raises(TransferError, match=agent):
            post(agent, [0], [0])
    with pytest.raises(TransferError, match=agent):
        backend.notify(agent, b"")
    assert backend.notifications() == []
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    backend.rotate(2)
    backend.connect(peer.region, WHOLE)
    assert backend.poll(under_way) is TransferState.FAILED, "it went with its agent"
    expected = torch.zeros(LAYERS * BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    expected[20] = page_rows(pages)[3]
    assert _write_and_wait(backend, peer, [3], [20]) == _digest(expected)


def test_an_agent_whose_pages_cannot_be_registered_is_none(
    pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nixl_cu12", exc_type=ImportError)
    backend = NixlBackend(f"p-0.{next(_incarnations)}.0.0")
    region = backend.register(pages, rank=0, tp_size=1, generation=0)
    open_agent, error = backend._api.open_agent, backend._api.errors[0]

    class Unable:
        def __init__(self, name: str) -> None:
            self._agent = open_agent(name)

        def register_memory(self, pages: torch.Tensor) -> None:
            raise error("no memory can be pinned")

    with monkeypatch.context() as patched:
        patched.setattr(backend._api, "open_agent", Unable)
        with pytest.raises(TransferError, match="registering the KV pages"):
            backend.rotate(1)
    with pytest.raises(TransferError, match="no agent here"):
        backend.connect(region, WHOLE)
    assert backend.rotate(2).generation == 2
    backend.close()


def test_an_agent_that_lacks_a_network_device_is_told(
    name: str, pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = psutil.net_if_stats()
    names = [
        device
        for device, known in psutil.net_if_addrs().items()
        if device != "lo" and states[device].isup and any(address.family is socket.AF_INET for address in known)
    ]
    if not names:
        pytest.skip("this machine has the loopback alone")
    monkeypatch.setenv("UCX_NET_DEVICES", f"lo,{names[0]}")
    backend = open_backend(name, f"d-0.{next(_incarnations)}.0.0")
    backend.register(pages, rank=0, tp_size=1, generation=0)
    told = []
    for generation, devices in enumerate(("lo", f"lo,{names[0]}", f"lo,{names[0]}"), 1):
        monkeypatch.setenv("UCX_NET_DEVICES", devices)
        with capture_logs() as logs:
            backend.rotate(10 * generation)  # its name may grow
        told.append([line["agent"] for line in logs if line["event"] == "transfer_agent_lacks_devices"])
    assert told == [[rotated_name(backend.agent, 10)], [], []]
    backend.close()


def test_a_write_that_could_not_be_posted_leaves_nothing_behind(pages: torch.Tensor) -> None:
    pytest.importorskip("ucxx", exc_type=ImportError)
    backend = UcxBackend(f"p-0.{next(_incarnations)}.0.0")
    region = backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(region, WHOLE)
    under_way = backend.write(region.agent, [0], [0])
    backend._own.forget(region.agent)  # as one whose connection has broken
    with pytest.raises(TransferError, match="not reached"):
        backend.write(region.agent, [0], [0])
    assert list(backend._handles.values()) == [under_way]
    backend.connect(region, WHOLE)
    assert backend.poll(under_way) is TransferState.FAILED, "its answer would come over the connection before"
    backend.close()


@pytest.mark.parametrize("piece", [Piece(0, PAGE_BYTES, 4), Piece(0, 0, PAGE_BYTES)], ids=["offset", "page"])
def test_what_a_target_does_not_have_is_neither_written_nor_read(piece: Piece, pages: torch.Tensor) -> None:
    pytest.importorskip("ucxx", exc_type=ImportError)
    backend = UcxBackend(f"p-0.{next(_incarnations)}.0.0")
    region = backend.register(pages, rank=0, tp_size=1, generation=0)
    before = pages.clone()
    backend.connect(region, (piece,))
    place = LAYERS * BLOCKS - (piece.remote_offset > 0)
    for handle in (backend.write(region.agent, [0], [place], b"arrived"), backend.read(region.agent, [0], [place])):
        assert _until_ended(backend, handle) is TransferState.FAILED
        backend.release(handle)
    assert torch.equal(pages, before) and backend.notifications() == [] and backend.telemetry_bytes == 0
    backend.close()


def test_a_read_that_ends_without_its_bytes_leaves_them_a_buffer(
    pages: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a peer may have it that says so wrongly: what it sends later must land in nobody else's memory."""
    pytest.importorskip("ucxx", exc_type=ImportError)
    backend = UcxBackend(f"p-0.{next(_incarnations)}.0.0")
    region = backend.register(pages, rank=0, tp_size=1, generation=0)
    backend.connect(region, WHOLE)
    for num_bytes, state in ((0, TransferState.FAILED), (PAGE_BYTES, TransferState.DONE)):
        say = partial(backend._target._answer, num_bytes=num_bytes)
        monkeypatch.setattr(backend._target, "on_read", lambda read, say=say: say(read.agent, read.read_id))
        handle = backend.read(region.agent, [0], [1])
        staging = weakref.ref(backend._reading[0].incoming.staging.untyped_storage())
        assert _until_ended(backend, handle) is state and not backend._reading
        assert staging() is not None
    backend.close()


def test_metadata_that_is_not_a_peers_is_refused(backend: TransferBackend, peer: Peer, pages: torch.Tensor) -> None:
    backend.register(pages, rank=0, tp_size=1, generation=0)
    region = msgspec.structs.replace(peer.region, agent_metadata=b"\x00" * 8)
    if backend.name == "nixl":
        with pytest.raises(TransferError):
            backend.connect(region, WHOLE)
        with pytest.raises(TransferError, match="names"):
            backend.connect(msgspec.structs.replace(peer.region, agent="d-2.0.0.0"), WHOLE)


def test_missing_package_names_the_pip_line() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'nixl-cu1[23]=="):
        load_api(["no_such_nixl"])
    with pytest.raises(ConfigError, match="not one of"):
        open_backend("rdma", "p-0.1.0.0")
