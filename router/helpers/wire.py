"""The router and its helper processes talk in frames, with MessagePack in them.

"j" the bound of commas, a body              ─> "v" the value
"t" a `TemplateSetup`, once, at the start       no answer
"c" a `Chat`, and its `RenderLimits`         ─> "v" the prompt, as UTF-8
"s" a `VocabularySetup`, once, at the start     no answer
"g" a `Grammar`                              ─> "v" its packed first mask: it can be followed
any of them                                  ─> "e" a `HelperRefusal`: why not
                                                "!" once: it is ready, its setup done where it is started with `SETUP`
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

FRAME = struct.Struct(">cI")  # what it is, how many bytes follow
COMMAS = struct.Struct(">I")
PARSE_JSON, SET_TEMPLATE, RENDER_CHAT, SET_VOCABULARY, COMPILE_GRAMMAR = b"j", b"t", b"c", b"s", b"g"
VALUE, REFUSAL, READY = b"v", b"e", b"!"
SETUP = "setup"  # argument of a process whose first frame is a setup


class HelperRefusal(msgspec.Struct):
    """An error on its way. `kind`: the client's, a limit of the template's that was reached, the model's own."""

    kind: Literal["request", "overrun", "model"]
    message: str
    param: str | None = None
    code: str | None = None
    status: int = 400
    is_size: bool = False  # the limit was one of size


class TemplateSetup(msgspec.Struct):
    """The setup that all chats of a model have in common."""

    source: str
    origin: str
    special_tokens: dict[str, str]


class VocabularySetup(msgspec.Struct):
    """The setup that all grammars for a model have in common."""

    model_dir: str
    vocab_size: int
    eos_token_ids: list[int]
    gives_way: bool = False  # grammars are compiled aside (`aside.py`), and with a niceness where that fails


@dataclass(slots=True, frozen=True)
class Chat:
    """A chat that is to be rendered."""

    messages: Sequence[Mapping[str, object]]
    template_kwargs: Mapping[str, object]
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, object]] = ()
