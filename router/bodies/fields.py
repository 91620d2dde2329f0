"""A body's field is known here, known elsewhere but not supported here, or a slip of the pen.

Nothing is ever ignored in silence: a field that would change the answer and is not supported is a 400 that names
it, unless its value asks for what happens anyway. `IGNORED` are labels for the caller's own book-keeping.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic_core import ErrorDetails

from ...common.errors import RequestError
from ..state.errors import clip, shown

# Accepted in any form, without effect on the answer: that is also what they do elsewhere.
IGNORED = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "request_id", "session_id", "service_tier"),
        *("prediction", "guided_decoding_backend"),  # elsewhere they are about how fast an answer comes
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)

# Field -> the values (besides null) that ask for nothing.
UNSUPPORTED_EVERYWHERE: Mapping[str, tuple[object, ...]] = {  # vLLM has them on each of its surfaces
    "ec_transfer_params": (),
    "kv_transfer_params": (),
    "media_io_kwargs": (),
    "mm_payload": ("tensors", "none"),
    "mm_processor_kwargs": (),
    "return_mm_kwargs": (False,),
    "vllm_xargs": (),
    "watermarking": (False,),
}
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED_EVERYWHERE,
    "audio": (),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "length_penalty": (1.0, 1),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "moderation": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # says nothing without tools
    "prompt_embeds": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True, False),
    "stream_interval": (1,),
    "suffix": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),  # the models' usual one
    "web_search_options": (),
}

_MAX_EXACT = 2**53  # up to here a float is one whole number


def check_fields(
    body: Mapping[str, object],
    known: frozenset[str],
    ignored: list[str] | None = None,
    *,
    unsupported: Mapping[str, tuple[object, ...]] = UNSUPPORTED,
    labels: frozenset[str] = IGNORED,
) -> dict[str, object]:
    """The fields that are left to validate: neither labels nor unsupported ones that ask for nothing; 5.0 is 5.

    Unknown ones are refused; where `ignored` is given, it gets their names. One that is null is not there: clients that
    write down their whole request have so what they do not give.
    """
    kept = {}
    for name, value in body.items():
        if name in known:
            kept[name] = whole(value)
        elif value is None:
            continue
        elif name in unsupported:
            if not any(_same(value, harmless) for harmless in unsupported[name]):
                raise not_supported(name, unsupported[name])
        elif name not in labels:
            if ignored is not None:
                ignored.append(name)
                continue
            raise unknown_field(name, known | labels)
    return kept


def whole(value: object) -> object:
    """Return a whole number that is written as a float as the integer that it is, all else as it stands."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT
    return int(value) if isinstance(value, float) and is_whole else value


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless


def not_supported(name: str, harmless: tuple[object, ...] = ()) -> RequestError:
    hint = f" (only {' or '.join(map(repr, harmless))})" if harmless else ""
    return RequestError(f"'{name}' is not supported by this server{hint}", param=name, code="unsupported_parameter")


def checked_object(raw: object, where: str) -> dict[str, object]:
    """Raises RequestError for what is no object."""
    if not isinstance(raw, dict):
        raise RequestError(f"{where} must be an object, got {shown(raw)}", param=where)
    return raw


def checked_array(raw: object, where: str) -> list[object]:
    """Raises RequestError for what is no array."""
    if not isinstance(raw, list):
        raise RequestError(f"{where} must be an array, got {shown(raw)}", param=where)
    return raw


def checked_string(raw: object, where: str) -> str:
    """Raises RequestError for what is no string."""
    if not isinstance(raw, str):
        raise RequestError(f"{where} must be a string, got {shown(raw)}", param=where)
    return raw


def known_object(raw: object, known: frozenset[str], where: str, ignored: list[str] | None) -> dict[str, object]:
    """Return an object of these fields. Raises RequestError for what is none, and for others as `take_only` does."""
    given = checked_object(raw, where)
    take_only(given, known, where, ignored)
    return given


def take_only(given: Mapping[str, object], known: frozenset[str], where: str, ignored: list[str] | None) -> None:
    """Refuse the first of other fields, unless a list takes their names. Those that are null are not there."""
    extra = sorted(name for name, value in given.items() if value is not None and name not in known)
    if extra and ignored is None:
        raise unknown_field(extra[0], known, where)
    if ignored is not None:
        ignored += [f"{where}.{name}" for name in extra]


def unknown_field(name: str, known: frozenset[str], where: str = "") -> RequestError:
    near = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    param = f"{where}.{name}" if where else name
    return RequestError(f"unknown field {clip(param)}{hint}", param=param[:128], code="unknown_parameter")


def invalid_field(error: ErrorDetails) -> RequestError:
    """Say which field is wrong, by which rule, and what was seen."""
    field = ".".join(str(part) for part in error["loc"] if not _is_union_branch(part))[:128]
    if error["type"] == "missing":
        return RequestError(f"'{field}' is required", param=field, code="missing_required_parameter")
    if error["type"] == "value_error":
        text = f"'{field}': {error['msg'].removeprefix('Value error, ')}"
    else:
        text = f"'{field}' {error['msg'].replace('Input should', 'should')}, got {shown(error['input'])}"
    return RequestError(text, param=field, code="invalid_value")


def _is_union_branch(part: int | str) -> bool:
    """pydantic puts the tried member of a union into an error's location."""
    return isinstance(part, str) and (part in ("str", "int", "bool") or "[" in part or "-" in part)
