"""An answer that is computed without its client: nobody reads it here, and nobody leaves."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from starlette.types import Message, Scope

from ..api.body import WholeBody
from ..api.middleware import RequestContext, enter, leave
from ..api.reply import Reply
from ..state.errors import HttpFailure, failure_of
from .event_files import EventFile
from .surface import PATH


@dataclass(slots=True)
class Sink:
    """The client's end of an answer that nobody waits for: its events, if it streams, and an error."""

    events: EventFile | None = None  # whose those are; None: the form keeps the whole answer
    status: int = 0
    _error: list[bytes] = field(default_factory=list)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        body = message.get("body", b"")
        if self.status != 200 or (self.events is not None and not message.get("more_body")):
            self._error.append(body)  # a stream's last part: nothing, or an error
        elif self.events is not None:
            self.events.add(body)

    @property
    def error(self) -> bytes:
        """An error, in the words of its endpoint; empty: there is none."""
        return b"".join(self._error)

    @property
    def has_answer(self) -> bool:
        return self.status == 200 and not self.error


async def compute(reply: Reply, context: RequestContext, sink: Sink) -> HttpFailure | None:
    """Have an answer computed to its end. Returns what ended it outside of its own telling."""
    scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    enter(scope, context)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            context.status = message["status"]
        await sink.send(message)

    try:
        await reply(scope, WholeBody(b""), send)
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
        error = msgspec.json.decode(sink.error[sink.error.find(b"{") :])  # behind an event's name, where it is one
        error = error.get("error", error)
        return str(error["code"]), str(error["message"])
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError):
        return "", "it was cut off"
