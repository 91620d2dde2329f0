"""`python -m kvferry.router.helpers.program`: does what a `Helper` asks (wire.py), on a socket that is its stdin.

It has bounded memory and ends when the router is gone. What it cannot end by itself, the router ends by killing it.
"""

from __future__ import annotations

import resource
import socket
import sys
from typing import IO, TYPE_CHECKING

import msgspec

from ...common.errors import ConfigError, RequestError
from .wire import (
    COMMAS,
    FRAME,
    PARSE_JSON,
    READY,
    REFUSAL,
    RENDER_CHAT,
    SET_TEMPLATE,
    VALUE,
    ChatSpec,
    HelperRefusal,
    TemplateSetup,
)

if TYPE_CHECKING:
    from ...models.chat_template import ChatTemplate

MEMORY_BYTES = 4 * 2**30


class _ProgramOverrun(Exception):
    """A TemplateOverrun, past the imports that only rendering needs."""

    def __init__(self, message: str, *, is_size: bool) -> None:
        super().__init__(message)
        self.is_size = is_size


class _Program:
    """The program does what it is asked."""

    def __init__(self) -> None:
        self._template: ChatTemplate | None = None
        self._special_tokens: dict[str, str] = {}

    def answer(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        try:
            return VALUE, {PARSE_JSON: self._parse, RENDER_CHAT: self._render}[kind](payload)
        except RequestError as error:
            refusal = HelperRefusal("request", str(error), error.param, error.code, error.status)
        except ConfigError as error:
            refusal = HelperRefusal("model", str(error))
        except _ProgramOverrun as error:
            refusal = HelperRefusal("overrun", str(error), is_size=error.is_size)
        except (OverflowError, MemoryError) as error:
            what = "a number out of range" if isinstance(error, OverflowError) else "more than there is memory for"
            refusal = HelperRefusal("request", f"the body has {what}", code="invalid_json")
        return REFUSAL, msgspec.msgpack.encode(refusal)

    def _parse(self, payload: bytes) -> bytes:
        from .strict_json import parse_json

        (max_commas,) = COMMAS.unpack_from(payload)
        return msgspec.msgpack.encode(parse_json(payload[COMMAS.size :], max_commas))

    def set_template(self, payload: bytes) -> None:
        from ...models.chat_template import ChatTemplate

        setup = msgspec.msgpack.decode(payload, type=TemplateSetup)
        self._template = ChatTemplate(setup.source, origin=setup.origin)
        self._special_tokens = setup.special_tokens

    def _render(self, payload: bytes) -> bytes:
        from ...models.chat_template import RenderLimits, TemplateOverrun

        assert self._template is not None
        chat = msgspec.msgpack.decode(payload, type=ChatSpec)
        try:
            text = self._template.render(
                chat.messages,
                special_tokens=self._special_tokens,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                template_kwargs=chat.template_kwargs,
                limits=RenderLimits(chat.max_s, chat.max_steps, chat.max_chars, chat.max_items),
            )
            return text.encode()
        except TemplateOverrun as error:
            raise _ProgramOverrun(str(error), is_size=error.is_size) from None
        except MemoryError:
            raise _ProgramOverrun("rendering the chat takes more memory than it may", is_size=True) from None
        except UnicodeEncodeError:
            raise RequestError("the rendered chat has a lone surrogate and is not valid Unicode") from None


def _serve(requests: IO[bytes], replies: socket.socket) -> None:
    """Serve until the router has ended."""
    program = _Program()
    replies.sendall(FRAME.pack(READY, 0))
    while len(head := requests.read(FRAME.size)) == FRAME.size:
        kind, size = FRAME.unpack(head)
        payload = requests.read(size)
        if len(payload) < size:
            return
        if kind == SET_TEMPLATE:
            program.set_template(payload)
        else:
            kind, reply = program.answer(kind, payload)
            replies.sendall(FRAME.pack(kind, len(reply)) + reply)


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with socket.socket(fileno=sys.stdin.fileno()) as sock, sock.makefile("rb") as requests:
        _serve(requests, sock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
