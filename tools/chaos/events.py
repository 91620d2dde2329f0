"""The events of a chaos run: what clients saw, what was done to workers, what the router logged; in a file a line each.

Of one request: Sent, then Delta ... Usage, Done, or Failed, or Cut, or Left. What happened to the system is a Note.
Some requests are references: sent while nobody was disturbed; the others repeat one of them by its `ask`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ...common.errors import ConfigError


class _Event(msgspec.Struct, tag_field="event", tag=str.lower, kw_only=True, omit_defaults=True):
    at_s: float  # since the run began


class Sent(_Event):
    request: int
    ask: int  # which of the distinct requests
    kind: str
    num_choices: int
    max_tokens: int
    is_stream: bool = True
    tells_tokens: bool = True  # not the text alone
    is_background: bool = False  # its client does not wait
    is_reference: bool = False


class Delta(_Event):
    """The text that one chunk added to one choice; of an answer that is no stream, all of it."""

    request: int
    choice: int
    text: str = ""
    calls: str = ""  # of tools: one chunk may add to them and to the text, in no order
    token_ids: list[int] = []
    logprobs: list[object] = []  # one for each token, where asked for
    offsets: list[int] = []  # where each token begins in the choice's text, where told
    finish: str | None = None
    stop_reason: str | int | None = None


class Usage(_Event):
    request: int
    num_prompt_tokens: int
    num_completion_tokens: int


class Done(_Event):
    """[DONE], or the end of a whole JSON body."""

    request: int
    answer_id: str = ""


class Failed(_Event):
    """An error in place of an answer, or in the middle of one. `code` is empty where it was not a proper one."""

    request: int
    status: int
    code: str
    message: str
    answer_id: str = ""


class Cut(_Event):
    """The connection ended, or the patience of the client did."""

    request: int
    why: str


class Left(_Event):
    """The client wanted no more of it."""

    request: int


class Note(_Event):
    """Something that happened to the system: `what` is kill, stop, continue, death, or an event of the log."""

    what: str
    worker_id: str = ""
    answer_id: str = ""
    detail: dict[str, object] = {}


RequestEvent = Sent | Delta | Usage | Done | Failed | Cut | Left
Event = RequestEvent | Note


@dataclass(slots=True)
class ChoiceAnswer:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[object] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None
    calls: str = ""


class Request:
    """The events of one request, in order."""

    def __init__(self, sent: Sent) -> None:
        self.sent = sent
        self.events: list[RequestEvent] = []

    def add(self, event: RequestEvent) -> None:
        self.events.append(event)

    @property
    def number(self) -> int:
        return self.sent.request

    @property
    def is_done(self) -> bool:
        return any(isinstance(event, Done) for event in self.events)

    @property
    def has_left(self) -> bool:
        return any(isinstance(event, Left) for event in self.events)

    @property
    def failure(self) -> Failed | None:
        return next((event for event in self.events if isinstance(event, Failed)), None)

    @property
    def answer_id(self) -> str:
        return next((e.answer_id for e in self.events if isinstance(e, Done | Failed) and e.answer_id), "")

    @property
    def usage(self) -> Usage | None:
        return next((event for event in self.events if isinstance(event, Usage)), None)

    def answer(self) -> list[ChoiceAnswer]:
        """All that was delivered, by choice."""
        choices = [ChoiceAnswer() for _ in range(self.sent.num_choices)]
        for event in self.events:
            if isinstance(event, Delta) and 0 <= event.choice < len(choices):
                choice = choices[event.choice]
                choice.text += event.text
                choice.calls += event.calls
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
                choice.finish = event.finish or choice.finish
                choice.stop_reason = choice.stop_reason if event.stop_reason is None else event.stop_reason
        return choices

    def chunk_times_s(self) -> list[float]:
        """Return the times at which something was delivered, chunk by chunk."""
        return [
            event.at_s
            for event in self.events
            if isinstance(event, Delta) and (event.token_ids or event.text or event.calls)
        ]


@dataclass(slots=True)
class History:
    """A run, by request; `add` takes events in the order in which they happened."""

    requests: dict[int, Request] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case Note():
                self.notes.append(event)
            case Sent():
                self.requests[event.request] = Request(event)
            case _:
                self.requests[event.request].add(event)

    def disturbed(self) -> list[Request]:
        return [request for request in self.requests.values() if not request.sent.is_reference]

    def references(self) -> dict[int, Request]:
        """Return, by ask, the requests that were answered undisturbed."""
        return {r.sent.ask: r for r in self.requests.values() if r.sent.is_reference and r.is_done}


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


def encode_event(event: Event) -> bytes:
    """One line of a history file."""
    return _encode(event) + b"\n"


def read_history(path: Path) -> History:
    """Raises ConfigError for a file that cannot be read, or a line that is no event of a run."""
    history = History()
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    history.add(_decode(line))
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}:{number}: no event of a run: {error}") from error
                except KeyError as error:
                    raise ConfigError(f"{path}:{number}: request {error} was not sent before") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return history
