"""Asks a router from wherever it runs, for a test that runs elsewhere: one process for all that it asks.

    python -m kvferry.tests.e2e.history_client URL KEY

Each line of its input is a job, as JSON, and its output follows at once:

    "/path"         status and text of a GET
    [ask, ...]      all are sent at once: their history, an event a line, `FLOWING` once each has some tokens, `DONE`
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from time import perf_counter

import httpx
import msgspec

from kvferry.tools.chaos.client import send
from kvferry.tools.chaos.events import Delta, RequestEvent, encode_event
from kvferry.tools.chaos.requests import Ask
from kvferry.tools.load.http_client import HttpClient

from .drill import SOME_TOKENS

FLOWING = b"flowing\n"
DONE = b"done\n"


async def tell_history(url: str, headers: Mapping[str, str], asks: Sequence[Ask]) -> None:
    missing = {ask.number: SOME_TOKENS for ask in asks}
    client, out, began_s = HttpClient(url), sys.stdout.buffer, perf_counter()

    def tell(event: RequestEvent) -> None:
        out.write(encode_event(event))
        if isinstance(event, Delta) and event.text and event.request in missing:
            missing[event.request] -= 1
            if not missing[event.request]:
                del missing[event.request]
                if not missing:
                    out.write(FLOWING)
        out.flush()

    await asyncio.gather(
        *(send(client, ask.number, ask, ask.body, tell, began_s=began_s, headers=headers) for ask in asks)
    )
    client.close()
    out.write(DONE)


def get(url: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Return status and text; 0 and why, if there is no answer."""
    try:
        answer = httpx.get(url, headers=headers)
    except httpx.HTTPError as error:
        return 0, str(error)
    return answer.status_code, answer.text


def main(url: str, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    for line in sys.stdin.buffer:
        job = msgspec.json.decode(line, type=str | list[Ask])
        if isinstance(job, str):
            sys.stdout.buffer.write(msgspec.json.encode(get(f"{url}{job}", headers)) + b"\n")
        else:
            asyncio.run(tell_history(url, headers, job))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
