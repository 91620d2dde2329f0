"""A response repeats fields of its request."""

from __future__ import annotations

from collections.abc import Mapping

from ...common.request import SamplingParams

# And what stands there where the request says nothing.
_REPEATED: Mapping[str, object] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "service_tier": "default",
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "user": None,
}
# What is sampled with stands there otherwise: the model has defaults of its own.
_SAMPLED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")


def repeated(request: Mapping[str, object], sampling: SamplingParams) -> dict[str, object]:
    """Return the fields as a response tells them: an object's own defaults stand where it has none."""
    told = {name: _value(request.get(name), default) for name, default in _REPEATED.items()}
    return told | {name: _value(request.get(name), getattr(sampling, name)) for name in _SAMPLED}


def _value(asked: object, default: object) -> object:
    if asked is None:
        return default
    if isinstance(asked, dict) and isinstance(default, dict):
        return default | {name: value for name, value in asked.items() if value is not None}
    return asked
