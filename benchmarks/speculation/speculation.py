"""What do drafts gain, and do they change a token?

    python -m kvferry.benchmarks.speculation [--rounds 6] [--requests 200] [--model DIR]
    python -m kvferry.benchmarks.speculation --kill-every 5        decode workers die while tokens are compared
    python -m kvferry.benchmarks.speculation --draft-layers 4      the model's first layers draft for it
    python -m kvferry.benchmarks.speculation --idle-layers 90      the model drafts for itself with so many layers more

Two deployments of one colocated worker stand side by side, one with --deterministic, the other with
--speculative-config; the other one idles while one is measured, and they take turns in going first.
1. time    texts that repeat (a file to be edited, names to be copied, a refrain), a question that was asked before in
           nearly the same words, and one that was not, one stream at a time, then the free text eight streams at once:
           TPOT with drafts over TPOT without, median of the rounds
2. tokens  requests of every temperature, with seeds, penalties, n, stop strings, min_tokens, log-probabilities and
           grammars: tokens, log-probabilities and finish reasons of both, compared with ==
By a draft model no text may take longer: a model's first layers say what it says too seldom to gain anything, and with
layers that change nothing the model itself is always right at a part of the time. Between them lies what is trained.
The exit code is 1 where a bar is missed: one is that no answer differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

import httpx

from kvferry.benchmarks.shared.bars import Bar, bar_table, exit_code
from kvferry.benchmarks.shared.program import RESULTS_DIR, benchmark, parser_of
from kvferry.benchmarks.shared.streams import time_stream
from kvferry.benchmarks.speculation.models import write_extended, write_truncated
from kvferry.common.errors import ConfigError
from kvferry.models.default import default_model_dir
from kvferry.tools.chaos.serve_system import System, parse_metrics, serving, until_ready
from kvferry.tools.load.arguments import output_file, positive_int
from kvferry.tools.load.environment import describe_environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import report_console

REPETITIVE_BAR, FREE_BAR = 0.5, 1.03
_NUM_TOKENS = 96
_CROWD = 8
_BASE = ("--prefill", "0", "--decode", "1")
_MORTAL = ("--prefill", "1", "--decode", "2")  # where decode workers are killed
_LIST = {"regex": r"([A-Z][a-z]{1,12} [A-Z][a-z]{1,12}\n){2,6}"}
_CODE = "".join(f"def {name}(a, b):\n    return a {sign} b\n\n" for name, sign in zip("fghk", "+-*/", strict=True))
TEXTS = {
    "code edit": f"The file:\n{_CODE}\nThe file once more, with one function renamed:\n{_CODE}\nOnce more:\n",
    "extraction": "Names: Alice Johnson, Bob Smith, Carol Danvers, Dave Grohl, Erin Gray, Frank Sinatra.\n"
    "The names one on each line:\nAlice Johnson\nBob Smith\nCarol Danvers\n",
    "refrain": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily. " * 3,
}
FREE = "Write a letter to a friend about a journey through mountains that nobody has seen before."
_TOPICS = "a house that talks,the price of salt,rivers in winter,a lost key,how bread rises,two old clocks".split(",")
_QUESTION = "How do I sort a list of names in Python, and how do I sort it backwards? Explain it step by step."


@dataclass(slots=True, frozen=True)
class Timing:
    """One text on both deployments."""

    text: str
    num_streams: int
    without_ms: float  # median TPOT
    with_ms: float
    ratio: float  # median over the rounds
    num_rounds: int


@dataclass(slots=True, frozen=True)
class Seen:
    """What both deployments showed."""

    timings: tuple[Timing, ...]
    num_requests: int
    num_differ: int
    num_killed: int
    num_draft_tokens: int
    num_accepted_tokens: int


async def mean_tpot_s(client: httpx.AsyncClient, bodies: Sequence[Mapping[str, object]]) -> float:
    """Ask for all at once. Raises Cut."""
    each = [time_stream(client, "/v1/completions", body, _NUM_TOKENS) for body in bodies]
    return fmean(answer.tpot_s for answer in await asyncio.gather(*each))


class Side:
    """One of the two deployments."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.client = httpx.AsyncClient(base_url=system.base_url, timeout=600.0, trust_env=False)

    async def tpot_s(self, prompt: str, num_streams: int, number: int) -> float:
        """Return the mean over the streams of the time of an output token after the first."""
        seeds = range(number * 100, number * 100 + num_streams)
        bodies = [
            {
                "prompt": prompt if seed % 100 == 0 else f"{seed}. {prompt}",
                "temperature": 0.0 if seed % 2 == 0 else 0.8,
                "seed": seed,
            }
            for seed in seeds
        ]
        return await mean_tpot_s(self.client, bodies)

    async def answer(self, body: dict[str, object]) -> object:
        """Return the choices of a request."""
        answer = await self.client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            raise ConfigError(f"{self.system.base_url} answered {answer.status_code}: {answer.text[:200]}")
        return json.loads(answer.text)["choices"]

    async def counters(self) -> tuple[int, int]:
        """Return how many drafted tokens were verified, and how many of them were right."""
        samples = parse_metrics((await self.client.get("/metrics")).text)
        names = ("kvferry_draft_tokens_total", "kvferry_accepted_draft_tokens_total")
        first, second = (int(sum(sample.value for sample in samples if sample.name == name)) for name in names)
        return first, second


def request_body(number: int) -> dict[str, object]:
    """Return request `number` of the comparison: each has its own mix of all that sampling looks at."""
    chance = random.Random(number)
    text = chance.choice([*TEXTS.values(), FREE])
    return {
        "prompt": text[: chance.randrange(20, len(text))],
        "max_tokens": chance.choice((8, 24, 48)),
        "temperature": (0.0, 0.7, 1.2)[number % 3],
        "seed": number,
        "n": chance.choice((1, 1, 1, 3)),
        "top_p": chance.choice((1.0, 0.9)),
        "frequency_penalty": chance.choice((0.0, 0.0, 0.4)),
        "repetition_penalty": chance.choice((1.0, 1.0, 1.2)),
        "min_tokens": chance.choice((0, 6)),
        "stop": chance.choice((None, ["Carol", "stream"])),
        "logprobs": chance.choice((None, 3)),
        "structured_outputs": chance.choice((None, None, _LIST)),
        "return_token_ids": True,
    }


def text_of(name: str, number: int) -> str:
    """Return what is asked in a round: free text never twice, a question again with another number before it."""
    if name == "asked again":
        return f"Ticket {number + 2}. {_QUESTION}"
    topic = _TOPICS[number % len(_TOPICS)]
    return TEXTS.get(name) or f"Write a letter to a friend about {topic}, on day {number + 2} of the month."


async def time_texts(sides: Sequence[Side], rounds: int) -> list[Timing]:
    cases = [(name, 1) for name in (*TEXTS, "asked again")] + [("free text", 1), ("free text", _CROWD)]
    timings = []
    for name, num_streams in cases:
        pairs: list[tuple[float, float]] = []
        for number in range(-1, rounds):  # the first round warms up
            order = (0, 1) if number % 2 else (1, 0)
            text = text_of(name, number)
            times = {index: await sides[index].tpot_s(text, num_streams, abs(number)) for index in order}
            if number >= 0:
                pairs.append((times[0], times[1]))
        without_s, with_s = (median(pair[index] for pair in pairs) for index in (0, 1))
        ratio = median(second / first for first, second in pairs)
        timings.append(Timing(name, num_streams, without_s * 1e3, with_s * 1e3, ratio, rounds))
    return timings


async def count_differences(sides: Sequence[Side], num_requests: int) -> int:
    """Send the same requests to both, eight at a time; return how many answers differ."""
    differ = 0
    for first in range(0, num_requests, _CROWD):
        bodies = [request_body(number) for number in range(first, min(first + _CROWD, num_requests))]
        plain, drafted = [await asyncio.gather(*(side.answer(body) for body in bodies)) for side in sides]
        differ += sum(one != other for one, other in zip(plain, drafted, strict=True))
    return differ


async def _kill(system: System, every_s: float, killed: list[str]) -> None:
    """Kill one decode worker after the other, each when it has had the time to come back."""
    while True:
        await asyncio.sleep(every_s)
        worker_id = f"d-{len(killed) % 2}"
        with suppress(ConfigError, ProcessLookupError):  # it has not come back yet
            os.kill(system.program_pid(worker_id), signal.SIGKILL)
            killed.append(worker_id)


async def measure(systems: Sequence[System], rounds: int, num_requests: int, kill_every_s: float | None) -> Seen:
    for system in systems:
        await until_ready(system, 120.0)
    sides = [Side(system) for system in systems]
    killed: list[str] = []
    timings = [] if kill_every_s else await time_texts(sides, rounds)
    killer = asyncio.ensure_future(_kill(systems[1], kill_every_s, killed)) if kill_every_s else None
    num_differ = await count_differences(sides, num_requests)
    if killer is not None:
        killer.cancel()
    num_drafted, num_accepted = await sides[1].counters()
    for side in sides:
        await side.client.aclose()
    return Seen(tuple(timings), num_requests, num_differ, len(killed), num_drafted, num_accepted)


def bars_of(seen: Seen, repetitive_bar: float, *, remembers: bool) -> list[Bar]:
    """`remembers`: earlier answers draft as well."""
    free = ("free text",) if remembers else ("free text", "asked again")
    bars = [
        Bar(
            f"TPOT with drafts, {timing.text}, {timing.num_streams} at once",
            timing.ratio,
            FREE_BAR if timing.text in free else repetitive_bar,
            count=timing.num_rounds,
        )
        for timing in seen.timings
    ]
    return [*bars, Bar("answers that differ", float(seen.num_differ), 0.0, count=seen.num_requests)]


@benchmark("speculation")
def main(argv: list[str]) -> int:
    flags = _parser().parse_args(argv)
    console = report_console()
    flags.model = flags.model or default_model_dir()
    layout = _MORTAL if flags.kill_every else _BASE
    repetitive_bar = FREE_BAR if flags.draft_layers or flags.idle_layers else REPETITIVE_BAR
    with tempfile.TemporaryDirectory() as folder:
        model, config = _subject(flags, Path(folder))
        with (
            serving("plain", model, (*_BASE, "--deterministic"), Path(folder)) as plain,
            serving("drafts", model, (*layout, "--speculative-config", config), Path(folder)) as drafts,
        ):
            seen = asyncio.run(measure((plain, drafts), flags.rounds, flags.requests, flags.kill_every))
    bars = bars_of(seen, repetitive_bar, remembers=json.loads(config)["method"] == "suffix")
    console.print(bar_table(flags.model.name, bars))
    console.print(f"{seen.num_accepted_tokens} of {seen.num_draft_tokens} drafted tokens were right")
    if flags.kill_every:
        console.print(f"{seen.num_killed} decode workers were killed")
    environment = asdict(describe_environment("python -m kvferry.benchmarks.speculation", argv))
    body = {**asdict(seen), "bars": [bar.as_json() for bar in bars], "config": config, "environment": environment}
    save_json(body, flags.json)
    return exit_code(bars)


def _subject(flags: argparse.Namespace, folder: Path) -> tuple[Path, str]:
    """Return the model to serve and --speculative-config; models that are made for it lie in the folder."""
    if flags.draft_layers:
        model, draft = flags.model, write_truncated(flags.model, folder / "draft", flags.draft_layers)
    elif flags.idle_layers:
        model, draft = write_extended(flags.model, folder / "extended", flags.idle_layers), flags.model
    else:
        return flags.model, flags.config
    return model, json.dumps({"method": "draft_model", "model": str(draft)})


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("speculation", __doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory (default: built-in model)")
    add("--rounds", type=positive_int, default=6, help="pairs of each text (default: %(default)s)")
    add("--requests", type=positive_int, default=200, help="compared answers (default: %(default)s)")
    add("--config", default='{"method": "ngram"}', metavar="JSON", help="--speculative-config (default: %(default)s)")
    add("--kill-every", type=float, metavar="S", help="kill a decode worker of the drafting deployment so often")
    made = parser.add_mutually_exclusive_group().add_argument
    made("--draft-layers", type=positive_int, metavar="N", help="draft by the model's first N layers")
    made("--idle-layers", type=positive_int, metavar="N", help="add N layers that change nothing; the model drafts")
    add(
        "--json",
        type=output_file,
        default=RESULTS_DIR / "speculation.json",
        metavar="FILE",
        help="(default: %(default)s)",
    )
    return parser
