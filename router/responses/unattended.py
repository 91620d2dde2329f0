"""An answer that is computed without its client: nobody reads it, and nobody leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from starlette.types import Message, Scope

from ..api.body import WholeBody
from ..api.middleware import RequestContext, enter, leave
from ..api.reply import Reply
from ..state.errors import HttpFailure, failure_of
from .surface import PATH


@dataclass(slots=True)
class Sink:
    """The client's end of an answer that nobody waits for: an error is all that matters of it."""

    status: int = 0
    parts: list[bytes] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status != 200:
            self.parts.append(message.get("body", b""))


async def compute(reply: Reply, context: RequestContext, sink: Sink) -> HttpFailure | None:
    """Have an answer computed to its end. Returns what ended it outside of its own telling."""
    scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    enter(scope, context)
    try:
        await reply(scope, WholeBody(b""), sink.send)
    except Exception as error:
        return failure_of(error)
    finally:
        if context.allowance is not None:
            context.allowance.leave()
        leave(scope)
    return None


def told(failure: HttpFailure | None, sink: Sink) -> tuple[str, str]:
    """Return code and message of an error."""
    if failure is not None:
        return str(failure.code), failure.message
    try:
        error = msgspec.json.decode(b"".join(sink.parts))["error"]
        return str(error["code"]), str(error["message"])
    except (msgspec.MsgspecError, KeyError, TypeError):
        return "", "it was cut off"
