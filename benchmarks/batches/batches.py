"""Batches: is each line answered once though the router is killed, and do others notice that a batch runs?

    python -m kvferry.benchmarks.batches [--rounds N]

One prefill and one decode worker of the built-in model. First a batch of 500 requests, in whose middle the router is
killed with SIGKILL. Then clients ask at random moments, in pairs of windows of equal arrivals: once alone, and once
while a batch that never ends asks for all that is idle; what is compared are their times to the first token.
The exit code is 1 where a line was not answered once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from rich.table import Table

from kvferry.benchmarks.batches.client import BatchClient, JsonObject, done_of, line
from kvferry.benchmarks.restart.load import Ask, asking, keeping
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import RESULTS_DIR, report_console

_FLAGS = ("--prefill", "1", "--decode", "1")
_TOPICS = ("rivers", "bridges", "lamps", "ferries", "harbours", "clocks", "maps", "wells")
_ENDLESS = 20_000  # lines: more than a window answers


@dataclass(slots=True, frozen=True)
class KillResult:
    """A batch whose router was killed."""

    num_lines: int
    num_done_at_kill: int
    num_answered: int  # lines with an answer in the output file
    num_doubled: int  # custom_ids that stand in it more than once
    num_failed: int
    status: str
    seconds: float


@dataclass(slots=True, frozen=True)
class Pair:
    """Times to first tokens of the same arrivals, alone and beside a batch, and what the batch got done meanwhile."""

    alone_s: list[float]
    beside_s: list[float]
    num_lines_done: int


async def kill_in_the_middle(system: System, num_lines: int, num_tokens: int) -> KillResult:
    began_s = perf_counter()
    async with keeping(system.base_url) as http:
        client = BatchClient(http)
        lines = [line(f"line-{n}", system.model, _prompt(n), num_tokens) for n in range(num_lines)]
        batch_id = await client.start(lines)
        at_kill = await client.until(batch_id, num_lines // 3)
        os.kill(system.program_pid("router"), signal.SIGKILL)
        batch = await client.until(batch_id, 1 << 62)
        answers = await client.answers(batch["output_file_id"])
        failed = await client.answers(batch["error_file_id"])
    names = [str(each["custom_id"]) for each in answers]
    wanted = {str(each["custom_id"]) for each in lines}
    return KillResult(
        num_lines,
        done_of(at_kill),
        len(wanted & set(names)),
        len(names) - len(set(names)),
        len(failed),
        str(batch["status"]),
        perf_counter() - began_s,
    )


async def measure_pairs(system: System, num_pairs: int, num_requests: int, gap_s: float, num_tokens: int) -> list[Pair]:
    """Alternate which window of a pair comes first."""
    pairs = []
    async with keeping(system.base_url) as http:
        client = BatchClient(http)
        ask = asking(system.base_url, system.model, num_tokens, keep=http)
        await _window(ask, 0, 3, gap_s)  # connections, caches
        for number in range(1, num_pairs + 1):
            windows: dict[bool, list[float]] = {}
            num_done = 0
            for has_batch in (number % 2 == 0, number % 2 == 1):
                if has_batch:
                    windows[True], num_done = await _beside_batch(client, system, ask, number, num_requests, gap_s)
                else:
                    windows[False] = await _window(ask, number, num_requests, gap_s)
            pairs.append(Pair(windows[False], windows[True], num_done))
    return pairs


async def _beside_batch(
    client: BatchClient, system: System, ask: Ask, number: int, num_requests: int, gap_s: float
) -> tuple[list[float], int]:
    lines = [line(f"{n}", system.model, _prompt(n), 64) for n in range(_ENDLESS)]
    batch_id = await client.start(lines)
    before = await client.until(batch_id, 1)
    found = await _window(ask, number, num_requests, gap_s, name="B")
    after: JsonObject = await client.batch(batch_id)
    await client.cancel(batch_id)
    return found, done_of(after) - done_of(before)


async def _window(ask: Ask, seed: int, num_requests: int, gap_s: float, *, name: str = "A") -> list[float]:
    """Ask at random moments, `gap_s` apart in the mean; returns the times to the first tokens.

    Prompts of windows with other names are as long, and no cache knows them.
    """
    rng = random.Random(seed)
    tasks = []
    for number in range(num_requests):
        await asyncio.sleep(rng.expovariate(1 / gap_s))
        tasks.append(asyncio.create_task(_ttft_s(ask, f"{name}{number} {_prompt(rng.randrange(1 << 30))}")))
    return list(await asyncio.gather(*tasks))


async def _ttft_s(ask: Ask, prompt: str) -> float:
    began_s, first_s = perf_counter(), None
    async for _ in ask(prompt):
        if first_s is None:
            first_s = perf_counter() - began_s
    assert first_s is not None
    return first_s


def _prompt(number: int) -> str:
    rng = random.Random(number)
    return f"{number}. Tell us about " + ", ".join(rng.choice(_TOPICS) for _ in range(60)) + "."


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.benchmarks.batches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--lines", type=int, default=500, help="of the batch whose router is killed")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of windows")
    parser.add_argument("--requests", type=int, default=20, help="in each window")
    parser.add_argument("--gap", type=float, default=1.5, help="seconds between them, in the mean")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp/kvferry-batches"))
    parser.add_argument("--json", type=Path, default=RESULTS_DIR / "batches.json", metavar="FILE")
    options = parser.parse_args(argv)
    environment = describe_environment(parser.prog, sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        flags = (*_FLAGS, "--data-dir", str(Path(folder) / "data"))
        with serving("batches", default_model_dir(), flags, options.log_dir) as system:
            killed = asyncio.run(kill_in_the_middle(system, options.lines, options.max_tokens))
            work = measure_pairs(system, options.rounds, options.requests, options.gap, options.max_tokens)
            pairs = asyncio.run(work)
    result = {"killed": asdict(killed), "pairs": [asdict(pair) for pair in pairs]}
    save_json({**result, "environment": asdict(environment)}, options.json)
    report_console().print(_table(killed, pairs))
    return 0 if killed.num_answered == killed.num_lines and not killed.num_doubled else 1


def _table(killed: KillResult, pairs: Sequence[Pair]) -> Table:
    table = Table("what", "found", "bar", title="Batches")
    table.add_row("lines, done when the router was killed", f"{killed.num_lines}, {killed.num_done_at_kill}", "")
    table.add_row("answered", str(killed.num_answered), str(killed.num_lines))
    table.add_row("answered twice, failed", f"{killed.num_doubled}, {killed.num_failed}", "0, 0")
    table.add_row("lines done beside others", str(sum(pair.num_lines_done for pair in pairs)), "")
    alone = [value for pair in pairs for value in pair.alone_s]
    beside = [value for pair in pairs for value in pair.beside_s]
    for name, share, bar in (("p50", 0.5, "1.05"), ("p90", 0.9, ""), ("p99", 0.99, "")):
        one, two = _quantile(alone, share), _quantile(beside, share)
        text = f"{one * 1000:.0f} ms alone, {two * 1000:.0f} ms beside: {two / one:.3f}x"
        table.add_row(f"time to first token, {name}", text, bar)
    ratios = [two / one for pair in pairs for one, two in zip(pair.alone_s, pair.beside_s, strict=True)]
    table.add_row("median ratio of equal requests", f"{statistics.median(ratios):.3f}x", "1.05")
    return table
