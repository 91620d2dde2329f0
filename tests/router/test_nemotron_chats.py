"""Chats of Nemotron's two kinds of templates: thoughts that are switched, tools that are told, calls that are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel

from . import fakes
from .fakes import MODEL, VOCAB_SIZE, Script, Served, serve
from .turns.nemotron_templates import NANO_2, NANO_3

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
CODER = "<tool_call>\n<function=search>\n<parameter=query>\nx\n</parameter>\n</function>\n</tool_call>"


def _served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, answer: str = "x") -> Served:
    fakes.use_template(tmp_path, monkeypatch, template)
    return serve(Script(answer), model=ServedModel(MODEL, 4096, VOCAB_SIZE))


async def _ask(served: Served, *messages: dict[str, Any], **fields: Any) -> tuple[dict[str, Any], str]:
    """Return the first choice, and the prompt that it answers."""
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, **fields})
    assert response.status_code == 200, response.text
    assert "x-kvferry-ignored" not in response.headers
    return response.json()["choices"][0], bytes(served.request.prompt_token_ids).decode()


@pytest.mark.parametrize(
    ("messages", "effort", "thinks"),
    [
        ([{"role": "user", "content": "hi"}], None, True),
        ([{"role": "user", "content": "hi /no_think"}], None, False),
        ([{"role": "system", "content": "/no_think"}, {"role": "user", "content": "hi"}], None, False),
        ([{"role": "user", "content": "hi"}], "none", False),
        ([{"role": "user", "content": "hi /no_think"}], "high", True),
        ([{"role": "system", "content": "Be brief. /think"}, {"role": "user", "content": "hi"}], "none", False),
    ],
)
async def test_words_switch_thoughts_and_so_does_an_effort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, Any]], effort: str | None, thinks: bool
) -> None:
    served = _served(tmp_path, monkeypatch, NANO_2, "Hm.</think>Yes." if thinks else "Yes.")
    choice, prompt = await _ask(served, *messages, **({} if effort is None else {"reasoning_effort": effort}))
    assert prompt.endswith("<think>\n\n" if thinks else "<think></think>") and "_think" not in prompt
    assert "<SPECIAL_11>User\nhi\n" in prompt
    assert choice["message"]["content"] == "Yes."
    assert choice["message"].get("reasoning_content") == ("Hm." if thinks else None)


@pytest.mark.parametrize(("effort", "end"), [("low", "<think>\n"), ("none", "<think></think>")])
async def test_a_variable_switches_thoughts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effort: str, end: str
) -> None:
    served = _served(tmp_path, monkeypatch, NANO_3)
    _, prompt = await _ask(served, {"role": "user", "content": "hi"}, reasoning_effort=effort)
    assert prompt.endswith(end)


@pytest.mark.parametrize(
    ("template", "call", "told"),
    [
        (NANO_2, '<TOOLCALL>[{"name": "search", "arguments": {"query": "x"}}]</TOOLCALL>', None),
        (NANO_3, CODER, f"{CODER}\n"),
    ],
)
async def test_calls_are_read_behind_thoughts_and_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, call: str, told: str | None
) -> None:
    served = _served(tmp_path, monkeypatch, template, f"I look.</think>\n{call}")
    user = {"role": "user", "content": "hi"}
    choice, prompt = await _ask(served, user, tools=TOOLS)
    assert '"name": "search"' in prompt or "<name>search</name>" in prompt
    [made] = choice["message"]["tool_calls"]
    assert (made["function"]["name"], made["function"]["arguments"]) == ("search", '{"query": "x"}')
    assert choice["message"]["reasoning_content"] == "I look." and choice["finish_reason"] == "tool_calls"
    earlier = {"role": "assistant", "content": "", "tool_calls": [made]}
    result = {"role": "tool", "tool_call_id": made["id"], "content": '{"found": 1}'}
    _, prompt = await _ask(served, user, earlier, result, tools=TOOLS)
    assert f"{told or call}" in prompt.split("hi", 1)[1] and '{"found": 1}' in prompt
