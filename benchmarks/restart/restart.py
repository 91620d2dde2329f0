"""A rolling restart of everything under load: does any request fail, and how long does any stream pause?

    python -m kvferry.benchmarks.restart [--rounds N]

A tiny random model on two routers, two prefill and two decode workers. Clients ask without a pause, half over
connections that they keep, half over new ones. Then every worker and every router is restarted one at a time (`kvferry
restart`), as often as asked. Each answer is compared with the undisturbed one; no client tries anything twice.
The exit code is 1 where a request failed or a restart did not end.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from kvferry.benchmarks.restart.load import Tally, asking, keep_asking, keeping, undisturbed
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console
from kvferry.tools.load.tiny_model import write_tiny_model

PROMPTS = [f"{'Every token is told once, in its order. ' * (1 + n % 3)}{n}" for n in range(12)]
_FLAGS = ("--prefill", "2", "--decode", "2", "--routers", "2", "--kv-cache-memory-bytes", "64MiB")
_ROUND_LIMIT_S = 300.0


@dataclass(slots=True, frozen=True)
class RestartResult:
    """One run."""

    num_rounds: int
    num_processes: int  # restarted in each round
    seconds: float
    longest_round_s: float
    tally: Tally


async def measure_restarts(system: System, num_rounds: int, num_clients: int, num_tokens: int) -> RestartResult:
    tally, stop = Tally(), asyncio.Event()
    async with keeping(system.base_url) as keep:
        kept = asking(system.base_url, system.model, num_tokens, keep=keep)
        fresh = asking(system.base_url, system.model, num_tokens)
        wanted = await undisturbed(kept, PROMPTS)
        began_s = perf_counter()
        clients = [
            asyncio.create_task(keep_asking(fresh if number % 2 else kept, wanted, number, stop, tally))
            for number in range(num_clients)
        ]
        try:
            rounds = [await _restart_all(system) for _ in range(num_rounds)]
        finally:
            stop.set()
            await asyncio.gather(*clients)
    return RestartResult(num_rounds, 6, perf_counter() - began_s, max(rounds), tally)


async def _restart_all(system: System) -> float:
    began_s = perf_counter()
    command = (sys.executable, "-m", "kvferry", "restart", "--port", system.base_url.rpartition(":")[2])
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, errors = await asyncio.wait_for(process.communicate(), _ROUND_LIMIT_S)
    if process.returncode:
        raise ConfigError(f"no rolling restart: {errors.decode()}\n{system.process.log_tail()}")
    return perf_counter() - began_s


@benchmark("restart")
def main(argv: list[str]) -> int:
    parser = parser_of("restart", __doc__)
    parser.add_argument("--rounds", type=positive_int, default=5, help="rolling restarts, one after the other")
    parser.add_argument("--clients", type=positive_int, default=6)
    parser.add_argument("--max-tokens", type=positive_int, default=64)
    parser.add_argument("--log-dir", type=Path, help="(default: a temporary folder)")
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "restart.json", metavar="FILE")
    options = parser.parse_args(argv)
    environment = describe_environment(parser.prog, argv)
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_tiny_model(Path(folder) / "tiny")
        with serving("restart", model_dir, _FLAGS, options.log_dir or Path(folder)) as system:
            result = asyncio.run(measure_restarts(system, options.rounds, options.clients, options.max_tokens))
    bars, console = bars_of(result), report_console()
    figures: dict[str, object] = {"result": asdict(result), "bars": [bar.as_json() for bar in bars]}
    save_json({**figures, "environment": asdict(environment)}, options.json)
    console.print(bar_table("Rolling restarts under load", bars))
    for failure in result.tally.failures:
        console.print(failure, markup=False)
    return exit_code(bars)


def bars_of(result: RestartResult) -> list[Bar]:
    tally = result.tally
    return [
        Bar("failed or different", tally.num_failures if tally.num_requests else None, 0, count=tally.num_requests),
        Bar("processes restarted", result.num_rounds * result.num_processes, None),
        Bar("longest round", result.longest_round_s, None, unit="s"),
        Bar("longest wait for a first token", tally.longest_wait_s * 1e3, None, unit="ms"),
        Bar("longest pause in a stream", tally.longest_gap_s * 1e3, None, unit="ms"),
    ]
