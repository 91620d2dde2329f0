"""Clients that ask again and again, some over connections that they keep and some over a new one each time.

Each answer is compared with the one that the same prompt had before anything was disturbed. Nothing is asked twice: a
refusal, a cut stream and a lost connection are failures, also where a client would usually try again.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter

import httpx

from kvferry.benchmarks.shared.streams import Cut as Cut  # what `keep_asking` takes for a failure
from kvferry.benchmarks.shared.streams import read_stream

_TIMEOUT_S = 120.0
_MAX_SHOWN = 5


@dataclass(slots=True)
class Tally:
    """What the clients saw."""

    num_requests: int = 0
    num_tokens: int = 0
    num_failures: int = 0
    failures: list[str] = field(default_factory=list)  # the first few
    longest_wait_s: float = 0.0  # for a first piece
    longest_gap_s: float = 0.0  # between two pieces

    def fail(self, what: str) -> None:
        self.num_failures += 1
        if len(self.failures) < _MAX_SHOWN:
            self.failures.append(what)


Ask = Callable[[str], AsyncIterator[str]]  # the pieces of a prompt's answer; raises where there is no whole one


def asking(base_url: str, model: str, num_tokens: int, *, keep: httpx.AsyncClient | None = None) -> Ask:
    """Ask over the connections of `keep`, or over a new one each time."""

    async def ask(prompt: str) -> AsyncIterator[str]:
        body = {"model": model, "prompt": prompt, "temperature": 0}
        async with _client(base_url, keep) as client:
            async for choice in read_stream(client, "/v1/completions", body, num_tokens):
                yield choice.text or ""

    return ask


@asynccontextmanager
async def _client(base_url: str, keep: httpx.AsyncClient | None) -> AsyncIterator[httpx.AsyncClient]:
    if keep is not None:
        yield keep
        return
    async with keeping(base_url) as client:
        yield client


def keeping(base_url: str) -> httpx.AsyncClient:
    """A client that uses its connections again."""
    return httpx.AsyncClient(base_url=base_url, timeout=_TIMEOUT_S, trust_env=False, verify=_tls())


# Once for all: reading the authorities' certificates takes 20 ms (Zen 4), as long as many an answer.
_tls = functools.cache(httpx.create_ssl_context)


async def undisturbed(ask: Ask, prompts: Sequence[str]) -> dict[str, str]:
    """The answers, one after the other."""
    return {prompt: "".join([piece async for piece in ask(prompt)]) for prompt in prompts}


async def keep_asking(
    ask: Ask, wanted: dict[str, str], start: int, stop: asyncio.Event, tally: Tally, *, pause_s: float = 0.0
) -> None:
    """Go round and round through the prompts, until `stop`; what is under way then is heard to its end.

    `pause_s`: between an answer and the next request.
    """
    prompts = list(wanted)
    number = start
    while not stop.is_set():
        prompt = prompts[number % len(prompts)]
        number += 1
        tally.num_requests += 1
        try:
            text = await _listen(ask(prompt), tally)
        except (Cut, httpx.HTTPError, ValueError, KeyError) as error:
            tally.fail(f"{type(error).__name__}: {error}")
            continue
        if text != wanted[prompt]:
            tally.fail(f"another answer: {text!r} is not {wanted[prompt]!r}")
        if pause_s:
            await asyncio.sleep(pause_s)


async def _listen(pieces: AsyncIterator[str], tally: Tally) -> str:
    text, heard_s, is_first = "", perf_counter(), True
    async for piece in pieces:
        now_s = perf_counter()
        if is_first:
            tally.longest_wait_s = max(tally.longest_wait_s, now_s - heard_s)
        else:
            tally.longest_gap_s = max(tally.longest_gap_s, now_s - heard_s)
        text, heard_s, is_first = text + piece, now_s, False
        tally.num_tokens += 1
    return text
