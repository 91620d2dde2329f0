"""A chat as a template with channels (gpt-oss's) takes it.

thoughts       `thinking`; the template tells them while calls are answered, and leaves out older ones
several calls  one message each, as the template tells the first alone, and takes a result for the last call's
said before    a thought: beside a call the template has one place for both
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

Fields = dict[str, object]


def channel_messages(messages: Sequence[Fields]) -> list[Fields]:
    """Return the messages so that each has one call at most, its results right behind it."""
    told: list[Fields] = []
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        if message["role"] != "assistant":
            told.append(message)
            continue
        thoughts = str(message.get("reasoning_content", ""))
        plain = {name: value for name, value in message.items() if name not in ("tool_calls", "reasoning_content")}
        calls = message.get("tool_calls")
        if not isinstance(calls, list):
            told.append(_thinking(plain, thoughts))
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.popleft())
        said = "\n".join(text for text in (thoughts, str(plain["content"])) if text)
        told += _one_by_one({**plain, "content": ""}, calls, said, results)
    return told


def _one_by_one(message: Fields, calls: Sequence[Fields], said: str, results: list[Fields]) -> Iterator[Fields]:
    for call in calls:
        yield _thinking({**message, "tool_calls": [call]}, said)
        said = ""
        own = [one for one in results if one.get("tool_call_id") == call["id"]] if "id" in call else results[:1]
        yield from own
        results = [one for one in results if all(one is not each for each in own)]
    yield from results


def _thinking(message: Fields, thoughts: str) -> Fields:
    return {**message, "thinking": thoughts} if thoughts else message


def described_tools(tools: Sequence[Fields]) -> list[Fields]:
    """Return the tools with a description each, which the template adds to a text."""
    described: list[Fields] = []
    for tool in tools:
        function = tool["function"]
        assert isinstance(function, Mapping)
        described.append({**tool, "function": {"description": "", **function}})
    return described
