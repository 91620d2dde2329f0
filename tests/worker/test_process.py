"""A worker's process around its worker: which signal ends it, and what the launcher hears of its end."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.config import WorkerConfig
from kvferry.wire.credentials import NO_SECRET
from kvferry.wire.lifeline import MAX_EVENT_BYTES, Lifeline, decode_event, lifeline_pair
from kvferry.worker.process import WorkerProcess

from ..engine_driver import engine_config


class _Parts:
    """Stand for a worker that drains by a router's order, and for its sessions."""

    is_draining = True

    def __init__(self) -> None:
        self.are_served = asyncio.Event()
        self.drains: list[float] = []
        self.is_told = asyncio.Event()

    def drain(self, limit_s: float) -> None:
        self.drains.append(limit_s)
        self.is_told.set()

    def say_goodbye(self) -> None: ...

    async def close(self) -> None: ...


class _Process(WorkerProcess):
    """Serve the parts, without an engine."""

    parts: Any = None

    def _build(self) -> Any:
        return None

    async def _serve(self, deps: Any) -> None:
        self._worker = self._sessions = self.parts
        self._ticking = asyncio.ensure_future(asyncio.sleep(0))
        self.parts.are_served.set()


class _Unbuilt(WorkerProcess):
    def _build(self) -> Any:
        raise RuntimeError("can't start new thread")


def _config(tmp_path: Path) -> WorkerConfig:
    engine = engine_config(tmp_path)
    return WorkerConfig(worker_id="d-0", role="decode", engine=engine, routers=("127.0.0.1:1",), drain_timeout=30.0)


async def test_who_drains_by_order_is_told_to_end_twice_before_it_ends_at_once(tmp_path: Path) -> None:
    process = _Process(_config(tmp_path), NO_SECRET, None)
    process.parts = _Parts()
    running = asyncio.ensure_future(process.run())
    await process.parts.are_served.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    told = asyncio.ensure_future(process.parts.is_told.wait())
    await asyncio.wait((told, running), return_when=asyncio.FIRST_COMPLETED)
    assert process.parts.drains == [30.0] and not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0 and process.parts.drains == [30.0]


async def test_the_launcher_hears_why_a_start_came_to_an_end_of_its_own(tmp_path: Path) -> None:
    ours, theirs = lifeline_pair()
    with ours:
        process = _Unbuilt(_config(tmp_path), NO_SECRET, Lifeline(theirs, on_lost=lambda: None))
        with pytest.raises(RuntimeError, match="new thread"):
            await process.run()
        assert decode_event(ours.recv(MAX_EVENT_BYTES)) == {
            "event": "broke",
            "error": "RuntimeError: can't start new thread",
        }
