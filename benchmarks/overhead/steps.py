"""Streams that advance together, one token each at every step: the clock of the stub workers, and their records.

    add ─> step: every stream's next token, in one go ─> step ... ─> its last token: the stream is over

With a step time of 0 the next step comes at the event loop's next turn. When a token left is noted for each stream,
in seconds of the clock that all processes of a machine share, so that who receives it elsewhere can tell how long it
was on the way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

MODEL = "overhead"  # the name that all stubs serve


@dataclass(slots=True, eq=False)
class StubStream:
    """One answer of a stub worker."""

    name: str
    num_tokens: int
    own_s: float = 0.0  # what the stub itself took until the first token
    emitted_s: list[float] = field(default_factory=list)  # of each token

    @property
    def is_over(self) -> bool:
        return len(self.emitted_s) >= self.num_tokens


class Records:
    """Every stream that was opened, for the file that is written at the end."""

    def __init__(self) -> None:
        self._streams: list[StubStream] = []

    def open(self, name: str, num_tokens: int) -> StubStream:
        stream = StubStream(name, num_tokens)
        self._streams.append(stream)
        return stream

    def write(self, path: Path) -> None:
        path.write_text(json.dumps({stream.name: [stream.own_s, stream.emitted_s] for stream in self._streams}))


class Steps:
    """Calls `emit` at every step with the streams that are running; it notes when their tokens leave."""

    def __init__(self, step_s: float, emit: Callable[[list[StubStream]], None], *, phase: float = 0.0) -> None:
        """`phase`: where in the time of a step this worker's steps begin, from 0 to 1. Workers do not run in step."""
        self._step_s = step_s
        self._phase = phase
        self._emit = emit
        self._running: dict[str, StubStream] = {}
        self._has_work = asyncio.Event()

    def __len__(self) -> int:
        return len(self._running)

    def add(self, stream: StubStream) -> None:
        if not stream.is_over:
            self._running[stream.name] = stream
            self._has_work.set()

    def drop(self, name: str) -> None:
        self._running.pop(name, None)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            if not self._running:
                self._has_work.clear()
                await self._has_work.wait()
            await asyncio.sleep(self._until_next_s() if self._step_s else 0)
            self._step()

    def _until_next_s(self) -> float:
        past = perf_counter() / self._step_s - self._phase
        return (1.0 - past % 1.0) * self._step_s

    def _step(self) -> None:
        streams = list(self._running.values())
        self._emit(streams)
        for stream in streams:
            if stream.is_over:
                self._running.pop(stream.name, None)
