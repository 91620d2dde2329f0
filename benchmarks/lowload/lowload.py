"""Is kvferry ever slower than colocated serving when there is little to do?

    python -m kvferry.benchmarks.lowload [--pairs 40] [--load-pairs 24] [--shapes 128/32,512/32]

Two deployments are up at once on the same cores: `--prefill 1 --decode 1 --policy slo` and `--prefill 0 --decode 2`.
Both meet the same requests, in turns, and while one answers the other is idle:
1. alone    one request at a time; each prompt goes to both, first to the one, then to the other
2. 10 %     Poisson arrivals at a tenth of what the colocated deployment can answer (measured before, in closed loop);
            a short stretch of arrivals goes to the one, then the very same to the other

Shown for each shape and load: ratios of TTFT and TPOT to colocated, of medians and of means, with 95 % of a bootstrap
over the pairs (bar: <= 1.02). Where it goes: the medians of each phase by the routers' own logs, and how many requests
were handed over. Every prompt is new to both, so no cache answers it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from kvferry.benchmarks.lowload.report import Pair, Phases, draw, phase_table, ratio_bars
from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.live_load import VOCAB, add_system_flags, endpoint_of, sending
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.clock import wall_time_s
from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import natural, output_file, positive_int
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.load import PlannedRequest, poisson_arrivals, run_closed_loop, run_open_loop
from kvferry.tools.load.plot import check_plot_path
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.report import report_console

SYSTEMS = {
    "slo": ("--prefill", "1", "--decode", "1", "--policy", "slo"),
    "colocated": ("--prefill", "0", "--decode", "2"),
}
_LOAD = 0.1  # of what the colocated deployment can answer
_STRETCH = 6  # requests of the low load that go to one deployment before the other has its turn
_IN_FLIGHT = 8
_CAPACITY_S = 8.0
_WARM_UPS = 4
_LOGGED_WITHIN_S = 0.3  # after an answer's end


@dataclass(slots=True, frozen=True)
class Shape:
    num_prompt_tokens: int
    num_output_tokens: int

    def __str__(self) -> str:
        return f"{self.num_prompt_tokens}/{self.num_output_tokens}"


def parse_shape(text: str) -> Shape:
    """As a type for argparse. One token has no time between tokens."""
    prompt, _, output = text.partition("/")
    shape = Shape(positive_int(prompt), positive_int(output))
    if shape.num_output_tokens < 2:
        raise argparse.ArgumentTypeError(f"{text}: an answer needs two tokens or more")
    return shape


@dataclass(slots=True)
class Duel:
    """Both deployments, and what is sent to them."""

    systems: tuple[System, System]  # slo, colocated
    endpoints: tuple[Endpoint, Endpoint]
    prompts: PromptSource

    def plan(self, shape: Shape, arrivals: Sequence[float]) -> list[PlannedRequest]:
        return [
            PlannedRequest(number, self.prompts.make(shape.num_prompt_tokens), shape.num_output_tokens, at_s)
            for number, at_s in enumerate(arrivals)
        ]

    async def warm_up(self, shape: Shape) -> None:
        for endpoint in self.endpoints:
            for request in self.plan(shape, [0.0] * _WARM_UPS):
                _check(await endpoint.send(request.prompt, request.num_output_tokens))
        await asyncio.sleep(_LOGGED_WITHIN_S)

    async def alone(self, shape: Shape, num_pairs: int) -> list[Pair]:
        return await self._stretches(shape, [[0.0]] * num_pairs)

    async def loaded(self, shape: Shape, num_pairs: int, rate_per_s: float, seed: int) -> list[Pair]:
        stretches = []
        for number in range(math.ceil(num_pairs / _STRETCH)):
            stretches.append(list(itertools.islice(poisson_arrivals(rate_per_s, seed + number), _STRETCH)))
        return await self._stretches(shape, stretches)

    async def _stretches(self, shape: Shape, stretches: Sequence[Sequence[float]]) -> list[Pair]:
        """Each goes to both, by turns first to the one and first to the other."""
        pairs: list[Pair] = []
        for number, arrivals in enumerate(stretches):
            planned = self.plan(shape, arrivals)
            records: dict[int, list[RequestRecord]] = {}
            for which in (0, 1) if number % 2 else (1, 0):
                records[which] = await self._run(which, planned)
            pairs += [Pair.of(mine, other) for mine, other in zip(records[0], records[1], strict=True)]
        return pairs

    async def _run(self, which: int, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        load = await run_open_loop(planned, sending(self.endpoints[which]))
        return sorted((_check(record) for record in load.records), key=lambda record: record.index)

    async def capacity_per_s(self, shape: Shape, seconds: float) -> float:
        """Of the colocated deployment."""
        endless = (self.plan(shape, [0.0])[0] for _ in itertools.count())
        load = await run_closed_loop(endless, sending(self.endpoints[1]), _IN_FLIGHT, seconds)
        return sum(record.is_ok for record in load.records) / load.duration_s

    async def phases(self, load: str, shape: Shape, since_s: float) -> list[Phases]:
        """By the routers' logs."""
        await asyncio.sleep(_LOGGED_WITHIN_S)
        return [
            Phases.of(name, load, str(shape), system.lines("request_finished", since_s))
            for name, system in zip(SYSTEMS, self.systems, strict=True)
        ]


def _check(record: RequestRecord) -> RequestRecord:
    if not record.is_ok or record.ttft_s is None or record.tpot_s is None:
        raise ConfigError(f"a request failed: {record.error}")
    return record


@dataclass(slots=True)
class Result:
    shape: str
    load: str
    rate_per_s: float | None
    pairs: list[Pair]
    phases: list[Phases]


async def measure(duel: Duel, shape: Shape, *, num_pairs: int, num_load_pairs: int, seed: int) -> list[Result]:
    await duel.warm_up(shape)
    began_s = wall_time_s()
    alone = Result(str(shape), "alone", None, await duel.alone(shape, num_pairs), [])
    alone.phases = await duel.phases("alone", shape, began_s)
    if not num_load_pairs:
        return [alone]
    rate_per_s = _LOAD * await duel.capacity_per_s(shape, _CAPACITY_S)
    await asyncio.sleep(_LOGGED_WITHIN_S)
    began_s = wall_time_s()
    loaded = Result(str(shape), "10 %", rate_per_s, await duel.loaded(shape, num_load_pairs, rate_per_s, seed), [])
    loaded.phases = await duel.phases("10 %", shape, began_s)
    return [alone, loaded]


async def measure_all(systems: tuple[System, System], flags: argparse.Namespace) -> list[Result]:
    endpoints = (endpoint_of(systems[0]), endpoint_of(systems[1]))
    duel = Duel(systems, endpoints, PromptSource(flags.seed, VOCAB))
    try:
        results: list[Result] = []
        for shape in flags.shapes:
            results += await measure(
                duel, shape, num_pairs=flags.pairs, num_load_pairs=flags.load_pairs, seed=flags.seed
            )
        return results
    finally:
        for endpoint in endpoints:
            endpoint.close()


@benchmark("lowload")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_plot_path(flags.plot)
    console = report_console()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        log_dir = flags.log_dir or Path(folder)
        slo, colocated = (
            stack.enter_context(serving(f"lowload-{name}", flags.model, (*own, *flags.serve_flags.split()), log_dir))
            for name, own in SYSTEMS.items()
        )
        results = asyncio.run(measure_all((slo, colocated), flags))
    bars: list[Bar] = []
    for result in results:
        own = ratio_bars(f"{result.shape}, {result.load}", result.pairs, flags.seed)
        rate = "one at a time" if result.rate_per_s is None else f"{result.rate_per_s:.2f} requests/s"
        console.print(bar_table(f"{result.shape}, {result.load} ({rate}): slo / colocated", own))
        bars += own
    console.print(phase_table([phases for result in results for phases in result.phases]))
    environment = describe_environment("python -m kvferry.benchmarks.lowload", argv)
    body = {
        "environment": asdict(environment),
        "bars": [bar.as_json() for bar in bars],
        "results": [asdict(result) for result in results],
    }
    save_json(body, flags.json)
    draw(bars, flags.plot, environment.git_commit or environment.kvferry_version)
    return exit_code(bars)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("lowload", __doc__)
    add = parser.add_argument
    add("--pairs", type=positive_int, default=40, help="of each shape, one at a time (default: %(default)s)")
    add("--load-pairs", type=natural, default=24, help="of each shape at 10 %%; 0: none (default: %(default)s)")
    add("--shapes", type=lambda text: [parse_shape(part) for part in text.split(",")], default="128/32,512/32",
        help="prompt/answer tokens (default: %(default)s)")  # fmt: skip
    add_system_flags(parser)
    add("--json", type=output_file, default=RESULTS_DIR / "lowload.json")
    add("--plot", type=output_file, default=RESULTS_DIR / "lowload.svg")
    return parser
