"""A chat as Gemma 4's first templates take it: results are a field of the message whose calls they answer.

    {"role": "assistant", "tool_calls": [...]}           {"role": "assistant", "tool_calls": [...],
    {"role": "tool", "tool_call_id": ..., ...}     ─>     "tool_responses": [{"name": ..., "response": ...}],
    {"role": "assistant", "content": "It rains."}         "content": "It rains."}

To such a template a message of the role `tool` is a turn of somebody's, as the model has seen none; so is what it says
to the results, where that does not stand beside them. Later templates do the same themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Fields = Mapping[str, object]


def with_responses(messages: Sequence[Fields]) -> list[dict[str, object]]:
    """Return the messages with results, and what is said to them, in the message of the calls."""
    told: list[dict[str, object]] = []
    for message in messages:
        last = told[-1] if told and "tool_calls" in told[-1] else {}
        is_answer = message["role"] == "assistant" and "tool_calls" not in message
        responses = last.get("tool_responses", [])
        assert isinstance(responses, list)
        if message["role"] == "tool" and last:
            name = _name_of(last, message.get("tool_call_id"), len(responses))
            last["tool_responses"] = [*responses, {"name": name, "response": message["content"]}]
        elif is_answer and responses and not last["content"]:
            last["content"] = message["content"]
        else:
            told.append(dict(message))
    return told


def _name_of(message: Fields, call_id: object, index: int) -> object:
    """Return the name of the call with this id, else of the one at the result's place."""
    calls = message["tool_calls"]
    assert isinstance(calls, list)
    own = [call for call in calls if call_id is not None and call.get("id") == call_id] or calls[index : index + 1]
    return own[0]["function"]["name"] if own else "unknown"
