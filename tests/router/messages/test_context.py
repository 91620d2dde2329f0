"""What coding agents ask of /v1/messages about their context: what is left out of a prompt."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.router.messages import context
from kvferry.router.messages.translate import chat_body
from kvferry.router.turns.places import PlacedTools

from ..fakes import MODEL, VOCAB_SIZE, Script, serve

CALL = {"type": "tool_use", "id": "a", "name": "search", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "found"}
ASKED = {"type": "text", "text": "and now?"}


def _thought(text: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "thinking", "thinking": text, "signature": ""}, *blocks]}


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    _thought("one", {"type": "text", "text": "Hello."}),
    {"role": "user", "content": "look"},
    _thought("two", CALL),
    {"role": "user", "content": [RESULT, {"type": "text", "text": "a reminder"}]},
    _thought("three", CALL),
    {"role": "user", "content": [RESULT]},
    {"role": "assistant", "content": "There."},
    {"role": "user", "content": [ASKED]},
]
BODY: dict[str, Any] = {"model": MODEL, "max_tokens": 400, "messages": MESSAGES}


def _thoughts(**edit: Any) -> list[Any]:
    return _thoughts_after([{"type": "clear_thinking_20251015", **edit}])


def _thoughts_after(edits: list[dict[str, Any]]) -> list[Any]:
    management = {"edits": edits}
    body, _ = chat_body({**BODY, "context_management": management}, None, PlacedTools(), needs_max_tokens=True)
    messages = body["messages"]
    assert isinstance(messages, list) and len(messages) == 9 + 1  # a reminder beside a result is a message of a chat
    return [message["reasoning_content"] for message in messages if "reasoning_content" in message]


@pytest.mark.parametrize(
    "keep",
    ["all", {"type": "all"}, {"type": "thinking_turns", "value": 2}, {"type": "thinking_turns", "value": 2.0}],
)
def test_all_thoughts_are_kept_where_that_is_asked(keep: Any) -> None:
    assert _thoughts(keep=keep) == ["one", "two", "three"]


@pytest.mark.parametrize("edit", [{}, {"keep": {"type": "thinking_turns", "value": 1}}])
def test_older_thoughts_are_left_out_and_those_of_a_turn_stay_together(edit: dict[str, Any]) -> None:
    assert _thoughts(**edit) == ["two", "three"]


def test_of_several_edits_the_one_that_keeps_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    clear = context._clear_thinking

    def noting(messages: Any, kept: int) -> None:
        cleared.append(kept)
        clear(messages, kept)

    monkeypatch.setattr(context, "_clear_thinking", noting)
    keeps: list[Any] = [{"type": "thinking_turns", "value": turns} for turns in (2, 1, 3)]
    edits = [{"type": "clear_thinking_20251015", "keep": keep} for keep in [*keeps, "all"] * 100]
    assert _thoughts_after(edits) == ["two", "three"] and cleared == [1]


@pytest.mark.parametrize(
    ("management", "place"),
    [
        ("all", "context_management"),
        ({"edits": {}, "x": 1}, "context_management.x"),
        ({"edits": "all"}, "context_management.edits"),
        ({"edits": ["all"]}, "context_management.edits[0]"),
        ({"edits": [{"type": "clear_all_20260112"}]}, "context_management.edits[0]: edits of type"),
        ({"edits": [{"type": "clear_thinking_20251015", "keep": 0}]}, "context_management.edits[0].keep"),
        (
            {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 0}}]},
            "context_management.edits[0].keep",
        ),
    ],
)
async def test_other_edits_are_refused_by_their_place(management: Any, place: str) -> None:
    served = serve(Script("Hello"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    async with served.client() as client:
        response = await client.post("/v1/messages", json={**BODY, "context_management": management})
    assert response.status_code == 400 and place in response.json()["error"]["message"]


async def test_edits_that_shorten_a_prompt_have_no_effect_which_is_told() -> None:
    served = serve(Script("Hello"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    shorten = {"type": "clear_tool_uses_20250919", "trigger": {"type": "input_tokens", "value": 5}}
    edits = [shorten, {"type": "clear_thinking_20251015", "keep": "all"}, {"type": "compact_20260112"}]
    async with served.client() as client:
        response = await client.post("/v1/messages", json={**BODY, "context_management": {"edits": edits}})
    assert response.status_code == 200, response.text
    told = response.headers["x-kvferry-ignored"]
    assert told == "context_management.edits[0],context_management.edits[2]"


async def test_a_coding_agents_request_is_answered() -> None:
    served = serve(Script("Hello"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    fields = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
    keep_all = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    managements: tuple[Any, ...] = (keep_all, {"edits": []}, {}, None)
    async with served.client() as client:
        for management in managements:
            body = {**BODY, **fields, "context_management": management}
            response = await client.post("/v1/messages?beta=true", json=body)
            assert response.status_code == 200 and "x-kvferry-ignored" not in response.headers, response.text


@pytest.mark.parametrize("note", ["cc_version=2.1.197.b97; cc_entrypoint=cli;", "cc_version=2.1.197.eee; cch=fa690;"])
@pytest.mark.parametrize("is_one_text", [False, True])
async def test_a_note_for_billing_is_no_part_of_the_prompt(note: str, is_one_text: bool) -> None:
    texts = [f"x-anthropic-billing-header: {note}", "You are an agent.", "x-anthropic-billing-header: as said above"]
    system: Any = "\n".join(texts) if is_one_text else [{"type": "text", "text": text} for text in texts]
    served = serve(Script("Hello"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    told = "<system>You are an agent.\nx-anthropic-billing-header: as said above<user>hi<assistant>"
    async with served.client() as client:
        body = {**BODY, "messages": MESSAGES[:1], "system": system}
        assert (await client.post("/v1/messages", json=body)).status_code == 200
        assert bytes(served.request.prompt_token_ids).decode() == told
        counted = await client.post("/v1/messages/count_tokens", json=body)
        assert counted.json() == {"input_tokens": len(told)}
        assert (await client.post("/v1/messages", json={**body, "system": texts[0]})).status_code == 200
    assert bytes(served.request.prompt_token_ids) == b"<user>hi<assistant>"


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
async def test_threads_are_refused_so_that_clients_send_the_whole_conversation(thread: dict[str, Any]) -> None:
    served = serve(Script("Hello"), model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    async with served.client() as client:
        response = await client.post("/v1/messages?beta=true", json={**BODY, "thread": thread})
        assert response.status_code == 400
        assert response.json()["error"] == {
            "type": "invalid_request_error",
            "message": "'thread' is not supported by this server",
            "details": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        }
        assert (await client.post("/v1/messages", json={**BODY, "thread": None})).status_code == 200
