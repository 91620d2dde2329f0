"""What does a conversation's second turn cost, seen by the user?

    python -m kvferry.benchmarks.turns [--conversations 12] [--pools 1+1,2+2]

On each deployment, one request at a time:
1. first turns    a prompt of 2,000 random tokens, an answer of 32; every conversation's in turn
2. second turns   prompt + answer + 50 new tokens, in another order: by then the caches hold all conversations, and the
                  router has to remember where each of them is
A think time lies between a conversation's turns and between any two requests. Answers are taken to the token.

Shown: TTFT of both turns, the median over the conversations of their ratio (bar: <= 0.5), how much of the second
prompt came from a cache by `usage`, and by the router's own log which workers computed it: the one that decoded the
first turn, the one that prefilled it, or another that fetched it. A third prompt of the second turn's length that
nobody has seen says what the same turn costs without a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.live_load import VOCAB, add_system_flags
from kvferry.benchmarks.shared.pools import parse_pools, pool_flags
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.common.clock import wall_time_s
from kvferry.common.errors import ConfigError
from kvferry.tools.chaos.serve_system import System, serving
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.endpoint import Endpoint, RequestRecord
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.plot import COLOURS, check_plot_path, new_figure, save_figure
from kvferry.tools.load.prompts import PromptSource
from kvferry.tools.load.report import report_console

RATIO_BAR = 0.5
_WARM_UPS = 2
_LOG_WITHIN_S = 5.0


@dataclass(slots=True, frozen=True)
class Shape:
    """Of every conversation."""

    num_prompt_tokens: int = 2000
    num_answer_tokens: int = 32
    num_new_tokens: int = 50


@dataclass(slots=True, frozen=True)
class Turn:
    """One request."""

    ttft_s: float
    num_prompt_tokens: int
    num_cached_tokens: int
    prefill_worker: str  # "-": the decode worker computed the prompt
    decode_worker: str


@dataclass(slots=True, frozen=True)
class Conversation:
    first: Turn
    second: Turn
    unseen: Turn  # a prompt as long as the second turn's, of which nothing is cached

    @property
    def ratio(self) -> float:
        return self.second.ttft_s / self.first.ttft_s

    @property
    def place(self) -> str:
        """Where the second turn's prompt was computed."""
        where = self.second.prefill_worker
        if where == "-":
            where = self.second.decode_worker
        if where == self.first.decode_worker:
            return "where the first turn was decoded"
        return "where the first turn was prefilled" if where == self.first.prefill_worker else "on another worker"


class Talk:
    """Sends turns to one system, one after another."""

    def __init__(self, system: System, think_s: float) -> None:
        self._system = system
        self._think_s = think_s
        self._endpoint = Endpoint(system.base_url, model=system.model, ignore_eos=True, temperature=0.0)

    async def ask(self, prompt: Sequence[int], num_answer_tokens: int) -> tuple[Turn, list[int]]:
        """The turn, and the answer's tokens."""
        began_s = wall_time_s()
        record = RequestRecord(0, 0.0, num_answer_tokens, token_ids=[])
        await self._endpoint.send(prompt, num_answer_tokens, record=record)
        if not record.is_ok or record.ttft_s is None or record.token_ids is None:
            raise ConfigError(f"a request of {len(prompt)} tokens failed: {record.error}")
        where = await self._where(began_s)
        await asyncio.sleep(self._think_s)
        return Turn(record.ttft_s, len(prompt), record.num_cached_tokens, *where), record.token_ids

    async def _where(self, since_s: float) -> tuple[str, str]:
        """The workers of the request that was sent then, as the router logged its end."""
        for _ in range(round(_LOG_WITHIN_S / 0.01)):
            if lines := self._system.lines("request_finished", since_s):
                fields = lines[0].fields
                return _only(fields["prefill_workers"]), _only(fields["decode_workers"])
            await asyncio.sleep(0.01)
        raise ConfigError(f"the router logged no end of a request within {_LOG_WITHIN_S:g} s")

    def close(self) -> None:
        self._endpoint.close()


def _only(names: object) -> str:
    return str(names[0]) if isinstance(names, list) and names else "-"


async def measure(system: System, shape: Shape, *, count: int, think_s: float, seed: int) -> list[Conversation]:
    prompts, order = PromptSource(seed, VOCAB), random.Random(seed)
    talk = Talk(system, think_s)
    try:
        for _ in range(_WARM_UPS):
            await talk.ask(_ids(prompts, shape.num_prompt_tokens), shape.num_answer_tokens)
        openings: list[tuple[Turn, list[int]]] = []
        for _ in range(count):
            prompt = _ids(prompts, shape.num_prompt_tokens)
            turn, answer = await talk.ask(prompt, shape.num_answer_tokens)
            openings.append((turn, [*prompt, *answer]))
        found = []
        for first, said in order.sample(openings, count):
            prompt = [*said, *_ids(prompts, shape.num_new_tokens)]
            second, _ = await talk.ask(prompt, shape.num_answer_tokens)
            unseen, _ = await talk.ask(_ids(prompts, len(prompt)), shape.num_answer_tokens)
            found.append(Conversation(first, second, unseen))
        return found
    finally:
        talk.close()


def _ids(prompts: PromptSource, count: int) -> list[int]:
    return [int(unit) for unit in prompts.make(count)]


def bars_of(pools: str, found: Sequence[Conversation]) -> list[Bar]:
    count = len(found)
    cached = median(c.second.num_cached_tokens / c.second.num_prompt_tokens for c in found)
    places = Counter(conversation.place for conversation in found)
    return [
        Bar(f"{pools}: TTFT of the second turn / first, p50", median(c.ratio for c in found), RATIO_BAR, count=count),
        Bar(f"{pools}: first turn, p50", _p50_ms(c.first for c in found), None, unit="ms", count=count),
        Bar(f"{pools}: second turn, p50", _p50_ms(c.second for c in found), None, unit="ms", count=count),
        Bar(f"{pools}: as long, unseen, p50", _p50_ms(c.unseen for c in found), None, unit="ms", count=count),
        Bar(f"{pools}: of the second prompt cached, p50", cached * 100, None, unit="%", count=count),
        *(
            Bar(f"{pools}: second prompts computed {place}", number, None, count=count)
            for place, number in sorted(places.items())
        ),
    ]


def _p50_ms(turns: Iterable[Turn]) -> float:
    return median(turn.ttft_s * 1e3 for turn in turns)


def draw(results: dict[str, list[Conversation]], path: Path, commit: str) -> None:
    """Each conversation as a line from its first turn to its second."""
    figure, panels = new_figure(5.0 * len(results), 4, len(results))
    for axes, (pools, found) in zip(panels, results.items(), strict=True):
        for conversation in found:
            times_ms = [turn.ttft_s * 1e3 for turn in (conversation.first, conversation.second, conversation.unseen)]
            axes.plot(range(3), times_ms, "o-", color=COLOURS[0], alpha=0.4, linewidth=1, markersize=4)
        axes.axhline(RATIO_BAR * (_p50_ms(c.first for c in found)), color=COLOURS[1], linestyle="--", label="bar")
        axes.set_xticks(range(3), ["first turn", "second turn", "as long, unseen"])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("TTFT (ms)")
        axes.set_title(f"{pools} workers, {len(found)} conversations", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"Second turns ({commit})", fontsize=10)
    save_figure(figure, path)


@benchmark("turns")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    check_plot_path(flags.plot)
    shape = Shape(flags.prompt_len, flags.answer_len, flags.new_len)
    console = report_console()
    results: dict[str, list[Conversation]] = {}
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        for pools in flags.pools:
            name = str(pools)
            serve_flags = (*pool_flags(pools), "--policy", flags.policy, *flags.serve_flags.split())
            with serving(f"turns-{name}", flags.model, serve_flags, flags.log_dir or Path(folder)) as system:
                results[name] = asyncio.run(
                    measure(system, shape, count=flags.conversations, think_s=flags.think_s, seed=flags.seed)
                )
            own = bars_of(name, results[name])
            bars += own
            console.print(bar_table(f"{name} workers, --policy {flags.policy}", own))
    environment = describe_environment("python -m kvferry.benchmarks.turns", argv)
    body = {
        "environment": asdict(environment),
        "shape": asdict(shape),
        "policy": flags.policy,
        "bars": [bar.as_json() for bar in bars],
        "conversations": {name: [asdict(one) for one in found] for name, found in results.items()},
    }
    save_json(body, flags.json)
    draw(results, flags.plot, environment.git_commit or environment.kvferry_version)
    return exit_code(bars)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("turns", __doc__)
    add = parser.add_argument
    add("--conversations", type=positive_int, default=12, help="(default: %(default)s)")
    add("--pools", type=lambda text: [parse_pools(part) for part in text.split(",")], default="1+1,2+2",
        help="prefill+decode workers of each deployment (default: %(default)s)")  # fmt: skip
    add("--prompt-len", type=positive_int, default=Shape().num_prompt_tokens, help="(default: %(default)s)")
    add("--answer-len", type=positive_int, default=Shape().num_answer_tokens, help="(default: %(default)s)")
    add("--new-len", type=positive_int, default=Shape().num_new_tokens, help="(default: %(default)s)")
    add("--think-s", type=float, default=1.0, help="between two requests (default: %(default)s)")
    add("--policy", default="slo", help="(default: %(default)s)")
    add_system_flags(parser)
    add("--json", type=output_file, default=RESULTS_DIR / "turns.json")
    add("--plot", type=output_file, default=RESULTS_DIR / "turns.svg")
    return parser
