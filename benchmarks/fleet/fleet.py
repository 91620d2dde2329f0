"""Fleet sizes: what the router costs as workers and requests grow, and ten minutes of 100,000 requests a minute.

    growth   so many workers under the same load each: CPU per request, of that in the router; time to take a request
             and place it
    whole    1,000 workers, 1,667 requests per second, 1,000,000 requests, on one core

Requests have the lengths of the public Azure conversation trace and come as a Poisson process; workers are simulated
8B models on one H100 each (`kvferry.simulator`); the router, its policy and the schedulers are
production's own.

    python -m kvferry.benchmarks.fleet                       # some 40 minutes of one core
    python -m kvferry.benchmarks.fleet --requests 100000     # a tenth of the ten minutes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

from rich.table import Table

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.router.garbage import collect_rarely
from kvferry.simulator import Fleet, Router, Scenario, Traffic, quiet_simulation, simulate
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, check_plot_path, new_figure, save_figure
from kvferry.tools.load.report import report_console

RATE_PER_WORKER = 100_000 / 60 / 1000
_SIZES = (10, 30, 100, 300, 1000)
_LENGTHS = (2500, 5000, 10_000, 20_000)  # requests, at 300 workers
_BAR_S = 30 * 60
_PLACEMENT_BAR_US = 1000.0


@dataclass(slots=True, frozen=True)
class FleetRun:
    """One simulation, and what it cost for real."""

    num_workers: int
    num_requests: int
    cpu_s: float
    router_s: float  # of that
    submit_p50_us: float | None
    submit_p99_us: float | None
    attainment: float
    num_unfinished: int

    @property
    def us_per_request(self) -> float:
        return self.cpu_s / self.num_requests * 1e6

    @property
    def router_us(self) -> float:
        return self.router_s / self.num_requests * 1e6


def run(num_workers: int, num_requests: int, trace: str) -> FleetRun:
    num_prefill = round(0.6 * num_workers)
    scenario = Scenario(
        traffic=Traffic(trace, arrivals="poisson", rate_per_s=RATE_PER_WORKER * num_workers, num_requests=num_requests),
        fleet=Fleet(prefill=num_prefill, decode=num_workers - num_prefill, model="8B", gpus_per_worker=1),
        router=Router(policy="slo"),
    )
    began_s = process_time()
    outcome = simulate(scenario)
    return FleetRun(
        num_workers=num_workers,
        num_requests=num_requests,
        cpu_s=process_time() - began_s,
        router_s=outcome.router_s,
        submit_p50_us=outcome.submit_us.p50,
        submit_p99_us=outcome.submit_us.p99,
        attainment=outcome.attainment,
        num_unfinished=num_requests - len(outcome.finished),
    )


def show(title: str, runs: Sequence[FleetRun]) -> None:
    table = Table(title=title)
    for column in ("workers", "requests", "CPU s", "us/request", "router", "place p50 us", "p99", "good", "unfinished"):
        table.add_column(column, justify="right")
    for one in runs:
        table.add_row(
            f"{one.num_workers:,}",
            f"{one.num_requests:,}",
            f"{one.cpu_s:.1f}",
            f"{one.us_per_request:.0f}",
            f"{one.router_us:.0f}",
            f"{one.submit_p50_us or 0:.0f}",
            f"{one.submit_p99_us or 0:.0f}",
            f"{one.attainment:.1%}",
            str(one.num_unfinished),
        )
    report_console().print(table)


def plot(sizes: Sequence[FleetRun], lengths: Sequence[FleetRun], path: Path) -> None:
    figure, (left, right) = new_figure(10, 4, 2)
    workers = [one.num_workers for one in sizes]
    left.plot(workers, [one.us_per_request for one in sizes], "o-", color=COLOURS[0], label="whole simulation")
    left.plot(workers, [one.router_us for one in sizes], "s-", color=COLOURS[1], label="router, all messages")
    left.plot(workers, [one.submit_p99_us or 0 for one in sizes], "^-", color=COLOURS[2], label="placing, p99")
    left.set(xscale="log", xlabel="workers", ylabel="CPU us per request", ylim=(0, None))
    left.legend(fontsize=8)
    right.plot([one.num_requests for one in lengths], [one.cpu_s for one in lengths], "o-", color=COLOURS[0])
    right.set(xlabel=f"requests ({lengths[0].num_workers} workers)", ylabel="CPU s", ylim=(0, None))
    save_figure(figure, path)


def bars_of(whole: FleetRun) -> list[Bar]:
    limit_s = _BAR_S * whole.num_requests / 1_000_000
    return [
        Bar("CPU of the whole run", whole.cpu_s, limit_s, unit="s"),
        Bar("placing a request, p99", whole.submit_p99_us, _PLACEMENT_BAR_US, unit="us"),
        Bar("requests that did not finish", whole.num_unfinished, 0, count=whole.num_requests),
    ]


@benchmark("fleet")
def main(argv: list[str]) -> int:
    parser = parser_of("fleet", __doc__)
    parser.add_argument("--trace", default="azure-2023-conv", help="name or path")
    parser.add_argument("--workers", type=positive_int, default=1000, help="of the whole run")
    parser.add_argument("--requests", type=positive_int, default=1_000_000, help="of the whole run")
    parser.add_argument("--growth-requests", type=positive_int, default=5000, help="of each run of another size")
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "fleet.json")
    parser.add_argument("--plot", type=output_file, default=RESULTS_DIR / "fleet.svg")
    args = parser.parse_args(argv)
    check_plot_path(args.plot)
    quiet_simulation()
    collect_rarely()  # as in a router's process
    run(10, 500, args.trace)  # what is loaded late is loaded
    sizes = [run(size, args.growth_requests, args.trace) for size in _SIZES]
    lengths = [run(300, length, args.trace) for length in _LENGTHS]
    show("As the fleet grows", sizes)
    show("As the run grows", lengths)
    whole = run(args.workers, args.requests, args.trace)
    show("Whole", [whole])
    bars = bars_of(whole)
    report_console().print(bar_table("Bars", bars))
    plot(sizes, lengths, args.plot)
    body = {
        "environment": asdict(describe_environment(parser.prog, argv)),
        "sizes": [asdict(one) for one in sizes],
        "lengths": [asdict(one) for one in lengths],
        "whole": asdict(whole),
        "bars": [bar.as_json() for bar in bars],
    }
    save_json(body, args.json)
    return exit_code(bars)
