"""Batches: is each line answered once though the router is killed, and do others notice that a batch runs?

    python -m kvferry.benchmarks.batches [--rounds N]

One prefill and one decode worker of the built-in model. First a batch of 500 requests, in whose middle the router is
killed with SIGKILL. Then clients ask at random moments, in pairs of windows of equal arrivals: once alone, and once
while a batch that never ends asks for all that is idle; what is compared are their times to the first token.
The exit code is 1 where a bar is missed: each line is answered once, and the median of the ratios is at most 1.05.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from kvferry.benchmarks.batches.client import BatchClient, JsonObject, done_of, line
from kvferry.benchmarks.restart.load import Ask, asking, keeping
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console
from kvferry.tools.load.stats import percentile

_FLAGS = ("--prefill", "1", "--decode", "1")
_TOPICS = ("rivers", "bridges", "lamps", "ferries", "harbours", "clocks", "maps", "wells")
_RATIO_BAR = 1.05
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


@benchmark("batches")
def main(argv: list[str]) -> int:
    parser = parser_of("batches", __doc__)
    parser.add_argument("--lines", type=positive_int, default=500, help="of the batch whose router is killed")
    parser.add_argument("--rounds", type=positive_int, default=6, help="pairs of windows")
    parser.add_argument("--requests", type=positive_int, default=20, help="in each window")
    parser.add_argument("--gap", type=positive_float, default=1.5, help="seconds between them, in the mean")
    parser.add_argument("--max-tokens", type=positive_int, default=16)
    parser.add_argument("--log-dir", type=Path, help="(default: a temporary folder)")
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "batches.json", metavar="FILE")
    options = parser.parse_args(argv)
    environment = describe_environment(parser.prog, argv)
    with tempfile.TemporaryDirectory() as folder:
        flags = (*_FLAGS, "--data-dir", str(Path(folder) / "data"))
        with serving("batches", default_model_dir(), flags, options.log_dir or Path(folder)) as system:
            killed = asyncio.run(kill_in_the_middle(system, options.lines, options.max_tokens))
            work = measure_pairs(system, options.rounds, options.requests, options.gap, options.max_tokens)
            pairs = asyncio.run(work)
    bars = bars_of(killed, pairs)
    result: dict[str, object] = {"bars": [bar.as_json() for bar in bars], "killed": asdict(killed)}
    result |= {"pairs": [asdict(pair) for pair in pairs], "environment": asdict(environment)}
    save_json(result, options.json)
    report_console().print(bar_table("Batches", bars))
    return exit_code(bars)


def bars_of(killed: KillResult, pairs: Sequence[Pair]) -> list[Bar]:
    alone = sorted(value for pair in pairs for value in pair.alone_s)
    beside = sorted(value for pair in pairs for value in pair.beside_s)
    ratios = [two / one for pair in pairs for one, two in zip(pair.alone_s, pair.beside_s, strict=True)]
    count = killed.num_lines
    bars = [
        Bar("lines without an answer", count - killed.num_answered, 0, count=count),
        Bar("lines answered twice", killed.num_doubled, 0, count=count),
        Bar("lines that failed", killed.num_failed, 0, count=count),
        Bar("lines done when the router was killed", killed.num_done_at_kill, None, count=count),
        Bar("lines done beside others", sum(pair.num_lines_done for pair in pairs), None),
    ]
    for percent in (50, 90, 99):
        what, alone_s = f"time to first token, p{percent}", percentile(alone, percent)
        bars.append(Bar(f"{what}, alone", alone_s * 1e3, None, unit="ms"))
        bars.append(Bar(f"{what}, beside / alone", percentile(beside, percent) / alone_s, None, count=len(ratios)))
    return [*bars, Bar("median ratio of equal requests, beside / alone", median(ratios), _RATIO_BAR, count=len(ratios))]
