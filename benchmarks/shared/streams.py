"""A streamed answer of so many tokens, read to its end: what breaks off, fails or is shorter raises and has no time.

`tools/load/endpoint.py` keeps failures in records, for loads in which some are expected; its requests are of one kind.
These are of every kind, and each is one half of a comparison.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter

import httpx
import msgspec

from kvferry.common.errors import KVFerryError
from kvferry.tools.load.chunks import Choice, Chunk, count_tokens, decode_chunk, error_message
from kvferry.tools.load.sse import EventSplitter

_MAX_ERROR_CHARS = 200


class Cut(KVFerryError):
    """A stream that is not the whole answer."""


@dataclass(slots=True, frozen=True)
class TimedAnswer:
    """When the tokens of an answer came."""

    num_tokens: int
    ttft_s: float
    gaps_s: tuple[float, ...]  # between chunks with tokens

    @property
    def tpot_s(self) -> float:
        """Mean time of a token after the first."""
        return sum(self.gaps_s) / (self.num_tokens - 1)


async def time_stream(client: httpx.AsyncClient, path: str, body: Mapping[str, object], num_tokens: int) -> TimedAnswer:
    """Ask for two tokens or more, and read their times to the microsecond. Raises Cut."""
    times = [perf_counter()]
    async for choice in read_stream(client, path, body, num_tokens):
        if count_tokens(choice):
            times.append(perf_counter())
    first_s, *gaps_s = (round(after - before, 6) for before, after in pairwise(times)) if times[1:] else (0.0,)
    if not gaps_s:
        raise Cut(f"{num_tokens} tokens came in {len(times) - 1} chunks: there is nothing between them to be timed")
    return TimedAnswer(num_tokens, first_s, tuple(gaps_s))


async def read_stream(
    client: httpx.AsyncClient, path: str, body: Mapping[str, object], num_tokens: int
) -> AsyncIterator[Choice]:
    """Ask for exactly so many tokens, and yield what comes. Raises Cut where the answer is none or not whole."""
    asked = {**body, "max_tokens": num_tokens, "ignore_eos": True}
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    events, is_done, reason, num_counted = EventSplitter(), False, None, None
    async with client.stream("POST", path, json=asked) as answer:
        if answer.status_code != 200:
            raise Cut(f"{answer.status_code} {(await answer.aread()).decode(errors='replace')[:_MAX_ERROR_CHARS]}")
        async for data in answer.aiter_bytes():  # to the end of the body: the connection can be used again
            for event in events.push(data):
                if event == b"[DONE]":
                    is_done = True
                    continue
                chunk = _decoded(event)
                num_counted = chunk.usage.completion_tokens if chunk.usage is not None else num_counted
                for choice in chunk.choices or ():
                    reason = choice.finish_reason or reason
                    yield choice
    if not is_done:
        raise Cut("no [DONE]")
    if reason in (None, "error", "abort"):
        raise Cut(f"finish_reason {reason!r}")
    if num_counted != num_tokens:
        raise Cut(f"{num_counted} tokens by usage instead of {num_tokens}")


def _decoded(event: bytes) -> Chunk:
    try:
        chunk = decode_chunk(event)
    except msgspec.MsgspecError as error:
        raise Cut(f"unreadable event ({error}): {event[:80].decode(errors='replace')}") from error
    if chunk.error is not None or chunk.kind == "error":
        raise Cut(f"error event: {error_message(chunk.error or chunk.message)}")
    return chunk
