"""Chat messages to one prompt text, by the model's own Jinja template.

A template comes out of a model directory and its values from clients, so neither is trusted: it runs in Jinja's
immutable sandbox, under limits on input, output, loop items, repeated strings and time. Rendering is plain CPU work of
up to `MAX_RENDER_S`; the caller keeps it off the event loop.

The conventions are Hugging Face's: `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop
controls, trimmed blocks, and the `generation` tag, which marks what the assistant said and prints its body.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .clock import Clock, SystemClock, wall_time_s
from .errors import ConfigError, RequestError
from .model_files import read_json

MAX_SOURCE_BYTES = 1 << 20
MAX_INPUT_CHARS = 8 << 20  # strings of all messages and template_kwargs together
MAX_OUTPUT_CHARS = 16 << 20
MAX_LOOP_ITEMS = 100_000  # of all range() calls of one rendering
MAX_DEPTH = 32  # lists and objects within each other
MAX_RENDER_S = 5.0

_CONTINUE_MARK = "\ue0f0kvferry-continue\ue0f0"  # private use: stands where a continued message ends
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
        self._origin = origin

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        special_tokens: Mapping[str, str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt. With `continue_final_message` it ends inside the last message, and no generation prompt is added.

        Raises RequestError where the messages are what the template cannot take.
        """
        kwargs, special_tokens = template_kwargs or {}, special_tokens or {}
        if taken := sorted((_RESERVED | special_tokens.keys()) & kwargs.keys()):
            raise RequestError(f"chat_template_kwargs must not set {taken[0]}", param="chat_template_kwargs")
        _check_size(kwargs, "chat_template_kwargs", _check_size(messages, "messages", MAX_INPUT_CHARS))
        flat = [_with_text_content(message, index) for index, message in enumerate(messages)]
        mark = _mark_end(flat) if continue_final_message else None
        values = {
            **special_tokens,
            "tools": None,
            "documents": None,
            **kwargs,
            "messages": flat,
            "add_generation_prompt": add_generation_prompt and mark is None,
        }
        text = self._generate(values)
        return text if mark is None else _cut_at(text, mark)

    def _generate(self, values: Mapping[str, object]) -> str:
        budget = _Budget(self._clock)
        try:
            return "".join(budget.limit_output(self._template.generate({**values, "range": budget.range})))
        except RequestError:
            raise
        except _Refusal as error:
            raise RequestError(str(error), param="messages") from None
        except SecurityError as error:
            raise ConfigError(f"{self._origin} does what the sandbox forbids: {error}") from error
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


def load_chat_template(
    model_dir: Path, tokenizer_config: Mapping[str, object], *, override: Path | None = None
) -> ChatTemplate | None:
    """The template in `override`, else the model's own, else None. Raises ConfigError for one that does not compile."""
    if override is not None:
        return _from_file(override)
    if (file := model_dir / "chat_template.jinja").is_file():
        return _from_file(file)
    file = model_dir / "chat_template.json"
    found = read_json(file, default={}).get("chat_template")
    if found is None:
        file = model_dir / "tokenizer_config.json"
        found = tokenizer_config.get("chat_template")
    return None if found is None else ChatTemplate(_default_of(found, file), origin=str(file))


def _from_file(file: Path) -> ChatTemplate:
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {file}: {error}") from error
    return ChatTemplate(source, origin=str(file))


def _default_of(found: object, file: Path) -> str:
    """A template stands as a string, or as a list of named ones."""
    if isinstance(found, str):
        return found
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        named = {item.get("name"): item.get("template") for item in found}
        if isinstance(source := named.get("default"), str):
            return source
        raise ConfigError(f"{file}: none of the chat templates {sorted(map(str, named))} is named default")
    raise ConfigError(f"{file}: chat_template is neither a string nor a list of named templates")


# ---- the environment


class _Refusal(Exception):
    """The template called raise_exception: its text is for the client."""


class _GenerationTag(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with operators that could make a huge value out of a small one kept in bounds."""

    intercepted_binops = frozenset(("+", "*", "**"))

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_length(len(left) + len(right))
        elif operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                    _check_length(len(sized) * times)
        elif operator == "**":
            raise SecurityError("the ** operator")
        return super().call_binop(context, operator, left, right)


def _compile(source: str, origin: str, now: Callable[[], int]) -> Template:
    if (size := len(source.encode())) > MAX_SOURCE_BYTES:
        raise ConfigError(f"{origin} has {size} bytes; at most {MAX_SOURCE_BYTES} are compiled")
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.fromtimestamp(now()).strftime(form)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"{origin} is broken in line {error.lineno}: {error.message}; --chat-template FILE replaces it"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{origin} is nested too deeply; --chat-template FILE replaces it") from error


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


# ---- limits


class _Budget:
    """What one rendering may still spend."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._end = clock.now() + MAX_RENDER_S
        self._loop_items = MAX_LOOP_ITEMS

    def range(self, *bounds: int) -> range:
        items = range(*bounds)
        self._loop_items -= len(items)
        if self._loop_items < 0:
            raise RequestError(f"the chat template loops over more than {MAX_LOOP_ITEMS} numbers", param="messages")
        self._check_time()
        return items

    def limit_output(self, chunks: Iterator[str]) -> Iterator[str]:
        num_chars = 0
        for chunk in chunks:
            num_chars += len(chunk)
            _check_length(num_chars)
            self._check_time()
            yield chunk

    def _check_time(self) -> None:
        if self._clock.now() > self._end:
            raise RequestError(f"rendering the chat took more than {MAX_RENDER_S:g} s", param="messages")


def _check_length(num_chars: int) -> None:
    if num_chars > MAX_OUTPUT_CHARS:
        raise RequestError(
            f"the rendered chat would have more than {MAX_OUTPUT_CHARS} characters", param="messages", status=413
        )


def _check_size(value: object, param: str, budget: int, depth: int = 0) -> int:
    """The characters left of `budget` after `value`, which may hold JSON's types only."""
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
        raise RequestError(f"messages and template arguments have more than {MAX_INPUT_CHARS} characters", param=param)
    for child in children:
        budget = _check_size(child, param, budget, depth + 1)
    return budget


# ---- messages


def _with_text_content(message: Mapping[str, object], index: int) -> dict[str, object]:
    """The message with its content as one string: templates concatenate it."""
    content = message.get("content")
    if content is None:
        return {**message, "content": ""}
    if isinstance(content, str):
        return dict(message)
    if isinstance(content, (list, tuple)):
        texts = [_part_text(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content)]
        return {**message, "content": "".join(texts)}
    raise RequestError("content is a string or a list of text parts", param=f"messages[{index}].content")


def _part_text(part: object, param: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(text := part.get("text"), str):
        raise RequestError('only parts of the form {"type": "text", "text": ...} are supported', param=param)
    return text


def _mark_end(messages: list[dict[str, object]]) -> str:
    """Puts a mark behind the last message's text and returns it."""
    if not messages:
        raise RequestError("there is no message to continue", param="messages")
    text, mark = str(messages[-1]["content"]), _CONTINUE_MARK
    while mark in text:
        mark += _CONTINUE_MARK
    messages[-1]["content"] = text + mark
    return mark


def _cut_at(text: str, mark: str) -> str:
    end = text.rfind(mark)
    if end < 0:
        raise RequestError(
            "the chat template does not print the last message: it cannot be continued", param="messages"
        )
    return text[:end]
