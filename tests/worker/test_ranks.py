"""A worker's other ranks: one that ends at the start says why and is not waited for; all log as their worker does."""

from __future__ import annotations

import json
import queue
from pathlib import Path

import pytest
import structlog

from kvferry.common.config import LogLevel, WorkerConfig
from kvferry.common.errors import WorkerLost
from kvferry.engine.engine import Engine
from kvferry.worker.ranks import Followers

from ..checkpoints import write_checkpoint
from ..engine_driver import engine_config


@pytest.mark.slow
def test_a_rank_that_fails_before_its_memory_is_registered_says_why(tmp_path: Path) -> None:
    """Its disk has less room than is asked for; rank 0 makes its own file last."""
    engine = engine_config(
        write_checkpoint(tmp_path / "model", tokenizer=False),
        tensor_parallel_size=2,
        kv_cache_memory_bytes=1 << 20,
        host_cache_memory_bytes=1 << 20,
        disk_cache_dir=tmp_path / "cache",
        disk_cache_bytes=1 << 55,
    )
    config = WorkerConfig(worker_id="p-0", role="prefill", engine=engine, routers=("127.0.0.1:1",))
    failures: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    followers = Followers(config, 1, on_message=lambda rank, message: None, on_failure=failures.put)
    group = followers.start()
    try:
        Engine(engine, tp_size=2, group=group)
        with pytest.raises(WorkerLost, match=r"rank 1: disk_cache_bytes: .* are free"):
            followers.wait_registered()
        assert "disk_cache_bytes" in str(failures.get_nowait())
    finally:
        followers.close()


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
