"""The types of a body's fields that need more than a bound: checked before pydantic looks at each element.

A list of a million wrong elements costs one pass and one message, not an error object for each.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from ..state.errors import clip, shown

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_PROMPTS = 256
MAX_INPUTS = 2048  # of one call for embeddings, as OpenAI's
MAX_TEMPLATE_CHARS = 256
MAX_TEMPLATE_INT = 1_000_000
TEMPLATE_KWARGS = frozenset(
    {
        "enable_thinking",
        "thinking",
        "thinking_budget",
        "reasoning_effort",
        "add_vision_id",
        "date_string",
    }
)


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list):
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop is a string of 1 to {MAX_STOP_CHARS} characters, got {shown(stop)}")
    return stops


def _prompt(value: object, most: int = MAX_PROMPTS, what: str = "prompts") -> object:
    """Check only the kinds of elements: a JSON array of a million ids has no pydantic error for each."""
    rule = "must be a string, a list of strings, a list of token ids or a list of token-id lists, and not be empty"
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(rule)
    kinds = set(map(type, value))
    if kinds == {list}:
        if not all(set(map(type, ids)) == {int} for ids in value):
            raise ValueError(rule)
    elif kinds != {int} and kinds != {str}:
        raise ValueError(rule)
    if kinds != {int} and len(value) > most:
        raise ValueError(f"at most {most} {what} in one call, got {len(value)}")
    return value


def _inputs(value: object) -> object:
    return _prompt(value, MAX_INPUTS, "inputs")


def _ids(value: object) -> object:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        raise ValueError("must be a list of token ids")
    return value


def _logit_bias(value: object) -> object:
    if isinstance(value, dict):
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} entries, got {len(value)}")
        bad = [key for key in value if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10)]
        if bad:
            raise ValueError(f"keys are token ids, got {clip(bad[0])}")
        return {int(key): bias for key, bias in value.items()}
    return value


def _template_kwargs(value: object) -> object:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in TEMPLATE_KWARGS:
                raise ValueError(f"{clip(key)} is not one of {', '.join(sorted(TEMPLATE_KWARGS))}")
            if not isinstance(item, (bool, int, str)) or _is_large(item):
                raise ValueError(
                    f"the value of {key} must be a bool, an int of at most {MAX_TEMPLATE_INT} "
                    f"or a string of at most {MAX_TEMPLATE_CHARS} characters"
                )
    return value


def _is_large(item: int | str) -> bool:
    return len(item) > MAX_TEMPLATE_CHARS if isinstance(item, str) else abs(item) > MAX_TEMPLATE_INT


Stops = Annotated[list[str], BeforeValidator(_stops)]
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_prompt)]
Inputs = Annotated[str | list[str] | list[int] | list[list[int]], PlainValidator(_inputs)]
AnyIds = Annotated[list[int], PlainValidator(_ids)]
LogitBias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_logit_bias)]
TemplateKwargs = Annotated[dict[str, bool | int | str], BeforeValidator(_template_kwargs)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
