"""System messages after the first, and roles that take no turns: nothing is lost, and no chat is refused for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from . import fakes
from .fakes import MODEL, Script, Served, serve

_SAID = "<{{ m.role }}>{{ m.content | trim }}{{ tools or '' }}"  # calls are the template's own to tell
EACH = f"{{% for m in messages %}}{_SAID}{{% endfor %}}"
# As far as they tell system messages: MiniMax-M2's and gpt-oss's, DeepSeek V3.1's, Mistral Small 3.1's.
DROPS = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}{% endif %}"
    f"{{% for m in messages if m.role != 'system' %}}{_SAID}{{% endfor %}}"
)
HOISTS = (
    "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    f"{{% for m in messages if m.role != 'system' %}}{_SAID}{{% endfor %}}"
)
REFUSES = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest | rejectattr('role', 'equalto', 'tool') | rejectattr('tool_calls', 'defined') %}"
    "{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + EACH
)
FIRST = {"role": "developer", "content": "You are an agent."}
SECOND = {"role": "developer", "content": "It is Monday.\n"}
LATER = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Say: Be brief."}
ANSWER = {"role": "assistant", "content": "Hello."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "function": {"name": "f", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "call12345", "content": "found"}


async def _prompt(served: Served, messages: list[Any]) -> str:
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages})
    assert response.status_code == 200, response.text
    return bytes(served.request.prompt_token_ids).decode()


CASES: dict[str, tuple[str, list[Any], str]] = {
    "leading, dropped": (
        DROPS,
        [FIRST, SECOND, USER],
        "<system>You are an agent.\n\nIt is Monday.\n<user>Say: Be brief.",
    ),
    "leading, refused": (
        REFUSES,
        [FIRST, SECOND, USER],
        "<system>You are an agent.\n\nIt is Monday.<user>Say: Be brief.",
    ),
    "taken": (
        EACH,
        [FIRST, SECOND, USER, LATER],
        "<system>You are an agent.<system>It is Monday.<user>Say: Be brief.<system>Be brief.",
    ),
    "taken, elsewhere": (HOISTS, [FIRST, USER, LATER], "You are an agent.Be brief.<user>Say: Be brief."),
    "behind the user": (DROPS, [FIRST, USER, LATER], "<system>You are an agent.<user>Say: Be brief.\n\nBe brief."),
    "behind the user, without a first": (DROPS, [USER, LATER], "<user>Say: Be brief.\n\nBe brief."),
    "before the user": (
        DROPS,
        [USER, ANSWER, LATER, USER],
        "<user>Say: Be brief.<assistant>Hello.<user>Be brief.\n\nSay: Be brief.",
    ),
    "alone": (
        DROPS,
        [USER, CALL, RESULT, LATER, SECOND],
        "<user>Say: Be brief.<assistant><tool>found<user>Be brief.\n\nIt is Monday.",
    ),
    "behind a result": (
        REFUSES,
        [USER, CALL, RESULT, LATER],
        "<user>Say: Be brief.<assistant><tool>found\n\nBe brief.",
    ),
}


@pytest.mark.parametrize("case", CASES)
async def test_every_system_message_is_told_whatever_the_template_takes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, messages, told = CASES[case]
    fakes.use_template(tmp_path, monkeypatch, template)
    assert await _prompt(serve(Script("ok")), messages) == told


TURNS: dict[str, tuple[list[Any], str]] = {
    "users": ([USER, {"role": "user", "content": "Now."}], "<user>Say: Be brief.\n\nNow."),
    "users around a system": (
        [FIRST, USER, LATER, {"role": "user", "content": "Now."}],
        "<system>You are an agent.<user>Say: Be brief.\n\nBe brief.\n\nNow.",
    ),
    "assistants": ([USER, ANSWER, ANSWER, USER], "<user>Say: Be brief.<assistant>Hello.\n\nHello.<user>Say: Be brief."),
    "an assistant that calls": (
        [USER, ANSWER, CALL, RESULT, ANSWER, USER],
        "<user>Say: Be brief.<assistant>Hello.<tool>found<assistant>Hello.<user>Say: Be brief.",
    ),
    "behind a result": (
        [USER, CALL, RESULT, USER],
        "<user>Say: Be brief.<assistant><tool>found<assistant>Done.<user>Say: Be brief.",
    ),
    "behind a result and a system": (
        [USER, CALL, RESULT, LATER, USER],
        "<user>Say: Be brief.<assistant><tool>found<assistant>Done.<user>Be brief.\n\nSay: Be brief.",
    ),
    "behind a call": (
        [USER, CALL, USER],
        "<user>Say: Be brief.<assistant><assistant>Done.<user>Say: Be brief.",
    ),
}


@pytest.mark.parametrize("case", TURNS)
async def test_a_template_that_wants_turns_is_told_turns(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages, told = TURNS[case]
    fakes.use_template(tmp_path, monkeypatch, REFUSES)
    assert await _prompt(serve(Script("ok")), messages) == told


async def test_a_template_that_takes_any_turns_is_told_them_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.use_template(tmp_path, monkeypatch, EACH)
    told = "<user>Say: Be brief.<assistant><tool>found<user>Say: Be brief."
    assert await _prompt(serve(Script("ok")), [USER, CALL, RESULT, USER]) == told


async def test_what_a_template_refuses_for_another_reason_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.use_template(tmp_path, monkeypatch, REFUSES)
    async with serve().client() as client:
        body = {"model": MODEL, "messages": [FIRST, SECOND, ANSWER, USER]}
        refused = await client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "roles must alternate")
