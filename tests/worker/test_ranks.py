"""A worker's other ranks: one that ends at the start says why and is not waited for; all log as their worker does."""

from __future__ import annotations

import json
import queue
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from kvferry.common.config import EngineConfig, LogLevel, WorkerConfig
from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.engine.engine import Engine
from kvferry.engine.follower import FollowerHandler
from kvferry.engine.ranks.group import RankGroup
from kvferry.wire.credentials import NO_SECRET
from kvferry.wire.lifeline import MAX_EVENT_BYTES, Lifeline, decode_event, lifeline_pair
from kvferry.worker.process import serve_worker
from kvferry.worker.ranks import Followers

from ..checkpoints import write_checkpoint
from ..engine_driver import engine_config


def fail(engine: Engine, config: bytes, send: Callable[[bytes], None]) -> FollowerHandler:
    """What a rank runs that has no network."""
    raise ConfigError("no device for transfers")


_FAIL = "kvferry.tests.worker.test_ranks:fail"


def _spawning(fault: str) -> Callable[..., None]:
    """Start ranks with something wrong."""
    spawn = RankGroup._spawn

    def faulty(self: RankGroup, rank: int, config: EngineConfig, num_blocks: int | None, *others: Any) -> None:
        handler, *rest = others
        spawn(self, rank, config, num_blocks, _FAIL if fault == "failed" else handler, *rest)
        if fault == "killed":
            self._processes[-1].kill()

    return faulty


@pytest.mark.slow
def test_a_rank_that_fails_before_its_memory_is_registered_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankGroup, "_spawn", _spawning("failed"))
    engine = engine_config(
        write_checkpoint(tmp_path / "model", tokenizer=False),
        tensor_parallel_size=2,
        kv_cache_memory_bytes=1 << 20,
    )
    config = WorkerConfig(worker_id="p-0", role="prefill", engine=engine, routers=("127.0.0.1:1",))
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    followers = Followers(config, 1, on_message=lambda rank, message: None, on_failure=failures.put)
    group = followers.start()
    try:
        Engine(engine, tp_size=2, group=group)
        with pytest.raises(WorkerLost, match="rank 1: no device for transfers"):
            followers.wait_registered()
        assert "no device" in str(failures.get_nowait())
    finally:
        followers.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "event", "error"),
    [
        ("killed", 1, "broke", "rank 1 did not start: ended by SIGKILL"),
        ("failed", 2, "failed", "rank 1: no device for transfers"),
    ],
)
async def test_a_worker_says_whether_its_ranks_may_start_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, code: int, event: str, error: str
) -> None:
    monkeypatch.setattr(RankGroup, "_spawn", _spawning(fault))
    engine = engine_config(
        write_checkpoint(tmp_path / "model"),
        tensor_parallel_size=2,
        kv_cache_memory_bytes=1 << 20,
        host_cache_memory_bytes=1 << 20,
    )
    config = WorkerConfig(worker_id="d-0", role="decode", engine=engine, routers=("127.0.0.1:1",))
    ours, theirs = lifeline_pair()
    with ours:
        assert await serve_worker(config, NO_SECRET, Lifeline(theirs, on_lost=lambda: None)) == code
        told = [decode_event(packet) for packet in iter(lambda: _packet(ours), b"")]
    [last] = [one for one in told if one is not None and one["event"] in ("failed", "broke")]
    assert last["event"] == event and error in str(last["error"])


def _packet(lifeline: socket.socket) -> bytes:
    """What was said next; empty: nothing was."""
    try:
        return lifeline.recv(MAX_EVENT_BYTES)
    except BlockingIOError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize(("level", "marks"), [("info", [("d-0", "1")]), ("error", [])])
def test_a_rank_logs_as_its_worker_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], level: LogLevel, marks: list[tuple[str, str]]
) -> None:
    engine = engine_config(
        write_checkpoint(tmp_path, tokenizer=False), tensor_parallel_size=2, kv_cache_memory_bytes=1 << 20
    )
    config = WorkerConfig(
        worker_id="d-0", role="decode", engine=engine, routers=("127.0.0.1:1",), log_level=level, log_format="json"
    )
    followers = Followers(config, 1, on_message=lambda rank, message: None, on_failure=lambda error: None)
    group = followers.start()
    try:
        with structlog.testing.capture_logs():  # rank 0's own
            Engine(engine, tp_size=2, group=group)
    finally:
        followers.close()
    lines = [json.loads(line) for line in "".join(capfd.readouterr()).splitlines() if "cpu_kernels" in line]
    assert [(line["worker_id"], line["rank"]) for line in lines] == marks
