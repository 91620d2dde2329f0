"""What the router itself costs: CPU for each request and token, and the time it adds. Nothing is computed behind it.

    python -m kvferry.benchmarks.overhead [--systems kvferry,sglang-router] [--seconds 6] [--workers 4]

A real router process alone on one core; stub workers in another process, and a lean client, share the second core.
    one stream    closed loop, workers that answer at once. Added: the client's time to the first token, less what the
                  stub took itself
    64 lanes      closed loop with answers of 32 and of 256 tokens, at once: CPU for a request, and for one token more
    500 streams   each at 20 tokens/s, all streams of a worker in one step, the workers evenly apart: from a token's
                  emission at the stub to its arrival at the client (they read one clock), and the router's CPU for it

The peer forwards: it tokenizes nothing, and its prompts have no prefill worker. Bars are for kvferry.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import uvloop
from rich.console import Console

from kvferry.benchmarks.overhead.client import Arrivals, Exchange, Requests, arrivals, closed_loop, open_lanes
from kvferry.benchmarks.overhead.report import OverheadReport, Phase, plot_overhead, print_overhead, write_overhead
from kvferry.benchmarks.overhead.steps import MODEL
from kvferry.benchmarks.overhead.systems import ROUTERS, Setup, Target
from kvferry.benchmarks.peers.sglang_install import default_venv, ensure_sglang_router
from kvferry.benchmarks.shared.bars import exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.common.errors import ConfigError
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.report import report_console
from kvferry.tools.load.stats import describe

SHORT, LONG = 32, 256
_WARM_S = 1.0
_NUM_LANES = 64
_NUM_STREAMS = 500
_TOKENS_PER_S = 20.0
_SETTLE_S = 2.0  # after the last of the streams has begun


@dataclass(slots=True, frozen=True)
class Load:
    """One phase: what is sent."""

    name: str
    num_lanes: int
    num_tokens: int
    step_ms: float = 0.0  # of the stub; 0: at once


LOADS = (
    Load("one stream", 1, SHORT),
    Load("64 lanes, 32 tokens", _NUM_LANES, SHORT),
    Load("64 lanes, 256 tokens", _NUM_LANES, LONG),
)


@dataclass(slots=True, frozen=True)
class Measured:
    """What a load yielded, before the stub's records are there."""

    exchanges: list[Exchange]
    since_s: float  # tokens that left earlier do not count
    until_s: float
    cpu_s: float


async def run_closed(target: Target, load: Load, num_words: int, seconds: float) -> Measured:
    requests = Requests(MODEL, num_words, load.num_tokens, target.headers)
    lanes = await open_lanes(target.port, load.num_lanes)
    await closed_loop(lanes, requests, _WARM_S)
    since_s, cpu_s = perf_counter(), target.cpu_s()
    exchanges = await closed_loop(lanes, requests, seconds)
    measured = Measured(exchanges, since_s, perf_counter(), target.cpu_s() - cpu_s)
    for lane in lanes:
        lane.close()
    return measured


async def run_paced(target: Target, num_words: int, seconds: float) -> Measured:
    """All streams begin within about a second; they count from when the last has settled."""
    begin_s = 1.0
    requests = Requests(MODEL, num_words, round((begin_s + _SETTLE_S + seconds + 1.0) * _TOKENS_PER_S), target.headers)
    lanes = await open_lanes(target.port, _NUM_STREAMS)
    exchanges = []
    for lane in lanes:
        exchanges.append(lane.send(requests.next()))
        await asyncio.sleep(begin_s / _NUM_STREAMS)
    await asyncio.sleep(_SETTLE_S)
    since_s, cpu_s = perf_counter(), target.cpu_s()
    await asyncio.sleep(seconds)
    measured = Measured(exchanges, since_s, perf_counter(), target.cpu_s() - cpu_s)
    await asyncio.gather(*(lane.ended() for lane in lanes))
    for lane in lanes:
        lane.close()
    return measured


def figures(system: str, load: Load, target: Target, measured: Measured) -> Phase:
    answers = [arrivals(exchange) for exchange in measured.exchanges]
    first_ms, token_ms = [], []
    num_tokens = num_events = 0
    for answer in answers:
        _check(answer, load)
        own_s, emitted_s = target.records[target.stream_of(answer.name)]
        first_ms.append((answer.token_s[0] - answer.sent_s - own_s) * 1e3)
        num_events += answer.num_events
        for left_s, came_s in zip(emitted_s, answer.token_s, strict=True):
            if measured.since_s <= left_s < measured.until_s:
                num_tokens += 1
                token_ms.append((came_s - left_s) * 1e3)
    return Phase(
        system=system,
        load=load.name,
        num_requests=len(answers),
        num_tokens=num_tokens,
        tokens_per_event=sum(len(answer.token_s) for answer in answers) / num_events,
        duration_s=measured.until_s - measured.since_s,
        cpu_s=measured.cpu_s,
        added_first_ms=describe(first_ms),
        added_token_ms=describe(token_ms),
    )


def _check(answer: Arrivals, load: Load) -> None:
    if load.num_tokens and len(answer.token_s) != load.num_tokens:
        raise ConfigError(f"an answer has {len(answer.token_s)} tokens instead of {load.num_tokens}")


def measure(system: str, setup: Setup, num_words: int, seconds: float, console: Console) -> list[Phase]:
    phases = []
    paced = Load("500 streams", _NUM_STREAMS, 0, 1e3 / _TOKENS_PER_S)
    for load in (*LOADS, paced):
        console.print(f"{system}: {load.name}", style="dim")
        with ROUTERS[system](setup, load.step_ms) as target:
            if load.step_ms:
                measured = uvloop.run(run_paced(target, num_words, seconds))
            else:
                measured = uvloop.run(run_closed(target, load, num_words, seconds))
        phases.append(figures(system, load, target, measured))
    return phases


@benchmark("overhead")
def main(argv: list[str]) -> int:
    """0: every bar is met; 1: one is not; 2: the settings are wrong."""
    flags = _parser().parse_args(argv)
    plot = flags.json.with_suffix(".svg")
    check_plot_path(plot)
    console = Console(stderr=True)
    log_dir = flags.log_dir or Path(tempfile.mkdtemp(prefix="overhead-"))
    setup = _setup(flags, log_dir)
    phases = [
        phase for system in flags.systems for phase in measure(system, setup, flags.words, flags.seconds, console)
    ]
    environment = describe_environment("python -m kvferry.benchmarks.overhead", argv)
    report = OverheadReport(tuple(phases), setup.num_workers, flags.words, environment)
    print_overhead(report, report_console())
    write_overhead(report, flags.json)
    plot_overhead(report, plot)
    console.print(f"written: {flags.json}, {plot}; logs: {log_dir}", style="dim")
    return exit_code(report.bars())


def _setup(flags: argparse.Namespace, log_dir: Path) -> Setup:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("the router needs a core for itself and the load another one: this process may use one")
    if "sglang-router" in flags.systems:
        ensure_sglang_router(flags.peer_venv)
    model_dir = flags.model or default_model_dir()
    return Setup(model_dir, log_dir, flags.peer_venv, cores[0], cores[1], flags.workers)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("overhead", __doc__)
    add = parser.add_argument
    add("--systems", type=names_of(ROUTERS), default=tuple(ROUTERS), help="(default: all of them)")
    add("--seconds", type=positive_float, default=6.0, help="of each load (default: %(default)s)")
    add("--workers", type=positive_int, default=4, help="decode workers, or servers of the peer (default: %(default)s)")
    add("--words", type=positive_int, default=80, help="of each prompt (default: %(default)s)")
    add("--model", type=Path, metavar="DIR", help="whose tokenizer is used (default: the embedded model)")
    add("--peer-venv", type=Path, default=default_venv(), help="of sglang's router (default: %(default)s)")
    add("--log-dir", type=Path, metavar="DIR", help="logs of the processes (default: a temporary folder)")
    add(
        "--json", type=output_file, metavar="FILE", default=RESULTS_DIR / "overhead.json", help="(default: %(default)s)"
    )
    return parser
