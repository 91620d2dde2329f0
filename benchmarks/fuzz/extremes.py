"""Bodies that the schema takes, with values from the ends of what it takes: each field alone and in combinations.

The fields are those of the request models themselves. Numbers come from their bounds, and from the ends of float32 and
float64; a field of another kind has its values in `_OWN`. One that is in neither has no extremes, which is an error: so
no new field is forgotten.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from kvferry.common.errors import RequestError
from kvferry.common.request import MAX_CHOICES
from kvferry.router.bodies.fields import IGNORED, UNSUPPORTED
from kvferry.router.bodies.grammars import FIELDS
from kvferry.router.bodies.schemas import ChatBody, CompletionBody, GenerationBody, validate
from kvferry.router.bodies.values import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    MAX_TEMPLATE_CHARS,
)
from kvferry.router.turns.definitions import MAX_TOOLS

Values = list[Any]

# Smaller than what float64, float32 and bfloat16 have as normal numbers, and what a product of two makes of them.
_TINY = (5e-324, 1e-308, 1e-45, 1e-40, 1e-39, 1e-38, 1.2e-38, 1e-37, 1e-30, 1e-19, 1e-10, 1e-6, 1e-5, 1e-3)
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "maxItems": 3}},
    "required": ["name"],
    "additionalProperties": False,
}
_MAX_CHANGED = 8  # fields of one body
_LABELLED = 0.1  # share of bodies with a field of no effect as well
_RARE = 0.03  # share of bodies that ask for much
_FEW_TOKENS, _MANY_TOKENS = 64, 200


class ExtremeBodies:
    """(path, body) without end: of `vocab_size` tokens, `max_model_len` of them at most in a prompt and its answer."""

    def __init__(self, seed: int, *, vocab_size: int, max_model_len: int) -> None:
        self._random = random.Random(seed)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._kinds: list[tuple[str, type[GenerationBody], Callable[[dict[str, object]], object]]] = [
            ("/v1/completions", CompletionBody, partial(validate, CompletionBody)),
            ("/v1/chat/completions", ChatBody, partial(validate, ChatBody)),
        ]
        self._values = {kind: extremes(kind, vocab_size) for _, kind, _ in self._kinds}

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        while True:
            path, kind, check = self._random.choice(self._kinds)
            body = self._sized(kind, self._combined(kind, self._values[kind]))
            text = json.dumps(body, ensure_ascii=self._random.random() < 0.5)
            try:
                check(json.loads(text))
            except RequestError:
                continue  # the fields exclude each other
            yield path, text.encode()

    def _combined(self, kind: type[GenerationBody], values: Mapping[str, Values]) -> dict[str, Any]:
        chosen = self._random.sample(sorted(kind.model_fields), self._random.randint(1, _MAX_CHANGED))
        if self._random.random() < _LABELLED:
            chosen.append(self._random.choice(sorted(values.keys() - kind.model_fields.keys())))
        required = [name for name, field in kind.model_fields.items() if field.is_required()]
        body = {name: self._random.choice(values[name]) for name in dict.fromkeys([*required, *chosen])}
        for name in [name for name in FIELDS if body.get(name) is not None][1:]:
            del body[name]  # an answer follows one grammar
        if "stream_options" in body:
            body.setdefault("stream", True)
        if body.get("top_logprobs") is not None:
            body["logprobs"] = True
        if body.get("best_of") is not None:
            body["n"] = body["best_of"]
        if body.get("continue_final_message"):
            body["messages"] = [*body["messages"], {"role": "assistant", "content": "and"}]
        return body

    def _sized(self, kind: type[GenerationBody], body: dict[str, Any]) -> dict[str, Any]:
        """Lengths that go together: few tokens mostly, now and then as many as there may be."""
        limits = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
        most = min((body[name] for name in limits), default=4)
        if self._random.random() < _RARE:
            most = self._large(kind, body)
        body |= dict.fromkeys(limits or ["max_tokens"], most)
        if body.get("min_tokens") is not None and most is not None:
            body["min_tokens"] = min(body["min_tokens"], most)
        return body

    def _large(self, kind: type[GenerationBody], body: dict[str, Any]) -> int | None:
        """The longest prompt, the longest answer, or many long ones. Returns the limit of tokens; None: what fits."""
        if kind is CompletionBody and self._random.random() < 0.3:
            rest = self._random.choice((1, 2, _FEW_TOKENS))
            body["prompt"] = [self._random.randrange(self._vocab_size) for _ in range(self._max_model_len - rest)]
            return rest
        is_one = self._random.random() < 0.5
        body |= {"ignore_eos": True, "n": 1 if is_one else MAX_CHOICES, "stop": None}
        body.pop("best_of", None)
        if kind is CompletionBody:
            body["prompt"] = "many"
        return None if is_one and kind is ChatBody else _MANY_TOKENS


def extremes(kind: type[GenerationBody], vocab_size: int) -> dict[str, Values]:
    """By field, those of no effect included. Raises AssertionError for a field without."""
    own = _own(vocab_size)
    found = {name: own[name] if name in own else _of_type(name, field) for name, field in kind.model_fields.items()}
    found |= {name: own[name] for name in IGNORED}
    return found | {name: [None, *harmless] for name, harmless in UNSUPPORTED.items() if name not in found}


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be; ends that are open do not belong to it."""

    low: float = -math.inf
    high: float = math.inf
    is_open: tuple[bool, bool] = (False, False)

    @classmethod
    def of(cls, metadata: Sequence[object]) -> _Range:
        """From what pydantic keeps of `Field(ge=..., lt=...)`."""
        bounds = {name: value for one in metadata for name in ("ge", "gt", "le", "lt") if (value := _get(one, name))}
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        assert low is not None and high is not None, "a number without bounds has its values in `_own`"
        return cls(low[0], high[0], ("gt" in bounds, "lt" in bounds))

    def __contains__(self, value: float) -> bool:
        opens, closes = self.is_open
        return (self.low < value if opens else self.low <= value) and (
            value < self.high if closes else value <= self.high
        )


def _get(metadata: object, name: str) -> tuple[float] | None:
    value = getattr(metadata, name, None)
    return (value,) if isinstance(value, int | float) else None


def _of_type(name: str, field: FieldInfo) -> Values:
    """From what the field may be, and its bounds."""
    options = [option for option in _options(field.annotation) if option is not NoneType]
    assert len(options) == 1, f"{name}: no extremes are known for it (`_own`), and none follow from {field.annotation}"
    plain, *annotated = get_args(options[0]) if get_origin(options[0]) is Annotated else (options[0],)
    metadata = [one for info in (field, *annotated) if isinstance(info, FieldInfo) for one in info.metadata]
    if plain is bool:
        return [None, True, False]
    if get_origin(plain) is Literal:
        return [None, *get_args(plain)]
    assert plain in (int, float), f"{name}: no extremes are known for it (`_own`), and none follow from {plain}"
    return [None, *(_ints if plain is int else _floats)(_Range.of(metadata))]


def _options(annotation: object) -> tuple[object, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _ints(within: _Range) -> Values:
    low, high = int(within.low), int(within.high)
    return sorted({value for value in (low, low + 1, 0, 1, 2, high - 1, high) if value in within})


def _floats(within: _Range) -> Values:
    low, high = within.low, within.high
    ends = (low, high, math.nextafter(low, math.inf), math.nextafter(high, -math.inf), 0.0, 0.5, 1.0)
    tiny = (sign * value for value in _TINY for sign in (1, -1))
    return sorted({value for value in (*ends, *tiny) if value in within})


def _own(vocab_size: int) -> dict[str, Values]:
    """Of fields whose ends do not follow from a bound."""
    last = vocab_size - 1
    lengths = [None, 0, 1, 2, 17, _FEW_TOKENS]
    texts: Values = ["", "a", "\x00", " " * 300, "é😀" * 20, "x" * 256, "<|eos|>"]
    return {
        "model": [None],  # there is one, which needs no name
        "prompt": [
            *(text for text in texts if text), [0], [last], [1, 3] * 8, list(range(min(vocab_size, 300))),
            ["a", "b"], [[5], [last, 0]], ["word "] * 16, "word " * 200,
        ],
        "messages": [
            [{"role": "user", "content": "hi"}],
            [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
            [{"role": role, "content": "x"} for role in ("developer", "user", "assistant", "tool", "user")],
            [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}],
            [{"role": "user", "content": "\x00", "name": "n" * 256, "tool_call_id": "t" * 256}],
            [{"role": "assistant"}, {"role": "user", "content": "<|end|>"}],
            [{"role": "user", "content": "y"}] * 40,
        ],
        "stream_options": [
            None, {}, {"include_usage": True}, {"include_usage": False, "continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
        ],
        "stop": [
            None, [], "a", ["\n", " "], ["\x00"], ["é", "😀"], ["x" * MAX_STOP_CHARS] * MAX_STOPS,
            [chr(ord("a") + index) for index in range(MAX_STOPS)],
        ],
        "max_tokens": lengths,
        "max_completion_tokens": [length for length in lengths if length != 0],  # for none there is the older name
        "min_tokens": [None, 0, 1, 17, _FEW_TOKENS],
        "logit_bias": [
            None, {}, {"0": -100}, {str(last): 100}, {"1": 100, "3": 100}, {"5": 5e-324, "6": -1e-308},
            *({str(index): bias for index in range(min(vocab_size, MAX_LOGIT_BIAS))} for bias in (-100, 100, 0)),
        ],
        "stop_token_ids": [None, [], [0], [last], list(range(min(vocab_size, MAX_STOP_TOKEN_IDS)))],
        "bad_words": [
            None, [], ["a"], ["."], ["x" * MAX_BAD_WORD_CHARS], ["é😀", "\x00"],
            [f"{index:03d}" for index in range(MAX_BAD_WORDS)],
        ],
        "allowed_token_ids": [None, [0], [last], [1], [5, 6, 5], list(range(vocab_size))],
        "cache_salt": [None, "s", "é" * 256],
        "suffix": [None, ""],  # few models take another one
        "user": [None, "", "u" * 5000, 7, {"a": [1]}],
        "chat_template_kwargs": [
            None, {}, {"enable_thinking": True},
            {"thinking_budget": 1_000_000, "date_string": "d" * MAX_TEMPLATE_CHARS},
        ],
        "documents": [None, []],
        "response_format": [
            None, {"type": "text"}, {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": _SCHEMA}},
            {"type": "structural_tag", "triggers": ["<"], "structures": [{"begin": "<a>", "schema": {}, "end": "<"}]},
        ],
        "structured_outputs": [
            None, {"json": _SCHEMA}, {"json": json.dumps(_SCHEMA)},
            {"json_object": True, "disable_any_whitespace": True}, {"regex": "(a|\\n)*"},
            {"choice": texts[:1]}, {"choice": texts}, {"grammar": 'root ::= "a"*\n'}, {"grammar": "start: /[^a]+/"},
        ],
        "guided_json": [None, True, {}, _SCHEMA, "{}"],
        "guided_regex": [None, "a", "a{2048}", "\\p{L}+", "."],
        "guided_choice": [None, ["a"], [str(index) for index in range(300)]],
        "guided_grammar": [None, "start: %json {}"],
        "metadata": [None, {"a": "b"}, []],
        "store": [None, True],
        "safety_identifier": [None, "x"],
        "prompt_cache_key": [None, "x"],
        "prompt_cache_options": [None, {}],
        "prompt_cache_retention": [None, "24h"],
        "tools": [
            None, [], [{"type": "function", "function": {"name": "f"}}],
            [{"type": "function", "function": {"name": f"n{index}"}} for index in range(MAX_TOOLS)],
        ],
        "tool_choice": [None, "none", "auto"],
        "parallel_tool_calls": [None, True, False],
        "reasoning_effort": [None, "none", "xhigh", "max"],
        "thinking_token_budget": [None, 0, 1, 17],
        "truncate_prompt_tokens": [None, -1, 1, 2, 17],
        "request_id": [None, "x" * 300],
        "session_id": [None, "x" * 300],
        "service_tier": [None, "flex"],
        "prediction": [None, {"type": "content", "content": "x"}],
        "guided_decoding_backend": [None, "auto"],
    }  # fmt: skip
