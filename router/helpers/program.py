"""`python -m kvferry.router.helpers.program`: does what a `Helper` asks (wire.py), on a socket that is its stdin.

It has bounded memory and ends when the router is gone. What it cannot end by itself, the router ends by killing it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from ...common.errors import ConfigError, RequestError
from ...common.grammar import Grammar, pack_mask
from .wire import (
    COMMAS,
    COMPILE_GRAMMAR,
    FRAME,
    PARSE_JSON,
    READY,
    REFUSAL,
    RENDER_CHAT,
    SET_TEMPLATE,
    SET_VOCABULARY,
    SETUP,
    VALUE,
    Chat,
    HelperRefusal,
    TemplateSetup,
    VocabularySetup,
)

if TYPE_CHECKING:
    from ...grammar.matching import Vocabulary
    from ...models.chat_template import ChatTemplate

MEMORY_BYTES = 4 * 2**30
_NICENESS = 10  # larger: streams notice less of large grammars; smaller: fewer are refused on a busy machine


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
        self._vocabulary: Vocabulary | None = None
        self._unusable = ""  # why the vocabulary is
        self._gives_way = False
        self._work = {PARSE_JSON: self._parse, RENDER_CHAT: self._render, COMPILE_GRAMMAR: self._compile}
        self._setups = {SET_TEMPLATE: self._set_template, SET_VOCABULARY: self._set_vocabulary}

    def set_up(self, kind: bytes, payload: bytes) -> bool:
        """Take what comes once, at the start. False: the frame asks for work."""
        if kind in self._setups:
            self._setups[kind](payload)
        return kind in self._setups

    def answer(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        """Return kind and payload of the answer."""
        if kind != COMPILE_GRAMMAR or not self._gives_way:
            return self._answer(kind, payload)
        from .aside import done_aside

        answer = done_aside(lambda: b"".join(self._answer(kind, payload)))
        return answer[:1], answer[1:]

    def _answer(self, kind: bytes, payload: bytes) -> tuple[bytes, bytes]:
        try:
            return VALUE, self._work[kind](payload)
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

    def _set_vocabulary(self, payload: bytes) -> None:
        from ...grammar.matching import Vocabulary

        setup = msgspec.msgpack.decode(payload, type=VocabularySetup)
        self._gives_way = setup.gives_way
        if self._gives_way:
            os.nice(_NICENESS)
        ends = frozenset(setup.eos_token_ids)
        try:
            self._vocabulary = Vocabulary.from_dir(
                Path(setup.model_dir), vocab_size=setup.vocab_size, eos_token_ids=ends
            )
        except ConfigError as error:
            self._unusable = str(error)

    def _compile(self, payload: bytes) -> bytes:
        from ...grammar.matching import find_first_mask

        if self._vocabulary is None:
            raise ConfigError(self._unusable)
        return pack_mask(find_first_mask(self._vocabulary, msgspec.msgpack.decode(payload, type=Grammar)))

    def _set_template(self, payload: bytes) -> None:
        from ...models.chat_template import ChatTemplate

        setup = msgspec.msgpack.decode(payload, type=TemplateSetup)
        self._template = ChatTemplate(setup.source, origin=setup.origin)
        self._special_tokens = setup.special_tokens

    def _render(self, payload: bytes) -> bytes:
        from ...models.render_budget import RenderLimits, TemplateOverrun

        assert self._template is not None
        chat, limits = msgspec.msgpack.decode(payload, type=tuple[Chat, RenderLimits])
        try:
            own = {"tools": list(chat.tools) or None, **chat.template_kwargs}
            self._template.check_users(self._special_tokens, limits, own)
            text = self._template.render(
                chat.messages,
                special_tokens=self._special_tokens,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                template_kwargs=chat.template_kwargs,
                tools=chat.tools,
                limits=limits,
            )
            return text.encode()
        except TemplateOverrun as error:
            raise _ProgramOverrun(str(error), is_size=error.is_size) from None
        except MemoryError:
            raise _ProgramOverrun("rendering the chat takes more memory than it may", is_size=True) from None
        except UnicodeEncodeError:
            raise RequestError("the rendered chat has a lone surrogate and is not valid Unicode") from None


def _serve(requests: IO[bytes], replies: socket.socket, *, has_setup: bool) -> None:
    """Serve until the router has ended."""
    program = _Program()
    if not has_setup:
        replies.sendall(FRAME.pack(READY, 0))
    while len(head := requests.read(FRAME.size)) == FRAME.size:
        kind, size = FRAME.unpack(head)
        payload = requests.read(size)
        if len(payload) < size:
            return
        if program.set_up(kind, payload):
            replies.sendall(FRAME.pack(READY, 0))
        else:
            kind, reply = program.answer(kind, payload)
            replies.sendall(FRAME.pack(kind, len(reply)) + reply)


def main() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with (
        socket.socket(fileno=sys.stdin.fileno()) as sock,
        sock.makefile("rb") as requests,
        contextlib.suppress(BrokenPipeError, ConnectionResetError),  # the router has ended before its answer
    ):
        _serve(requests, sock, has_setup=sys.argv[1:] == [SETUP])
    return 0


if __name__ == "__main__":
    sys.exit(main())
