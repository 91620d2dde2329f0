"""Chat messages to one prompt text, by the model's own Jinja template.

A template comes out of a model directory and its values from clients, so neither is trusted: it runs in a sandbox
under limits (`render_budget.py`). Rendering is plain CPU work of up to `RenderLimits.max_s`, and more where the
sandbox has a hole: the router does it in a process that it can kill.

The conventions are Hugging Face's: `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop
controls, trimmed blocks, and the `generation` tag, which marks what the assistant said and prints its body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from jinja2.exceptions import SecurityError

from ..common.clock import Clock, SystemClock, wall_time_s
from ..common.errors import ConfigError, RequestError
from .render_budget import RenderBudget, RenderLimits, TemplateOverrun, spending
from .stored.json_files import read_json
from .template_messages import TOOL, UNTOLD, ContentForms, Messages, cut_at, mark_end, with_text_content
from .template_sandbox import compile_environment

MAX_SOURCE_BYTES = 1 << 20
MAX_INPUT_CHARS = 8 << 20  # strings of all messages and template_kwargs together
TOO_LARGE = "chat_too_large"  # a code; what a template itself refuses has none
MAX_DEPTH = 32  # lists and objects within each other
_MAX_REFUSAL_CHARS = 1024
_MAX_DATE_CHARS = 256

_PLAIN = {"role": "user", "content": "Hello"}
_RESERVED = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "range"}


class ChatTemplate:
    """A compiled template. Safe to render from several threads at once."""

    def __init__(
        self,
        source: str,
        *,
        origin: str = "chat template",
        clock: Clock | None = None,
        now: Callable[[], int] = wall_time_s,
    ) -> None:
        self._clock = clock or SystemClock()
        self._template = _compile(source, origin, now)
        self._forms: dict[bool, ContentForms] = {}  # of chats with tools, and without
        self.source = source
        self.origin = origin

    @property
    def variables(self) -> frozenset[str]:
        """The names that it looks up in what it is given. Its texts, and fields of messages, are none."""
        syntax_tree = self._template.environment.parse(self.source)
        return frozenset(meta.find_undeclared_variables(syntax_tree))

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        special_tokens: Mapping[str, str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] = (),
        limits: RenderLimits | None = None,
    ) -> str:
        """Return the prompt. With `continue_final_message` it ends inside the last message, without generation prompt.

        Raises RequestError where the messages are what the template cannot take, ConfigError where it takes none, and
        TemplateOverrun where it takes more than the `limits` that the caller gave; more than the usual ones is the
        client's error.
        """
        kwargs, special_tokens = template_kwargs or {}, special_tokens or {}
        if taken := sorted((_RESERVED | special_tokens.keys()) & kwargs.keys()):
            raise RequestError(f"chat_template_kwargs must not set {taken[0]}", param="chat_template_kwargs")
        room = _check_size(messages, "messages", MAX_INPUT_CHARS)
        room = _check_size(tools, "tools", room)
        _check_size(kwargs, "chat_template_kwargs", room)
        flat = [with_text_content(message, index) for index, message in enumerate(messages)]
        mark = mark_end(flat) if continue_final_message else None
        values = {
            **special_tokens,
            "tools": list(tools) or None,
            "documents": None,
            **kwargs,
            "add_generation_prompt": add_generation_prompt and mark is None,
        }
        try:
            forms = self._content_forms(special_tokens, bool(tools), limits or RenderLimits())
            values["messages"] = list(map(forms.formed, flat))
            text = self._generate(values, limits or RenderLimits())
        except TemplateOverrun as error:
            if limits is not None:
                raise
            raise overrun_error(str(error), is_size=error.is_size) from None
        except SecurityError as error:
            reason = f"the chat template does what the sandbox forbids: {error}"
            if self._renders_plainly(special_tokens, limits or RenderLimits()):
                raise RequestError(f"{reason}, for these messages", param="messages") from None
            raise ConfigError(reason) from error
        return text if mark is None else cut_at(text, mark)

    def check_users(
        self, special_tokens: Mapping[str, str], limits: RenderLimits, own: Mapping[str, object] | None = None
    ) -> None:
        """Raise ConfigError where it tells nothing of what users say, nor beside a chat's `own` tools and arguments."""
        if not self._content_forms(special_tokens, False, limits).tells_users:
            values = {**special_tokens, "tools": None, "documents": None, **(own or {})}
            if not ContentForms.of(lambda messages: self._tried(values, messages, limits)).tells_users:
                raise ConfigError(UNTOLD)

    def _content_forms(self, special_tokens: Mapping[str, str], has_tools: bool, limits: RenderLimits) -> ContentForms:
        """Return the forms in which it takes contents: found by trying, once for each kind of chat."""
        if (known := self._forms.get(has_tools)) is None:
            values = {**special_tokens, "tools": [TOOL] if has_tools else None, "documents": None}
            known = ContentForms.of(lambda messages: self._tried(values, messages, limits))
            self._forms[has_tools] = known
        return known

    def _renders_plainly(self, special_tokens: Mapping[str, str], limits: RenderLimits) -> bool:
        """Tell whether a plain message is rendered, where others were not."""
        try:
            return self._tried({**special_tokens, "tools": None, "documents": None}, [_PLAIN], limits) is not None
        except TemplateOverrun:
            return False

    def _tried(self, values: Mapping[str, object], messages: Messages, limits: RenderLimits) -> str | None:
        """Return a prompt; None: the template refuses the messages, or does with them what it must not."""
        try:
            told = list(map(dict, messages))
            return self._generate({**values, "messages": told, "add_generation_prompt": True}, limits)
        except (RequestError, SecurityError):
            return None

    def _generate(self, values: Mapping[str, object], limits: RenderLimits) -> str:
        budget = RenderBudget(limits, self._clock)
        try:
            with spending(budget):
                return _joined(self._template.generate({**values, "range": budget.range}), budget)
        except (RequestError, SecurityError):
            raise
        except _Refusal as error:
            raise RequestError(str(error)[:_MAX_REFUSAL_CHARS], param="messages") from None
        except (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ) as error:
            reason = f"{type(error).__name__}: {error}"[:300]
            raise RequestError(f"the chat template cannot render these messages: {reason}", param="messages") from error


def overrun_error(message: str, *, is_size: bool) -> RequestError:
    """Return the client's error for a chat that its template takes too much for."""
    code, status = (TOO_LARGE, 413) if is_size else ("chat_too_slow", 400)
    return RequestError(message, param="messages", code=code, status=status)


def load_chat_template(
    model_dir: Path, tokenizer_config: Mapping[str, object], *, override: Path | None = None
) -> ChatTemplate | None:
    """Load the template in `override`, else the model's own, else None. Raises ConfigError if it does not compile."""
    if override is not None:
        return _from_file(override)
    if (file := model_dir / "chat_template.jinja").is_file():
        tool_use = model_dir / "additional_chat_templates" / "tool_use.jinja"
        return _from_file(file, tool_use if tool_use.is_file() else None)
    file = model_dir / "chat_template.json"
    found = read_json(file, default={}).get("chat_template")
    if found is None:
        file = model_dir / "tokenizer_config.json"
        found = tokenizer_config.get("chat_template")
    return None if found is None else ChatTemplate(_default_of(found, file), origin=str(file))


def _from_file(file: Path, tool_use: Path | None = None) -> ChatTemplate:
    return ChatTemplate(_with_tool_use(_text_of(file), tool_use and _text_of(tool_use)), origin=str(file))


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the chat template {file} is no text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read the chat template {file}: {error.strerror}") from error


def _default_of(found: object, file: Path) -> str:
    """Find the default one: a template stands as a string, or as a list of named ones."""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        named = {item.get("name"): item.get("template") for item in found}
        if isinstance(source := named.get("default"), str):
            return _with_tool_use(source, named.get("tool_use"))
        raise ConfigError(f"{file}: none of the chat templates {sorted(map(str, named))} is named default")
    raise ConfigError(f"{file}: chat_template is neither a string nor a list of named templates")


def _with_tool_use(default: str, tool_use: object) -> str:
    """Make one template of two: a chat with tools is written by the one that is for them, as in `transformers`.

    Each begins a line, and lacks the line's end that is taken off a template, as if it stood alone. Jinja knows three
    ends of a line, and takes each for the same.
    """
    if not isinstance(tool_use, str):
        return default
    parts = (re.sub("\r\n?", "\n", source).removesuffix("\n") for source in (tool_use, default))
    return "{% if tools %}\n" + "{%+ else %}\n".join(parts) + "{%+ endif %}"


# ---- the environment


class _Refusal(Exception):
    """The template called raise_exception: its text is for the client."""


def _compile(source: str, origin: str, now: Callable[[], int]) -> Template:
    if (size := len(source.encode())) > MAX_SOURCE_BYTES:
        raise ConfigError(f"{origin} has {size} bytes; at most {MAX_SOURCE_BYTES} are compiled")
    values = {"raise_exception": _raise_exception, "strftime_now": lambda form: _date(form, now())}
    environment = compile_environment({"tojson": _tojson}, values)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{origin} is broken in line {error.lineno}: {error.message}; --chat-template FILE replaces it"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply; --chat-template FILE replaces it") from error


def _joined(parts: Iterator[str], budget: RenderBudget) -> str:
    known: list[str] = []
    num_chars = 0
    for part in parts:
        num_chars += len(part)
        budget.check_length(num_chars)
        budget.check_time()
        known.append(part)
    return "".join(known)


def _date(form: object, now_s: int) -> str:
    if not isinstance(form, str) or len(form) > _MAX_DATE_CHARS or re.search(r"%[^a-zA-Z%]*\d", form):
        raise SecurityError("a date's form of this kind")
    return datetime.fromtimestamp(now_s).strftime(form)


def _raise_exception(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# ---- input


def _check_size(value: object, param: str, budget: int, depth: int = 0) -> int:
    """Return the characters left of `budget` after `value`, which may hold JSON's types only."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{param} is nested more than {MAX_DEPTH} deep", param=param)
    if isinstance(value, Mapping):
        children: Sequence[object] = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple)):
        children = value
    elif value is None or isinstance(value, (str, int, float)):
        children = ()
    else:
        raise RequestError(f"{param} holds a {type(value).__name__}", param=param)
    budget -= len(value) if isinstance(value, str) else 1
    if budget < 0:
        text = f"messages and template arguments have more than {MAX_INPUT_CHARS} characters"
        raise RequestError(text, param=param, code=TOO_LARGE)
    for child in children:
        budget = _check_size(child, param, budget, depth + 1)
    return budget
