"""Load on an endpoint: open loop (requests come at their time, whatever the server does) or closed loop (N in flight).

Open loop shows what users feel when traffic does not wait for answers; closed loop shows what the server can do.
Arrivals are a Poisson process or a trace's own. Ends after the requests asked for, or sends nothing new after
`duration_s`; what is in flight then is still awaited and counted.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter, process_time

from .endpoint import Prompt, RequestRecord


@dataclass(slots=True, frozen=True)
class PlannedRequest:
    """One request to send. `arrival_s` counts from the run's start; closed loop ignores it."""

    index: int
    prompt: Prompt
    num_output_tokens: int
    arrival_s: float = 0.0


Send = Callable[[PlannedRequest], Awaitable[RequestRecord]]


@dataclass(slots=True, frozen=True)
class LoadResult:
    """Every request sent, in order of sending."""

    records: list[RequestRecord]
    duration_s: float  # first request sent -> last answer's end
    client_cpu_s: float  # of this process, meanwhile


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Arrival times from 0 s on, gaps exponential with mean 1 / rate. An infinite rate: all at once."""
    gaps = random.Random(seed)
    now_s = 0.0
    while True:
        yield now_s
        if rate_per_s != float("inf"):
            now_s += gaps.expovariate(rate_per_s)


async def run_open_loop(planned: Iterable[PlannedRequest], send: Send, duration_s: float | None = None) -> LoadResult:
    """Sends each request at its arrival time; those that arrive after `duration_s` are left out."""
    start_s, start_cpu_s = perf_counter(), process_time()
    tasks: list[asyncio.Task[RequestRecord]] = []
    async with asyncio.TaskGroup() as group:
        for request in planned:
            if duration_s is not None and request.arrival_s >= duration_s:
                break
            # Sleeps even when late, so that sockets are read while many requests are due at once.
            await asyncio.sleep(max(0.0, start_s + request.arrival_s - perf_counter()))
            tasks.append(group.create_task(_send_and_note_delay(request, send, start_s)))
    return load_result([task.result() for task in tasks], start_s, start_cpu_s)


async def run_closed_loop(
    planned: Iterable[PlannedRequest], send: Send, max_concurrency: int, duration_s: float | None = None
) -> LoadResult:
    """Keeps `max_concurrency` requests in flight: each answered one is followed by the next."""
    start_s, start_cpu_s = perf_counter(), process_time()
    requests = iter(planned)
    records: list[RequestRecord] = []

    async def keep_sending() -> None:
        for request in requests:
            if duration_s is not None and perf_counter() - start_s >= duration_s:
                return
            records.append(await send(request))

    async with asyncio.TaskGroup() as group:
        for _ in range(max_concurrency):
            group.create_task(keep_sending())
    return load_result(records, start_s, start_cpu_s)


async def _send_and_note_delay(request: PlannedRequest, send: Send, start_s: float) -> RequestRecord:
    record = await send(request)
    record.late_s = record.sent_s - (start_s + request.arrival_s)
    return record


def load_result(records: Iterable[RequestRecord], start_s: float, start_cpu_s: float) -> LoadResult:
    """Return what came of a load that began then, and is over now."""
    records = sorted(records, key=lambda record: record.sent_s)
    end_s = max((record.finished_s or start_s for record in records), default=start_s)
    first_s = min((record.sent_s for record in records), default=start_s)
    return LoadResult(records, end_s - first_s, process_time() - start_cpu_s)
