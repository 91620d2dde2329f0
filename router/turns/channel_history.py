"""A chat as a template with channels (gpt-oss's) takes it.

thoughts       `thinking`; the template tells them while calls are answered, and leaves out older ones
several calls  one message each, as the template tells the first alone, and takes a result for the last call's
said before    a thought: beside a call the template has one place for both
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .told import told_singly

Fields = Mapping[str, object]


def channel_messages(messages: Sequence[Fields]) -> list[dict[str, object]]:
    """Return the messages so that each has one call at most, its results right behind it."""
    return [_thinking(message) for message in told_singly(messages)]


def _thinking(message: Fields) -> dict[str, object]:
    told = {name: value for name, value in message.items() if name != "reasoning_content"}
    thoughts = str(message.get("reasoning_content", ""))
    if "tool_calls" in message:
        thoughts = "\n".join(text for text in (thoughts, str(message["content"])) if text)
        told["content"] = ""
    return {**told, "thinking": thoughts} if thoughts else told


def described_tools(tools: Sequence[Fields]) -> list[dict[str, object]]:
    """Return the tools with a description each, which the template adds to a text."""
    described = []
    for tool in tools:
        function = tool["function"]
        assert isinstance(function, Mapping)
        described.append({**tool, "function": {"description": "", **function}})
    return described
