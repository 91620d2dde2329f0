"""How long a stream pauses when its decode worker dies, and how soon others know that a worker died or hangs.

gap      four long streams over two decode workers; one worker gets SIGKILL. Of each stream that ran there: from the
         kill to its next token. Apart: what a request of the same prompt plus the tokens that were accepted takes to
         its first token on a quiet system, since the KV that died must be computed again.
death    from SIGKILL to the router's line `worker_lost`.
hang     from SIGSTOP to the same line.
transfer from SIGKILL of a prefill worker in the middle of a prompt to the router's line `attempt_failed`, which it
         writes when the decode worker has said that it holds nothing of the handoff any more.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from time import perf_counter

from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System, until_ready
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.stats import Distribution, describe

_NUM_STREAMS = 4
_LONG_ANSWER = 1600
_LONG_PROMPT = 1900
_NOTICED_WITHIN_S = 10.0
_BACK_WITHIN_S = 60.0
_VOCAB = 250


@dataclass(slots=True)
class GapResult:
    num_kills: int = 0
    num_streams: int = 0  # that ran on a worker that was killed
    num_broken: int = 0  # of all streams: not answered whole
    gap_ms: Distribution = field(default_factory=lambda: describe(()))
    recompute_ms: Distribution = field(default_factory=lambda: describe(()))
    death_ms: Distribution = field(default_factory=lambda: describe(()))
    hang_ms: Distribution = field(default_factory=lambda: describe(()))
    transfer_ms: Distribution = field(default_factory=lambda: describe(()))


async def measure_gaps(system: System, *, num_kills: int, num_hangs: int, seed: int) -> GapResult:
    """`system` has one or more prefill workers and two decode workers, `p-0` and `d-0`, `d-1`."""
    source = random.Random(seed)
    prompts = PromptSource(seed, _VOCAB)
    endpoint = Endpoint(system.base_url, model=system.model, ignore_eos=True, temperature=0.0)
    result = GapResult(num_kills=num_kills)
    gaps: list[float] = []
    recomputes: list[float] = []
    deaths: list[float] = []
    hangs: list[float] = []
    transfers: list[float] = []
    try:
        for number in range(num_kills + num_hangs):
            is_kill = number < num_kills
            streams = [_Stream(endpoint, prompts) for _ in range(_NUM_STREAMS)]
            await _until_flowing(streams)
            await asyncio.sleep(source.uniform(0, 0.3))
            hit = await _hit(system, source.choice(("d-0", "d-1")), signal.SIGKILL if is_kill else signal.SIGSTOP)
            (deaths if is_kill else hangs).append((hit.noticed_s - hit.wall_s) * 1e3)
            for stream in streams:
                await stream.task
                result.num_broken += not stream.record.is_ok
            if is_kill:
                found = _longest_gaps(streams, hit.perf_s, _num_failed_attempts(system, hit.wall_s))
                result.num_streams += len(found)
                gaps += [gap.seconds * 1e3 for gap in found]
                recomputes += [await _time_first_token(endpoint, prompts, gap.num_known_tokens) for gap in found]
            await system.wait_for_line("worker_joined", hit.wall_s, hit.worker_id, _BACK_WITHIN_S)
            await until_ready(system)
        for _ in range(num_hangs):
            elapsed_ms = await _time_failed_transfer(system, endpoint, prompts, source)
            transfers += [] if elapsed_ms is None else [elapsed_ms]
    finally:
        endpoint.close()
    result.gap_ms, result.recompute_ms = describe(gaps), describe(recomputes)
    result.death_ms, result.hang_ms, result.transfer_ms = describe(deaths), describe(hangs), describe(transfers)
    return result


@dataclass(slots=True, frozen=True)
class _Gap:
    seconds: float
    num_known_tokens: int  # prompt and what had been accepted


class _Stream:
    """One long answer that is being read."""

    def __init__(self, endpoint: Endpoint, prompts: PromptSource) -> None:
        self.prompt = prompts.make(64)
        self.record = RequestRecord(0, perf_counter(), _LONG_ANSWER)
        self.task = asyncio.ensure_future(endpoint.send(self.prompt, _LONG_ANSWER, record=self.record))

    def gap_after(self, at_s: float) -> _Gap | None:
        """From `at_s` to the next chunk; None where the answer was over."""
        times = self.record.chunk_times_s
        number = next((index for index, seconds in enumerate(times) if seconds > at_s + 0.005), None)
        if number is None:
            return None
        return _Gap(times[number] - at_s, len(self.prompt) + sum(self.record.chunk_tokens[:number]))


def _longest_gaps(streams: list[_Stream], at_s: float, count: int) -> list[_Gap]:
    """Of the streams that had to be placed anew: the others saw no pause."""
    found = [gap for stream in streams if (gap := stream.gap_after(at_s)) is not None]
    return sorted(found, key=lambda gap: -gap.seconds)[:count]


def _num_failed_attempts(system: System, since_s: float) -> int:
    return len({line.fields["request_id"] for line in system.lines("attempt_failed", since_s)})


async def _time_first_token(endpoint: Endpoint, prompts: PromptSource, num_tokens: int) -> float:
    """Milliseconds, on a system that has nothing else to do."""
    record = await endpoint.send(prompts.make(num_tokens), 1)
    if record.ttft_s is None:
        raise ConfigError(f"a request of {num_tokens} tokens failed: {record.error}")
    return record.ttft_s * 1e3


@dataclass(slots=True, frozen=True)
class _Hit:
    worker_id: str
    perf_s: float
    wall_s: float
    noticed_s: float  # wall clock


async def _until_flowing(streams: list[_Stream]) -> None:
    for _ in range(1000):
        if all(len(stream.record.chunk_times_s) > 3 or stream.task.done() for stream in streams):
            return
        await asyncio.sleep(0.01)
    raise ConfigError(f"streams do not flow: {[stream.record.error for stream in streams]}")


async def _hit(system: System, worker_id: str, by: signal.Signals) -> _Hit:
    """Send the signal and wait until the router has noticed."""
    pid = system.program_pid(worker_id)
    perf_s, wall_s = perf_counter(), time.time()
    os.kill(pid, by)
    lost = await system.wait_for_line("worker_lost", wall_s, worker_id, _NOTICED_WITHIN_S)
    return _Hit(worker_id, perf_s, wall_s, lost.at_s)


async def _time_failed_transfer(
    system: System, endpoint: Endpoint, prompts: PromptSource, source: random.Random
) -> float | None:
    """Milliseconds from the death of a prefill worker in mid-prompt to the decode worker's answer that it let go.

    None: the prompt was through before the signal came.
    """
    task = asyncio.ensure_future(endpoint.send(prompts.make(_LONG_PROMPT), 2))
    await asyncio.sleep(source.uniform(0.02, 0.08))
    hit = await _hit(system, "p-0", signal.SIGKILL)
    record = await task
    if not record.is_ok:
        raise ConfigError(f"the request whose prefill worker died failed: {record.error}")
    await system.wait_for_line("worker_joined", hit.wall_s, hit.worker_id, _BACK_WITHIN_S)
    await until_ready(system)
    failed = [line.at_s for line in system.lines("attempt_failed", hit.wall_s)]
    return (min(failed) - hit.wall_s) * 1e3 if failed else None
