"""Tools for templates that know of none: told in a system message, in Hermes' form, which small models learn first.

tools            ─> a text at the end of the system message, or before the user's first where there can be none
calls made       ─> `<tool_call>` in the assistant's message
their results    ─> `<tool_response>` in a user's message, which goes on with what he says next
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from .values.json_text import dumps

THINKS, THINKS_NOT = "/think", "/no_think"  # words of a message by which a template lets the model reason, or not
_BETWEEN = "Done."  # an empty turn is refused by some, and nothing that a model learns to say
_PREAMBLE = """# Tools

You may call one or more functions to help with the user's request.

You are given their signatures within <tools></tools> tags:
<tools>
{tools}
</tools>

For each function call, return a JSON object with the function's name and arguments within <tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def told_in_text(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]]
) -> list[dict[str, object]]:
    """Return the messages with all that concerns tools as text."""
    told: list[dict[str, object]] = []
    # All results of a turn and what the user says to them are one message: some templates want users to take turns.
    texts: list[str] = []
    is_after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        text = f"<tool_response>\n{message['content']}\n</tool_response>" if is_result else str(message["content"])
        if is_after_result and (is_result or message["role"] == "user"):
            texts.append(text)
        else:
            _tell_results(texts, told)
            texts = [text] if is_result else []
            told.append({"role": "user", "content": text} if is_result else _called(message))
        is_after_result = is_result
    _tell_results(texts, told)
    if not tools:
        return told
    preamble = _PREAMBLE.format(tools="\n".join(map(dumps, tools)))
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{preamble}"}, *told[1:]]
    return [{"role": "system", "content": preamble}, *told]


def _tell_results(texts: Sequence[str], told: Sequence[dict[str, object]]) -> None:
    """Let the last message say these, where there are any."""
    if texts:
        told[-1]["content"] = "\n".join(texts)


def told_to_think(messages: Sequence[Mapping[str, object]], *, thinks: bool) -> list[dict[str, object]]:
    """Return the messages with the word for it in the last one that a template looks for it in, as none goes behind."""
    told = [dict(message) for message in messages]
    for message in reversed(told):
        if message["role"] in ("user", "system"):
            message["content"] = f"{message['content']} {THINKS if thinks else THINKS_NOT}".lstrip()
            break
    return told


def told_by_user(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the messages with a first system message at the beginning of what the user says next.

    For templates that know no system's role, as Gemma 2's, and refuse it.
    """
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) != ("system", "user"):
        return list(messages)
    return [{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]


def told_singly(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the messages with one call in each, and its results behind it.

    For templates that refuse several calls at once, as Llama 3's, though the model makes them.
    """
    told: list[Mapping[str, object]] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        if (calls := _several_calls(message)) is None:
            told.append(message)
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", messages[at:]))
        at += len(results)
        for index, call in enumerate(calls):
            # What the assistant said and thought comes once, before its first call.
            told.append({**message, "tool_calls": [call]} if index == 0 else _call_alone(call))
            own = _results_of(call, results)
            told += own
            taken = set(map(id, own))
            results = [each for each in results if id(each) not in taken]
        told += results  # of calls that there are not: the template says what is wrong
    return told


def told_in_turns(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]] | None:
    """Return the messages so that user and assistant take turns; None: they do.

    For templates that refuse others, as Mistral's and Gemma's. Those of one role become one. What a user says to
    results, and not to an answer, stands behind a short one: at the end of a result it would be the tool's word.
    """
    told: list[Mapping[str, object]] = []
    run: list[Mapping[str, object]] = []  # of one role, which become one when it has ended: what they say may be long
    for message in messages:
        last = run[-1] if run else {"role": ""}
        if message["role"] == last["role"] != "tool" and "tool_calls" not in last:
            run.append(message)
            continue
        told += _as_one(run)
        run = [message]
        if message["role"] == "user" and (last["role"] == "tool" or "tool_calls" in last):
            told.append({"role": "assistant", "content": _BETWEEN})
    told += _as_one(run)
    return None if told == list(messages) else told


def _as_one(run: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return what several messages of one role say, and think, as one message has it; none of none."""
    if len(run) < 2:
        return list(run)
    names = [name for name in ("content", "reasoning_content") if any(name in message for message in run)]
    texts = {name: "\n\n".join(str(text) for each in run if (text := each.get(name))) for name in names}
    return [{**run[-1], **texts}]


def with_written_arguments(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]] | None:
    """Return the messages with their calls' arguments as JSON; None: no call has any as an object.

    For templates that join them to a text, as that of DeepSeek V3.1 with tools.
    """
    told = [_written_calls(message) for message in messages]
    return None if all(new is old for new, old in zip(told, messages, strict=True)) else told


def _written_calls(message: Mapping[str, object]) -> Mapping[str, object]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or all(isinstance(call["function"]["arguments"], str) for call in calls):
        return message
    written = []
    for call in calls:
        function = call["function"]
        written.append({**call, "function": {**function, "arguments": _written(function["arguments"])}})
    return {**message, "tool_calls": written}


def _written(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else dumps(arguments)


def _results_of(call: Mapping[str, object], results: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return the results with the call's id; without ids each call has the next one."""
    if "id" not in call:
        return list(results[:1])
    return [each for each in results if each.get("tool_call_id") == call["id"]]


def told_in_content(messages: Sequence[Mapping[str, object]], *, as_python: bool) -> list[dict[str, object]]:
    """Return the messages with their calls at the end of what they say: in an array, as Granite writes them, or
    `as_python`, as LFM2 does.

    For templates that tell of tools, but of no calls of them.
    """
    told = []
    for message in messages:
        plain = dict(message)
        calls = plain.pop("tool_calls", None)
        if isinstance(calls, list):
            written = ", ".join(map(_python_call if as_python else _call_object, calls))
            begin, end = ("<|tool_call_start|>", "<|tool_call_end|>") if as_python else ("<|tool_call|>", "")
            plain["content"] = f"{plain['content']}{begin}[{written}]{end}"
        told.append(plain)
    return told


def _python_call(call: Mapping[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if isinstance(arguments, dict):
        arguments = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{name}({arguments})"


def told_otherwise(
    messages: Sequence[Mapping[str, object]], *, has_own_system: bool
) -> list[Mapping[str, object]] | None:
    """Return the messages for a template that has refused them; None: there is no other way to tell them.

    `has_own_system`: the client has sent the system message, so that it is not for us to move.
    """
    if any(_several_calls(message) is not None for message in messages):
        return told_singly(messages)
    if not has_own_system and messages[0]["role"] == "system":
        return told_by_user(messages)
    return None


def _several_calls(message: Mapping[str, object]) -> list[dict[str, object]] | None:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) and len(calls) > 1 else None


def _call_alone(call: Mapping[str, object]) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _called(message: Mapping[str, object]) -> dict[str, object]:
    calls = message.get("tool_calls")
    plain = {name: value for name, value in message.items() if name != "tool_calls"}
    if not isinstance(calls, list):
        return plain
    texts = [str(plain["content"])] if plain["content"] else []
    texts += [f"<tool_call>\n{_call_object(call)}\n</tool_call>" for call in calls]
    return {**plain, "content": "\n".join(texts)}


def _call_object(call: Mapping[str, object]) -> str:
    function = call["function"]
    assert isinstance(function, Mapping)
    return f'{{"name": {dumps(function["name"])}, "arguments": {_written(function["arguments"])}}}'
