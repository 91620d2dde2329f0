"""Does load alone make a live cluster grow, change roles and shrink, without a failed request?

    python -m kvferry.benchmarks.autoscale.live [--nodes 4]

A local Ray cluster of nodes with one core each; `kvferry serve --launcher ray --autoscale on` begins with one prefill
and one decode worker of one thread. Then, with no operator's hand in it:

    calm        a fifth of what these two carry                    1 + 1
    prompts     long prompts, short answers, more than keep their objective on one prefill worker: the fleet grows
    answers     short prompts, long answers, likewise on one decode worker: a worker changes its role
    calm        again: workers leave

The pools' sizes are read from /metrics once a second. The exit code is 1 where a request failed, or where the fleet did
not grow, change or shrink.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from rich.table import Table

from kvferry.benchmarks.shared.live_load import REFUSALS, endpoint_of, replay, requests_per_s
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.clock import wall_time_s
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.http_client import HttpClient, HttpError
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.load import poisson_arrivals
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import TraceRow

_PROMPTS, _ANSWERS = (768, 4), (32, 128)  # tokens in, tokens out
_CALM = 0.2  # of what one worker of each kind carries
_CAPACITY_S = 12.0
_READ_EVERY_S = 1.0
_SCALE_FLAGS = ("--scale-interval", "1", "--scale-down-after", "15", "--role-change-after", "3")


@dataclass(slots=True, frozen=True)
class Phase:
    """One kind of load for some time."""

    name: str
    seconds: float
    lengths: tuple[int, int]  # tokens in, tokens out
    rate_per_s: float


@dataclass(slots=True, frozen=True)
class Seen:
    """The fleet at one moment of the run."""

    at_s: float
    prefill: int
    decode: int


@dataclass(slots=True, frozen=True)
class LiveRun:
    """What one run showed."""

    phases: tuple[Phase, ...]
    fleet: tuple[Seen, ...]
    num_sent: int
    num_failed: int
    num_refused: int
    errors: tuple[str, ...]
    num_role_changes: int

    @property
    def grown(self) -> int:
        return max((seen.prefill + seen.decode for seen in self.fleet), default=0)

    @property
    def is_shown(self) -> bool:
        """It grew, a worker changed its role, it is as small as at first, and no request failed."""
        if not self.fleet:
            return False  # nothing was read of it
        first, last = self.fleet[0], self.fleet[-1]
        shrank = last.prefill + last.decode == first.prefill + first.decode < self.grown
        return shrank and self.num_role_changes > 0 and not self.num_failed


@contextmanager
def ray_nodes(count: int) -> Iterator[str]:
    """A cluster on this machine; its address."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(count - 1):
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    try:
        yield str(nodes.address)
    finally:
        nodes.shutdown()


def rows_of(phases: Sequence[Phase], seed: int) -> list[TraceRow]:
    """Poisson arrivals at each phase's rate, one phase after the other."""
    rows, begin_s = list[TraceRow](), 0.0
    for number, phase in enumerate(phases):
        arrivals = poisson_arrivals(phase.rate_per_s, seed + number)
        in_time = itertools.takewhile(lambda at_s, end_s=phase.seconds: at_s < end_s, arrivals)  # type: ignore[misc]
        rows += [TraceRow(begin_s + at_s, *phase.lengths) for at_s in in_time]
        begin_s += phase.seconds
    return rows


async def measure(system: System, flags: argparse.Namespace) -> LiveRun:
    capacity = {}
    for lengths in (_PROMPTS, _ANSWERS):
        many = [TraceRow(0.0, *lengths)] * 2000
        capacity[lengths] = await requests_per_s(
            system, many, in_flight=flags.in_flight, seconds=_CAPACITY_S, seed=flags.seed + lengths[0]
        )
    await _until_small(system, flags.calm_s + 120.0)
    phases = (
        Phase("calm", flags.calm_s, _ANSWERS, _CALM * capacity[_ANSWERS]),
        Phase("prompts", flags.busy_s, _PROMPTS, flags.load * capacity[_PROMPTS]),
        Phase("answers", flags.busy_s, _ANSWERS, flags.load * capacity[_ANSWERS]),
        Phase("calm", flags.calm_s + 2 * flags.busy_s, _ANSWERS, _CALM * capacity[_ANSWERS]),
    )
    began_s = wall_time_s()
    fleet: list[Seen] = []
    watching = asyncio.create_task(_watch(system, fleet))
    try:
        load = await replay(system, rows_of(phases, flags.seed), seed=flags.seed + 5)
    finally:
        watching.cancel()
    refused = sum(record.status in REFUSALS for record in load.records)
    failed = [record for record in load.records if not record.is_ok and record.status not in REFUSALS]
    return LiveRun(
        phases,
        tuple(fleet),
        len(load.records),
        len(failed),
        refused,
        tuple(sorted({record.error or "not finished" for record in failed}))[:5],
        len(system.lines("role_set", began_s)) or _num_flips(fleet),
    )


async def _watch(system: System, fleet: list[Seen]) -> None:
    began_s = perf_counter()
    client = HttpClient(system.base_url)
    try:
        while True:
            try:
                counts = {
                    sample.labels["pool"]: int(sample.value)
                    for sample in await system.samples(client)
                    if sample.name == "kvferry_current_replicas"
                }
                fleet.append(Seen(round(perf_counter() - began_s, 1), counts["prefill"], counts["decode"]))
            except HttpError:
                pass  # busy: the next look is in a second
            await asyncio.sleep(_READ_EVERY_S)
    finally:
        client.close()


def _num_flips(fleet: Sequence[Seen]) -> int:
    """Looks between which one pool gained what the other lost: actors on other nodes log elsewhere."""
    pairs = itertools.pairwise(fleet)
    return sum(
        before.prefill + before.decode == after.prefill + after.decode and before.prefill != after.prefill
        for before, after in pairs
    )


async def _until_small(system: System, limit_s: float) -> None:
    """One of each, with a trickle of requests that lets the forecast fall."""
    endpoint, prompts = endpoint_of(system), PromptSource(1, 4096)
    began_s = perf_counter()
    fleet: list[Seen] = []
    watching = asyncio.create_task(_watch(system, fleet))
    try:
        while perf_counter() - began_s < limit_s:
            await endpoint.send(prompts.make(_ANSWERS[0]), _ANSWERS[1])
            if fleet and (fleet[-1].prefill, fleet[-1].decode) == (1, 1):
                return
    finally:
        watching.cancel()
        endpoint.close()


@benchmark("autoscale.live")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    log_dir = flags.log_dir or Path(tempfile.mkdtemp(prefix="autoscale-live-"))
    environment = describe_environment("python -m kvferry.benchmarks.autoscale.live", argv)
    with ray_nodes(flags.nodes) as address:
        serve_flags = (
            *("--launcher", "ray", "--ray-address", address, "--autoscale", "on", *_SCALE_FLAGS),
            # Together as many as there are nodes; each pool may have all but one of them.
            *("--prefill", "1", "--decode", "1", "--prefill-max", str(flags.nodes - 1)),
            *("--num-threads", "1", "--no-local-prefill", "--max-num-seqs", "64", "--drain-timeout", "20"),
            *("--ttft-objective-ms", f"{flags.ttft_ms:g}", "--tpot-objective-ms", f"{flags.tpot_ms:g}"),
            *("--kv-cache-memory-bytes", "512MiB"),
        )
        with serving("autoscale-live", flags.model, serve_flags, log_dir) as system:
            run = asyncio.run(measure(system, flags))
    console = report_console()
    console.print(_table(run))
    for error in run.errors:
        console.print(error, markup=False)
    console.print(f"logs: {log_dir}")
    save_json({"run": asdict(run), "is_shown": run.is_shown, "environment": asdict(environment)}, flags.json)
    return 0 if run.is_shown else 1


def _table(run: LiveRun) -> Table:
    table = Table(
        "phase", "s", "tokens in / out", "requests/s", "prefill + decode workers", title="Scaled by load alone"
    )
    begin_s = 0.0
    for phase in run.phases:
        within = [seen for seen in run.fleet if begin_s <= seen.at_s < begin_s + phase.seconds]
        sizes = [f"{seen.prefill}+{seen.decode}" for seen in within]
        changes = [size for index, size in enumerate(sizes) if index == 0 or size != sizes[index - 1]]
        lengths = f"{phase.lengths[0]} / {phase.lengths[1]}"
        table.add_row(phase.name, f"{phase.seconds:g}", lengths, f"{phase.rate_per_s:.2f}", " ".join(changes))
        begin_s += phase.seconds
    table.caption = (
        f"{run.num_sent} requests, {run.num_failed} failed, {run.num_refused} refused; {run.num_role_changes} role "
        f"changes; {'shown' if run.is_shown else 'NOT SHOWN'}"
    )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("autoscale.live", __doc__)
    add = parser.add_argument
    add("--nodes", type=positive_int, default=4, help="of one core; one is the head's (default: %(default)s)")
    add("--calm-s", type=positive_float, default=20.0, help="seconds of the first phase (default: %(default)g)")
    add("--busy-s", type=positive_float, default=60.0, help="of each busy phase (default: %(default)g)")
    add("--load", type=positive_float, default=1.2, help="in busy phases, of what 1 + 1 carry (default: %(default)g)")
    add("--in-flight", type=positive_int, default=16, help="requests, when that is measured (default: %(default)s)")
    add("--ttft-ms", type=positive_float, default=6000.0, help="objective (default: %(default)g)")
    add("--tpot-ms", type=positive_float, default=60.0, help="objective (default: %(default)g)")
    add("--model", type=Path, default=default_model_dir(), metavar="DIR", help="(default: the built-in one)")
    add("--seed", type=int, default=0)
    add("--log-dir", type=Path)
    add("--json", type=output_file, default=RESULTS_DIR / "autoscale-live.json", metavar="FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
