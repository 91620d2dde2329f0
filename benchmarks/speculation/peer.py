"""What do drafts gain another server, and do they change its greedy texts?

    python -m kvferry.benchmarks.speculation.peer PLAIN_URL DRAFTS_URL --served-model m [--rounds 5] [--requests 100]

Two servers of the same model with OpenAI's API, one with drafts: the texts of `speculation.py`, all greedy, in turns.
Greedy texts of 64 tokens that differ are counted, and no exit code says that there are some: it is no server of ours.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from statistics import median

import httpx

from kvferry.benchmarks.shared.program import benchmark
from kvferry.benchmarks.speculation.speculation import FREE, TEXTS, mean_tpot_s
from kvferry.tools.load.arguments import positive_int
from kvferry.tools.load.report import report_console

_CROWD = 8


async def _text(client: httpx.AsyncClient, model: str, prompt: str) -> str:
    body = _body(model, prompt) | {"max_tokens": 64, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    return str(answer.raise_for_status().json()["choices"][0]["text"])


def _body(model: str, prompt: str) -> dict[str, object]:
    return {"model": model, "prompt": prompt, "temperature": 0.0}


async def _timed(clients: Sequence[httpx.AsyncClient], model: str, text: str, num_streams: int, rounds: int) -> str:
    pairs: list[tuple[float, float]] = []
    for number in range(-1, rounds):  # the first round warms up
        times = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            bodies = [_body(model, f"{index}. {text}" if index else text) for index in range(num_streams)]
            times[side] = await mean_tpot_s(clients[side], bodies)
        if number >= 0:
            pairs.append((times[0], times[1]))
    plain, drafts = (1e3 * median(pair[side] for pair in pairs) for side in (0, 1))
    return f"{plain:.1f} ms, with drafts {drafts:.1f} ms: {median(b / a for a, b in pairs):.2f}"


async def _num_changed(clients: Sequence[httpx.AsyncClient], model: str, num_requests: int) -> int:
    sources = [*TEXTS.values(), FREE]
    num_changed = 0
    for first in range(0, num_requests, _CROWD):
        numbers = range(first, min(first + _CROWD, num_requests))
        texts = [(sources[number % len(sources)], number) for number in numbers]
        prompts = [text[: 30 + 37 * number % (len(text) - 30)] for text, number in texts]
        plain, drafted = [
            await asyncio.gather(*(_text(client, model, prompt) for prompt in prompts)) for client in clients
        ]
        num_changed += sum(one != other for one, other in zip(plain, drafted, strict=True))
    return num_changed


async def _run(flags: argparse.Namespace) -> None:
    console = report_console()
    clients = [httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) for url in (flags.plain, flags.drafts)]
    cases = [(name, text, 1) for name, text in TEXTS.items()] + [("free text", FREE, 1), ("free text", FREE, _CROWD)]
    for name, text, num_streams in cases:
        found = await _timed(clients, flags.served_model, text, num_streams, flags.rounds)
        console.print(f"{name}, {num_streams} at once: {found}")
    num_changed = await _num_changed(clients, flags.served_model, flags.requests)
    console.print(f"greedy texts that drafts changed: {num_changed} of {flags.requests}")


@benchmark("speculation.peer")
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.benchmarks.speculation.peer")
    parser.add_argument("plain", metavar="PLAIN_URL")
    parser.add_argument("drafts", metavar="DRAFTS_URL")
    parser.add_argument("--served-model", required=True, metavar="NAME")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--requests", type=positive_int, default=100, metavar="N", help="(default: %(default)s)")
    asyncio.run(_run(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
