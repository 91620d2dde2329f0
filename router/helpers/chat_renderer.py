"""Chats to prompts, in processes that can be killed: a template is a program, of a model directory that nobody trusts.

    a small chat, an ordinary template ─> the quick process: a tenth of a millisecond
    a large chat, or what was too much for the quick one ─> the long process: seconds at most

The sandbox (models/template_sandbox.py) ends what it can price; what it cannot is ended with its process. Who waits for
the quick one waits for tenths of a second at most, whatever other chats are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ...common.errors import CapacityError, ConfigError, RequestError
from ...models.chat_template import ChatTemplate, overrun_error
from ...models.render_budget import RenderLimits, TemplateOverrun
from .helper import Helper, HelperLost
from .wire import REFUSAL, RENDER_CHAT, SET_TEMPLATE, Chat, HelperRefusal, TemplateSetup

QUICK_BYTES = 16 * 2**10
QUICK = RenderLimits(max_s=0.1, max_steps=10_000, max_chars=2**18, max_items=100_000)
LONG = RenderLimits()
_SLACK_S = 0.5  # from the end that a rendering sees itself to its process's


class Renderer(Protocol):
    """A renderer makes prompts of chats."""

    async def render(self, chat: Chat) -> str:
        """Raises RequestError for what the template does not take, or takes too long over."""
        ...

    def start(self) -> None:
        """Do now what the first chat would wait for."""
        ...

    def close(self) -> None: ...


class ChatRenderer:
    """`ChatRenderer` renders the chats of one model. Belongs to one loop."""

    def __init__(self, template: ChatTemplate, special_tokens: Mapping[str, str]) -> None:
        setup = TemplateSetup(template.source, template.origin, dict(special_tokens))
        frame = (SET_TEMPLATE, msgspec.msgpack.encode(setup))
        self.quick, self.long = Helper(frame), Helper(frame)

    async def render(self, chat: Chat) -> str:
        payload = msgspec.msgpack.encode((chat, QUICK))
        if len(payload) <= QUICK_BYTES:
            try:
                return await _ask(self.quick, payload, QUICK)
            except TemplateOverrun:
                pass
        try:
            return await _ask(self.long, msgspec.msgpack.encode((chat, LONG)), LONG)
        except TemplateOverrun as error:
            raise overrun_error(str(error), is_size=error.is_size) from None

    def start(self) -> None:
        """So that the first chat need not wait for a process."""
        self.quick.start()

    def close(self) -> None:
        self.quick.close()
        self.long.close()


async def _ask(helper: Helper, payload: bytes, limits: RenderLimits) -> str:
    try:
        kind, answer = await helper.ask_again(RENDER_CHAT, payload, limits.max_s + _SLACK_S)
    except HelperLost as error:
        if error.is_late:
            raise TemplateOverrun(f"rendering the chat took more than {limits.max_s:g} s") from None
        raise CapacityError(f"the chat could not be rendered: {error}", status=503) from None
    if kind != REFUSAL:
        return answer.decode()
    refusal = msgspec.msgpack.decode(answer, type=HelperRefusal)
    match refusal.kind:
        case "overrun":
            raise TemplateOverrun(refusal.message, is_size=refusal.is_size)
        case "model":
            raise ConfigError(refusal.message)
        case "request":
            raise RequestError(refusal.message, param=refusal.param, code=refusal.code, status=refusal.status)
