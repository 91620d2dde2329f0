"""The fence itself, between processes: what was on its way to an agent that was replaced goes nowhere."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from kvferry.common.errors import TransferError
from kvferry.transfer.backends.base import Piece, TransferState, is_same_rank, rotated_name
from kvferry.transfer.backends.choose import allows_own_copies
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.wire.grants import RegionInfo

from ...forks import Forks
from .peer_forks import PEERS

SHAPE = [4, 256, 2, 4, 16, 64]  # 32 MiB in pages of 32 KiB: more than sockets hold
NUM_BYTES = 16 << 20  # of a page of ones, every second byte is zero
_incarnations = itertools.count(900)
_generations = itertools.count(1)


class Process:
    """One end, in a process of its own that knows no way but TCP."""

    def __init__(self, name: str, worker: str) -> None:
        script = Path(__file__).parent / "backend_peer.py"
        self.popen = PEERS[name].Popen(
            [sys.executable, str(script), name, f"{worker}.{next(_incarnations)}.0.0", json.dumps(SHAPE)],
            stdin=Forks.PIPE,
            stdout=Forks.PIPE,
            stderr=Forks.DEVNULL,  # UCX says that its peers are gone
            text=True,
            env={**os.environ, "UCX_TLS": "tcp", "OMP_NUM_THREADS": "1"},
        )
        self.region = str(self.read()["region"])

    def read(self) -> dict[str, object]:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{"):
                value: dict[str, object] = json.loads(line)
                return value
        raise AssertionError("the process ended")

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def ask(self, line: str) -> dict[str, object]:
        self.tell(line)
        return self.read()

    def rotate(self, generation: int) -> RegionInfo:
        self.region = str(self.ask(f"rotate {generation}")["region"])
        return msgspec.msgpack.decode(bytes.fromhex(self.region), type=RegionInfo)

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


@pytest.fixture(params=["nixl", "ucx"], scope="module")
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("ucxx" if request.param == "ucx" else "nixl_cu12", exc_type=ImportError)
    return str(request.param)


@pytest.fixture(scope="module")
def target(name: str) -> Iterator[Process]:
    """One for all tests of a backend: it is rotated again and again anyway."""
    process = Process(name, "d-0")
    yield process
    process.end()


@pytest.fixture
def writer(name: str) -> Iterator[Process]:
    process = Process(name, "p-0")
    process.ask("fill")
    yield process
    process.end()


def _write(writer: Process, target: Process, region: str) -> tuple[object, object]:
    """A whole write, both ends making progress: how it ended, and how many bytes came."""
    posted = writer.ask(f"post {region}")["state"]
    target.tell("progress")
    state = writer.ask("poll")["state"] if posted == "posted" else posted
    return state, target.read()["num_written"]


@pytest.mark.slow
def test_an_old_agent_is_not_written_to_and_a_new_one_is_again_and_again(writer: Process, target: Process) -> None:
    for _ in range(2):
        assert _write(writer, target, target.region) == ("done", NUM_BYTES)
        old = target.region
        target.ask("clear")
        generation = next(_generations)
        new = target.rotate(generation)
        assert (new.generation, new.agent.rsplit(".", 2)[1]) == (generation, str(generation))
        state, num_written = _write(writer, target, old)
        assert state != "done" and num_written == 0
    assert _write(writer, target, target.region) == ("done", NUM_BYTES)
    target.ask("clear")
    assert writer.ask(f"post {target.region}") == {"state": "posted"}  # sockets are full of it
    target.rotate(next(_generations))
    target.tell("progress")
    assert writer.ask("poll")["state"] == "failed"
    assert target.read()["num_written"] == 0


@pytest.mark.slow
def test_what_a_killed_writer_left_in_sockets_does_not_land_after_a_rotation(writer: Process, target: Process) -> None:
    """Without one, megabytes of it may: the kernel sends them, and the target's next progress applies them."""
    assert _write(writer, target, target.region) == ("done", NUM_BYTES)
    target.ask("clear")
    assert writer.ask(f"post {target.region}") == {"state": "posted"}
    writer.end()
    target.rotate(next(_generations))
    assert target.ask("progress")["num_written"] == 0


# --- without processes ----------------------------------------------------------------------------------------------


def test_a_rotated_name_differs_in_the_generation_alone() -> None:
    assert rotated_name("host.example-12.ab34.0.3", 7) == "host.example-12.ab34.7.3"


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("d-0.ab.0.1", "d-0.ab.7.1", True),
        ("d-0.ab.0.1", "d-0.ab.0.1", True),
        ("d-0.ab.0.1", "d-0.ab.7.2", False),  # another rank
        ("d-0.ab.0.1", "d-0.ac.7.1", False),  # another life
        ("host.a.ab.0.1", "host.b.ab.0.1", False),
        ("d-0", "d-0", True),  # no names of ours, but others make them
        ("a.b", "a.c", False),
        ("", "a.0.0", False),
    ],
)
def test_agents_of_one_rank_are_told_by_their_names(one: str, other: str, is_same: bool) -> None:
    assert is_same_rank(one, other) is is_same_rank(other, one) is is_same


def test_a_backend_that_cannot_make_an_agent_may_try_again() -> None:
    network = LocalNetwork()
    backend = LocalBackend("d-0.1.0.0", network)
    backend.register(torch.zeros(1, 2, 2, 1, 1, 1), rank=0, tp_size=1, generation=0)
    other = LocalBackend("d-1.1.0.0", network)
    region = other.register(torch.zeros(1, 2, 2, 1, 1, 1), rank=0, tp_size=1, generation=0)
    runs = (Piece(0, 0, region.page_bytes),)
    backend.connect(region, runs)
    network.can_make_agents = False
    with pytest.raises(TransferError, match="no interface"):
        backend.rotate(1)
    assert network.agents == {"d-1.1.0.0": other} and backend.notifications() == []
    for use in (lambda: backend.connect(region, runs), lambda: backend.write(region.agent, [0], [0])):
        with pytest.raises(TransferError, match="no agent here") as caught:
            use()
        assert not caught.value.may_land
    network.can_make_agents = True
    assert backend.rotate(2).agent == "d-0.1.2.0"
    backend.connect(region, runs)
    assert backend.poll(backend.read(region.agent, [0], [0])) is TransferState.DONE


@pytest.mark.parametrize(
    ("transports", "copies"),
    [
        ("all", True),
        ("tcp", False),
        ("tcp,self,rc_mlx5", False),
        ("tcp,cuda_copy,cuda_ipc", True),
        ("sm,tcp", True),
        ("^sm", True),
        ("^sm,cuda", False),
        ("^cma", True),
        ("something_new", True),
    ],
)
def test_in_doubt_a_process_is_taken_to_copy_by_itself(transports: str, copies: bool) -> None:
    assert allows_own_copies(transports) is copies
