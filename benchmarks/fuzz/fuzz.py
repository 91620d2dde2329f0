"""Hostile input of every kind, from outside: what breaks, what grows, and who notices.

    python -m kvferry.benchmarks.fuzz [--frames 1000000] [--bodies 100000] [--systems 20000] [--seconds 10]
                                      [--attacks "slow heads,..."]

1. frames: mutated, made-up and malicious ones through every decoder, and a share of them against a live control server;
2. bodies: against the real router process, whose worker answers at once (target.py);
3. systems: valid bodies with extreme values against real workers (systems.py);
4. attacks, one after the other, on one router process, while another process polls /live every 10 ms and reads another
   tenant's streams.

Bars: no exception but the declared one, no 5xx, no crash, no stream that ends in silence, no other tenant's stream
broken, no worker's end, no block that is not given back; resident memory +5 % at most; /live p99 at most 50 ms during
each attack. A seed gives the same frames and bodies again. To see the third part find something:
`--serve "PYTHON -m kvferry serve"` of another checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvferry.benchmarks.fuzz.attacks import ATTACKS
from kvferry.benchmarks.fuzz.bodies import fuzz_bodies
from kvferry.benchmarks.fuzz.frames import FuzzResult, fuzz_decoders, fuzz_server
from kvferry.benchmarks.fuzz.poller import polling
from kvferry.benchmarks.fuzz.report import AttackResult, FuzzReport, print_fuzz, write_fuzz
from kvferry.benchmarks.fuzz.strike import Strike, run_attack
from kvferry.benchmarks.fuzz.systems import fuzz_systems
from kvferry.benchmarks.fuzz.target import Target, router
from kvferry.benchmarks.fuzz.templates import write_template
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.models.default import default_model_dir
from kvferry.tools.load.arguments import output_file
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.report import report_console
from kvferry.tools.load.stats import Distribution, describe

LIVE_SHARE = 50  # one frame of so many goes to the live server too
_MAX_MODEL_LEN = 2048
_QUIET_S = 2.0
_REST_S = 0.5  # after an attack, for what it left behind to end


def run_fuzz(num_frames: int, num_bodies: int, seed: int, model_dir: Path, log_dir: Path) -> list[FuzzResult]:
    results = []
    if num_frames:
        results.append(fuzz_decoders(num_frames, seed))
        results.append(fuzz_server(max(1, num_frames // LIVE_SHARE), seed, log_dir))
    if num_bodies:
        results.append(fuzz_bodies(num_bodies, seed, model_dir, log_dir, _MAX_MODEL_LEN))
    return results


def run_attacks(
    names: Sequence[str], duration_s: float, num_sockets: int, model_dir: Path, log_dir: Path, console: Console
) -> tuple[Distribution, list[AttackResult]]:
    """/live before the attacks, and each of them."""
    folder = log_dir / "attacks"
    folder.mkdir(parents=True, exist_ok=True)
    template = write_template(folder / "bombs.jinja")
    with router(model_dir, folder, max_model_len=_MAX_MODEL_LEN, chat_template=template) as target:
        return asyncio.run(_run_attacks(target, names, duration_s, num_sockets, console))


async def _run_attacks(
    target: Target, names: Sequence[str], duration_s: float, num_sockets: int, console: Console
) -> tuple[Distribution, list[AttackResult]]:
    with polling(target.address) as quiet:
        await asyncio.sleep(min(_QUIET_S, duration_s))
    results = []
    for name in names:
        console.print(f"{name}: {duration_s:g} s", style="dim")
        results.append(await _attack(target, name, Strike(target.address, num_sockets, duration_s)))
        await asyncio.sleep(_REST_S)
    return describe(quiet.latencies_ms), results


async def _attack(target: Target, name: str, strike: Strike) -> AttackResult:
    before_bytes = target.rss_bytes
    with polling(target.address) as polls:
        await run_attack(ATTACKS[name], strike)
    if not target.is_alive:
        strike.failures.append(f"the router ended: {target.process.log_tail()}")
    strike.failures += target.complaints()[:5]
    strike.failures += [f"another tenant's stream: {how}" for how in polls.broken[:5]]
    return AttackResult(
        name=name,
        live_ms=describe(polls.latencies_ms),
        num_failed_polls=polls.num_failed,
        num_streams=polls.num_streams,
        outcomes=dict(strike.outcomes),
        failures=tuple(strike.failures),
        rss_before_bytes=before_bytes,
        rss_after_bytes=target.rss_bytes,
    )


@benchmark("fuzz")
def main(argv: list[str]) -> int:
    """0: every bar is met; 1: one is not; 2: the settings are wrong."""
    flags = _parser().parse_args(argv)
    console = Console(stderr=True)
    log_dir = flags.log_dir or Path(tempfile.mkdtemp(prefix="fuzz-"))
    model_dir = flags.model or default_model_dir()
    results = run_fuzz(flags.frames, flags.bodies, flags.seed, model_dir, log_dir)
    if flags.systems:
        results += fuzz_systems(flags.systems, flags.seed, log_dir, program=tuple(shlex.split(flags.serve)))
    quiet, attacks = Distribution(0), list[AttackResult]()
    if flags.attacks:
        quiet, attacks = run_attacks(flags.attacks, flags.seconds, flags.sockets, model_dir, log_dir, console)
    environment = describe_environment("python -m kvferry.benchmarks.fuzz", argv)
    report = FuzzReport(tuple(results), tuple(attacks), quiet, environment)
    print_fuzz(report, report_console())
    write_fuzz(report, flags.json)
    console.print(f"written: {flags.json}; logs of the targets: {log_dir}", style="dim")
    return 0 if report.is_met else 1


def _attack_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in ATTACKS]:
        raise argparse.ArgumentTypeError(f"no attack {unknown[0]!r}; these are: {', '.join(ATTACKS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("fuzz", __doc__)
    add = parser.add_argument
    add("--frames", type=int, default=1_000_000, help="wire frames (default: %(default)s; 0: none)")
    add("--bodies", type=int, default=100_000, help="HTTP bodies (default: %(default)s; 0: none)")
    add("--systems", type=int, default=20_000, help="bodies for whole systems (default: %(default)s; 0: none)")
    add("--serve", default="", metavar="COMMAND", help="what runs these systems (default: this kvferry)")
    add("--attacks", type=_attack_names, default=list(ATTACKS), help="some of them (default: all; '': none)")
    add("--seconds", type=float, default=10.0, help="of each attack (default: %(default)s)")
    add("--sockets", type=int, default=500, help="of the slow attacks (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: the embedded model)")
    add("--log-dir", type=Path, metavar="DIR", help="logs of the targets (default: a temporary folder)")
    add("--json", type=output_file, metavar="FILE", default=RESULTS_DIR / "fuzz.json", help="(default: %(default)s)")
    return parser
