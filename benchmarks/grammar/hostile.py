"""Streams beside hostile schemas: how soon are these refused or answered, and who notices?

    python -m kvferry.benchmarks.grammar.hostile [--rounds N] [--kinds NAME,...]

One server; streams of free text, again and again, while somebody asks without pause with schemas of one kind that the
server has never seen. Beside each such window stands one of the same requests without their schemas where the schema
is served (a request more is noticed whatever it asks for), and one of streams alone where it is refused; which of the
two comes first alternates. The exit code is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import httpx

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, names_of, parser_of
from kvferry.benchmarks.shared.streams import time_stream
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console
from kvferry.tools.load.server_process import free_port, running
from kvferry.tools.load.stats import percentile

_START_LIMIT_S = 300.0
_TIMEOUT_S = 120.0
_LEAST_APART_S = 0.5  # requests of one window begin so far apart: both windows of a pair have equally many or nearly
_NUM_ANSWER_TOKENS = 8
_MOST_REQUESTS = 50  # of a window; their bodies are made before it begins
_GAP_BAR = 1.1  # what one such ratio of equal windows scatters by
_MODEL = "model"

JsonObject = dict[str, object]


@dataclass(slots=True, frozen=True)
class Kind:
    """Schemas of one kind, no two the same."""

    name: str
    schema: Callable[[int], JsonObject]
    is_served: bool  # else refused


def _properties(count: int, number: int) -> JsonObject:
    names = [f"p{number}x{each}" for each in range(count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}}


def _deep(depth: int, number: int) -> JsonObject:
    schema: JsonObject = {"type": "string", "title": str(number)}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


_EVERY_KIND = (
    Kind("properties-5000", lambda number: _properties(5000, number), is_served=False),
    Kind("enum-20000", lambda number: {"enum": [f"{number}-{each}" for each in range(20_000)]}, is_served=False),
    Kind("depth-300", lambda number: _deep(300, number), is_served=False),
    Kind(
        "regex",
        lambda number: {"type": "string", "pattern": f"^(x{number}?(y{{1,60}}z?){{1,60}}){{1,60}}$"},
        is_served=True,
    ),
    Kind("properties-1500", lambda number: _properties(1500, number), is_served=True),
    Kind("enum-1900", lambda number: {"enum": [f"{number}-{each}" for each in range(1900)]}, is_served=True),
)
KINDS = {kind.name: kind for kind in _EVERY_KIND}


@dataclass(slots=True, frozen=True)
class Window:
    """What streams and their neighbour met."""

    gaps_s: list[float]  # of all streams
    answers_s: list[float]  # of the neighbour's requests
    statuses: list[int]

    def figures(self) -> dict[str, object]:
        quantiles = {
            f"gap_p{percent}_ms": round(1e3 * percentile(sorted(self.gaps_s), percent), 2) for percent in (50, 90, 99)
        }
        answers = [round(seconds, 4) for seconds in self.answers_s]
        return {"num_gaps": len(self.gaps_s), **quantiles, "answers_s": answers, "statuses": self.statuses}


@dataclass(slots=True, frozen=True)
class Pair:
    kind: str
    without: Window
    beside: Window

    def figures(self) -> dict[str, object]:
        return {"kind": self.kind, "without": self.without.figures(), "beside": self.beside.figures()}


async def measure(url: str, kinds: Sequence[Kind], options: argparse.Namespace) -> list[Pair]:
    pairs = []
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
        windows = Windows(client, f"{url}/v1/chat/completions", options.streams, options.tokens)
        for kind in kinds:  # starts what compiles, and warms up
            await windows.run(kind, is_hostile=True)
        for number in range(options.rounds):
            for kind in kinds:
                found = {}
                for is_hostile in (True, False) if number % 2 else (False, True):
                    found[is_hostile] = await windows.run(kind, is_hostile=is_hostile)
                pairs.append(Pair(kind.name, found[False], found[True]))
    return pairs


class Windows:
    """Windows of streams with a neighbour, one after the other."""

    def __init__(self, client: httpx.AsyncClient, url: str, num_streams: int, num_tokens: int) -> None:
        self._client = client
        self._url = url
        self._num_streams = num_streams
        self._num_tokens = num_tokens
        self._number = 0

    async def run(self, kind: Kind, *, is_hostile: bool) -> Window:
        """Stream until each has its tokens; the neighbour begins with them and ends when they do."""
        bodies = [self._content(kind if is_hostile else None) for _ in range(_MOST_REQUESTS)]
        done = asyncio.gather(*(self._gaps() for _ in range(self._num_streams)))
        answers: list[tuple[int, float]] = []
        while (is_hostile or kind.is_served) and bodies and not done.done():
            began = time.perf_counter()
            answers.append(await self._ask(bodies.pop()))
            rest = _LEAST_APART_S - (time.perf_counter() - began)
            await asyncio.wait([done], timeout=max(rest, 0.0))
        gaps = [gap for stream in await done for gap in stream]
        return Window(gaps, [seconds for _, seconds in answers], [status for status, _ in answers])

    def _content(self, kind: Kind | None) -> bytes:
        """Return a request that nobody has made, with a schema of this kind or with none."""
        self._number += 1
        limit = {"max_tokens": _NUM_ANSWER_TOKENS, "ignore_eos": True}
        body = _body(f"{self._number}. Make something up.") | limit
        if kind is not None:
            schema = {"name": "n", "schema": kind.schema(self._number)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return json.dumps(body).encode()

    async def _ask(self, content: bytes) -> tuple[int, float]:
        """Return the answer's status and how long it took."""
        began = time.perf_counter()
        headers = {"content-type": "application/json"}
        answer = await self._client.post(self._url, content=content, headers=headers)
        return answer.status_code, time.perf_counter() - began

    async def _gaps(self) -> tuple[float, ...]:
        self._number += 1
        body = _body(f"{self._number}. Tell a long story.") | {"logprobs": True}  # an event of every token
        return (await time_stream(self._client, self._url, body, self._num_tokens)).gaps_s


def _body(text: str) -> JsonObject:
    return {"model": _MODEL, "messages": [{"role": "user", "content": text}], "temperature": 1}


def bars(pairs: Sequence[Pair]) -> list[Bar]:
    """Of each kind: whether it was answered as it has to be, gaps beside it over those without it, slowest refusal."""
    found = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        mine = [pair for pair in pairs if pair.kind == kind]
        without, beside = ([gap for w in windows for gap in w.gaps_s] for windows in _sides(mine))
        beside_s, without_s = (percentile(sorted(gaps), 99) for gaps in (beside, without))
        found.append(Bar(f"{kind}: p99 gap, of without", beside_s / without_s, _GAP_BAR, count=len(beside)))
        found.append(Bar(f"{kind}: p99 gap without", 1e3 * without_s, None, unit="ms"))
        answers = [one for pair in mine for one in zip(pair.beside.statuses, pair.beside.answers_s, strict=True)]
        what, wanted = ("not answered", 200) if KINDS[kind].is_served else ("not refused", 400)
        strange = sum(status != wanted for status, _ in answers)
        found.append(Bar(f"{kind}: {what}", strange if answers else None, 0, count=len(answers)))
        refused = [seconds for status, seconds in answers if status == 400]
        if refused:
            found.append(Bar(f"{kind}: slowest refusal", max(refused), 1.0, unit="s", count=len(refused)))
        served = [seconds for status, seconds in answers if status == 200]
        if served:
            found.append(Bar(f"{kind}: answered in, p50", median(served), None, unit="s", count=len(served)))
    plain = [status != 200 for pair in pairs for status in pair.without.statuses]
    if plain:
        found.append(Bar("the same without a schema: not answered", sum(plain), 0, count=len(plain)))
    return found


def _sides(pairs: Sequence[Pair]) -> tuple[list[Window], list[Window]]:
    return [pair.without for pair in pairs], [pair.beside for pair in pairs]


@benchmark("hostile")
def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    kinds = [KINDS[name] for name in options.kinds]
    port = free_port()
    command = [sys.executable, "-m", "kvferry", "serve", "--port", str(port), "--served-model-name", _MODEL]
    command += options.serve_flags.split()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder, running("kvferry", command, Path(folder)) as server:
        server.wait_until_healthy(f"{url}/ready", _START_LIMIT_S)
        pairs = asyncio.run(measure(url, kinds, options))
    found = bars(pairs)
    figures: dict[str, object] = {
        "bars": [bar.as_json() for bar in found],
        "pairs": [pair.figures() for pair in pairs],
        "environment": asdict(describe_environment("python -m kvferry.benchmarks.grammar.hostile", argv)),
    }
    save_json(figures, options.json)
    report_console().print(bar_table("streams beside hostile schemas", found))
    return exit_code(found)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("grammar.hostile", __doc__)
    add = parser.add_argument
    add("--serve-flags", default="", metavar="FLAGS", help="for `kvferry serve`, in one word")
    names = f"of {', '.join(KINDS)} (default: all)"
    add("--kinds", type=names_of(KINDS), default=tuple(KINDS), metavar="NAME,...", help=names)
    add("--rounds", type=positive_int, default=4, metavar="N", help="pairs of each kind (default: %(default)s)")
    add("--streams", type=positive_int, default=3, metavar="N", help="at once (default: %(default)s)")
    add("--tokens", type=positive_int, default=200, metavar="N", help="of a stream (default: %(default)s)")
    file = RESULTS_DIR / "grammar-hostile.json"
    add("--json", type=output_file, default=file, metavar="FILE", help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
