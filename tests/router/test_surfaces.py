"""Hostile bodies at every surface of a chat: whatever stands in a field, the answer is one, or a refusal."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel

from .fakes import MODEL, VOCAB_SIZE, Script, serve

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
    },
    "/v1/responses": {
        "instructions": "Be brief.",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": "low"},
        "include": ["reasoning.encrypted_content"],
        "metadata": {"a": "b"},
    },
    "/v1/messages": {
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": ""},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "1"}]},
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "low"},
        "metadata": {"user_id": "u"},
    },
}
JUNK: tuple[Any, ...] = (
    None,
    0,
    -1,
    1.5,
    2**70,
    int("9" * 4300),
    True,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    [None],
    {},
    {"type": "x"},
    {"type": []},
    {"a": {}},
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in _places(child, (*path, key)))]


def _with_junk(body: dict[str, Any], place: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    inner: Any = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    return changed


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_with_junk_anywhere_is_answered_or_refused(path: str) -> None:
    served = serve(Script("ok"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    rng = random.Random(path)
    statuses = set()
    async with served.client() as client:
        for place in _places(BODIES[path])[1:]:
            for junk in rng.sample(JUNK, 6):
                data = json.dumps(_with_junk(BODIES[path], place, junk))
                response = await client.post(path, content=data, headers={"content-type": "application/json"})
                assert response.status_code in (200, 400, 404), (place, junk, response.text)
                statuses.add(response.status_code)
                if response.status_code != 200:
                    assert len(response.text) < 1000
    assert 400 in statuses
