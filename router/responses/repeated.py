"""A response repeats fields of its request."""

from __future__ import annotations

from collections.abc import Mapping

# And what stands there where the request says nothing.
_REPEATED: Mapping[str, object] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


def repeated(request: Mapping[str, object]) -> dict[str, object]:
    """Return the fields as a response tells them: an object's own defaults stand where it has none."""
    return {name: _value(request.get(name), default) for name, default in _REPEATED.items()}


def _value(asked: object, default: object) -> object:
    if asked is None:
        return default
    if isinstance(asked, dict) and isinstance(default, dict):
        return default | {name: value for name, value in asked.items() if value is not None}
    return asked
