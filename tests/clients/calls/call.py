"""One library's calls: each has a feature's name, and the outcome that is wanted of it.

    works      it returns what the test expects
    refused    it raises, and the error names what is refused

A file of calls is a program, run with the library that it is about: `python -m kvferry.tests.clients.calls.openai_calls
URL MODEL TOKENIZER` prints a line of JSON for each call.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KEY = "none"
MAX_TOKENS = 96
_SHOWN_CHARS = 300


class NotRun(Exception):
    """What the client needs beside the server is not here."""


@dataclass(frozen=True)
class Server:
    """The server that is called."""

    url: str  # http://host:port
    model: str
    tokenizer: str = ""  # the folder with its tokenizer

    @property
    def openai_url(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True)
class _Call:
    feature: str
    function: Callable[[Server], Any]
    named: str  # in the error; empty: it works


@dataclass
class Calls:
    """The calls of one client library."""

    client: str
    calls: list[_Call] = field(default_factory=list)

    def works(self, feature: str) -> Callable[[Callable[[Server], Any]], Callable[[Server], Any]]:
        """List a call that works: it returns something true, and raises nothing."""
        return self._listed(feature, "")

    def refused(self, feature: str, named: str) -> Callable[[Callable[[Server], Any]], Callable[[Server], Any]]:
        """List a call whose error has the word `named`."""
        return self._listed(feature, named)

    def _listed(self, feature: str, named: str) -> Callable[[Callable[[Server], Any]], Callable[[Server], Any]]:
        def listed(function: Callable[[Server], Any]) -> Callable[[Server], Any]:
            self.calls.append(_Call(feature, function, named))
            return function

        return listed

    def main(self) -> None:
        """Make every call, in order, and print what came of each."""
        os.environ |= {
            "OPENAI_API_KEY": KEY,
            "OPENAI_AGENTS_DISABLE_TRACING": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        server = Server(*sys.argv[1:4])
        for call in self.calls:
            began = time.perf_counter()
            outcome, detail = _outcome(call, server)
            line = {
                "client": self.client,
                "feature": call.feature,
                "wanted": "refused" if call.named else "works",
                "outcome": outcome,
                "seconds": round(time.perf_counter() - began, 2),
                "detail": detail[:_SHOWN_CHARS],
            }
            print(json.dumps(line), flush=True)


def _outcome(call: _Call, server: Server) -> tuple[str, str]:
    try:
        value = call.function(server)
        if inspect.isawaitable(value):
            value = asyncio.run(_awaited(value))
    except NotRun as error:
        return "not run", str(error)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return ("refused" if call.named and call.named in text else "failed"), text
    if call.named:
        return "works", f"{call.named} was not refused"
    return ("works" if value else "failed"), repr(value)


async def _awaited(value: Any) -> Any:
    return await value
