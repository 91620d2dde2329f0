"""Sends requests from wherever it runs and prints their history, an event a line; `FLOWING` once each has some tokens.

python -m kvferry.tests.e2e.history_client URL KEY < asks.json
"""

from __future__ import annotations

import asyncio
import sys
from time import perf_counter

import msgspec

from kvferry.tools.chaos.client import send
from kvferry.tools.chaos.events import Delta, RequestEvent, encode_event
from kvferry.tools.chaos.requests import Ask
from kvferry.tools.load.http_client import HttpClient

from .drill import SOME_TOKENS

FLOWING = b"flowing\n"


async def main(url: str, key: str) -> None:
    asks = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Ask])
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

    headers = {"authorization": f"Bearer {key}"}
    await asyncio.gather(
        *(send(client, ask.number, ask, ask.body, tell, began_s=began_s, headers=headers) for ask in asks)
    )
    client.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
