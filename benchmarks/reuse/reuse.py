"""Prefix reuse: what eight workers with caches of their own find again, beside one cache of the same memory.

    fleet        5 prefill and 3 decode workers, 70B on four H100 each, in the simulator: the tokens of prompts that no
                 worker computed anew, by policy
    one cache    a replay of the same prompts in order of arrival: least recently used blocks go first, all memory is
                 for the cache, and a prompt is there as soon as it has come
    infinite     the same without an end

Memory is what the weights leave on the GPUs and, below it, so much host memory for each node of eight GPUs. The trace
is Mooncake's, whose requests name their prefix blocks of 512 tokens; only leading full blocks are found, and never the
last token. A fleet's memory also holds the answers under way, and those of the past: the trace does not tell what
became of them. Requests come as recorded, or at another mean rate.

    python -m kvferry.benchmarks.reuse                       # the whole trace: some nine minutes of one core
    python -m kvferry.benchmarks.reuse --requests 1500       # its beginning
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.simulator import Fleet, Outcome, Router, Scenario, Traffic, quiet_simulation, simulate
from kvferry.simulator.traffic import rows_of
from kvferry.tools.load.arguments import output_file, positive_float, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, check_plot_path, new_figure, save_figure
from kvferry.tools.load.report import report_console
from kvferry.tools.load.traces import MOONCAKE_BLOCK_TOKENS, TraceRow

PREFILL, DECODE = 5, 3
WORKERS_PER_NODE = 2
HOST_TB = (0.0, 0.5, 1.0, 2.0)  # of a node
POLICIES = ("slo", "kv_cost", "least_loaded")
_OURS = POLICIES[0]
_BAR = 0.95


@dataclass(slots=True, frozen=True)
class Case:
    """One fleet under one policy."""

    policy: str
    host_tb: float
    trace: str
    num_requests: int | None
    rate_per_s: float | None

    @property
    def traffic(self) -> Traffic:
        return Traffic(self.trace, rate_per_s=self.rate_per_s, num_requests=self.num_requests)

    @property
    def fleet(self) -> Fleet:
        fleet = Fleet(prefill=PREFILL, decode=DECODE)
        block_bytes = fleet.kv_token_bytes * MOONCAKE_BLOCK_TOKENS
        host_blocks = int(self.host_tb * 1e12 / WORKERS_PER_NODE / block_bytes)
        return Fleet(prefill=PREFILL, decode=DECODE, host_blocks=host_blocks)

    @property
    def num_blocks(self) -> int:
        """Of all workers, in both tiers."""
        fleet = self.fleet
        return fleet.num_workers * (fleet.blocks(MOONCAKE_BLOCK_TOKENS) + fleet.host_blocks)


@dataclass(slots=True, frozen=True)
class Reused:
    """What was found again in one fleet, and what could have been."""

    policy: str
    host_tb: float
    num_blocks: int
    hit_rate: float
    one_cache: float  # hit rate of a single cache of as many blocks
    infinite: float
    attainment: float  # requests that met both objectives
    ttft_p50_ms: float | None
    ended: dict[str, int]
    cpu_s: float

    @property
    def of_one_cache(self) -> float:
        return self.hit_rate / self.one_cache if self.one_cache else 0.0

    @property
    def of_infinite(self) -> float:
        return self.hit_rate / self.infinite if self.infinite else 0.0


def replay(rows: Iterable[TraceRow], num_blocks: int | None) -> float:
    """The share of prompt tokens that one cache of so many blocks holds when the prompt comes. None: infinite."""
    cache = OrderedDict[int, None]()
    num_hits = num_tokens = 0
    for row in rows:
        size = row.block_tokens
        blocks = row.block_ids[: row.num_prompt_tokens // size]
        wanted = (row.num_prompt_tokens - 1) // size  # the last token is always computed
        num_hits += size * next((n for n, block in enumerate(blocks[:wanted]) if block not in cache), wanted)
        num_tokens += row.num_prompt_tokens
        for block in reversed(blocks):  # a prefix is useless without what stands before it
            cache[block] = None
            cache.move_to_end(block)
        while num_blocks is not None and len(cache) > num_blocks:
            cache.popitem(last=False)
    return num_hits / num_tokens if num_tokens else 0.0


def reused(case: Case) -> Reused:
    """In a process of its own."""
    quiet_simulation()
    outcome = simulate(Scenario(traffic=case.traffic, fleet=case.fleet, router=Router(policy=case.policy)))
    rows = rows_of(case.traffic)[: case.num_requests]
    return Reused(
        policy=case.policy,
        host_tb=case.host_tb,
        num_blocks=case.num_blocks,
        hit_rate=_hit_rate(outcome),
        one_cache=replay(rows, case.num_blocks),
        infinite=replay(rows, None),
        attainment=outcome.attainment,
        ttft_p50_ms=outcome.ttft_ms.p50,
        ended=outcome.ended,
        cpu_s=outcome.cpu_s,
    )


def _hit_rate(outcome: Outcome) -> float:
    """Of all requests' prompt tokens: what was refused found nothing."""
    total = sum(request.num_prompt_tokens for request in outcome.requests)
    return sum(request.num_cached_tokens for request in outcome.finished) / total if total else 0.0


def show(found: Sequence[Reused]) -> None:
    table = Table(title="Prompt tokens found again", title_justify="left")
    for column in ("host TB a node", "blocks", "policy", "hit rate", "one cache", "of it", "of infinite", "good"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(
            f"{one.host_tb:g}",
            f"{one.num_blocks:,}",
            one.policy,
            f"{one.hit_rate:.1%}",
            f"{one.one_cache:.1%}",
            f"{one.of_one_cache:.3f}",
            f"{one.of_infinite:.3f}",
            f"{one.attainment:.1%}",
        )
    report_console().print(table)


def bars(found: Sequence[Reused]) -> list[Bar]:
    ours = [one for one in found if one.policy == _OURS]
    rows = [
        Bar(f"of one cache's hits, {one.host_tb:g} TB of host memory a node", one.of_one_cache, _BAR, at_least=True)
        for one in ours
    ]
    rows += [Bar(f"of an infinite one's, {one.host_tb:g} TB", one.of_infinite, None, at_least=True) for one in ours]
    return rows


def plot(found: Sequence[Reused], path: Path) -> None:
    figure, (axes,) = new_figure(6.5, 4.2, 1)
    for colour, policy in zip(COLOURS, POLICIES, strict=False):
        ours = [one for one in found if one.policy == policy]
        axes.plot([o.num_blocks for o in ours], [o.hit_rate for o in ours], "o-", color=colour, label=policy)
    first = [one for one in found if one.policy == _OURS]
    single = [one.one_cache for one in first]
    axes.plot([o.num_blocks for o in first], single, "s--", color=COLOURS[3], label="one cache of the same memory")
    axes.axhline(first[0].infinite, color=COLOURS[4], linestyle=":", label="infinite cache")
    axes.set(
        xlabel=f"blocks of {MOONCAKE_BLOCK_TOKENS} tokens, all workers", ylabel="prompt tokens found", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


@benchmark("reuse")
def main(argv: list[str]) -> int:
    parser = parser_of("reuse", __doc__)
    parser.add_argument("--trace", default="mooncake-conversation", help="name or path")
    parser.add_argument("--requests", type=positive_int, default=None, help="default: all")
    parser.add_argument("--rate", type=positive_float, default=None, help="mean requests per second; as recorded")
    parser.add_argument("--processes", type=positive_int, default=1)
    parser.add_argument("--json", type=output_file, default=RESULTS_DIR / "reuse.json")
    parser.add_argument("--plot", type=output_file, default=RESULTS_DIR / "reuse.svg")
    args = parser.parse_args(argv)
    check_plot_path(args.plot)
    cases = [Case(policy, tb, args.trace, args.requests, args.rate) for tb in HOST_TB for policy in POLICIES]
    with ProcessPoolExecutor(args.processes) as pool:
        found = list(pool.map(reused, cases))
    show(found)
    checked = bars(found)
    report_console().print(bar_table("Bars", checked))
    plot(found, args.plot)
    body = {
        "environment": asdict(describe_environment(parser.prog, argv)),
        "rows": [asdict(one) for one in found],
        "bars": [bar.as_json() for bar in checked],
    }
    save_json(body, args.json)
    return exit_code(checked)
