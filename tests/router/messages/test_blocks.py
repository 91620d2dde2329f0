"""Blocks and tools of /v1/messages as clients send them, whoever answers: what is told, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.router.catalogue.version import ServedModel
from kvferry.router.messages.blocks import chat_messages

from ..fakes import MODEL, VOCAB_SIZE, Script, Served, serve

TOOL = {"name": "search", "description": "Search.", "input_schema": {"type": "object", "properties": {}}}
HI = {"role": "user", "content": "hi"}
DOCUMENT = {
    "type": "document",
    "source": {"type": "text", "media_type": "text/plain", "data": "Rain."},
    "title": "Weather",
    "context": "Of today.",
    "citations": {"enabled": False},
}
PARTS = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Rain."}]}}
RESULT = {
    "type": "search_result",
    "source": "https://x.example",
    "title": "Weather",
    "content": [{"type": "text", "text": "Rain."}, {"type": "text", "text": "Wind."}],
}
PARTS_OF_ANSWERS = (("thinking", "thinking"), ("text", "text"))
FOUND = "Weather\nhttps://x.example\nRain.\nWind."


def _served(text: str = "Hello") -> Served:
    return serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE))


async def _post(served: Served, **fields: Any) -> Any:
    async with served.client() as client:
        return await client.post("/v1/messages", json={"model": MODEL, "max_tokens": 400, "messages": [HI], **fields})


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


def _answered(*content: dict[str, Any]) -> list[dict[str, Any]]:
    call = {"type": "tool_use", "id": "a", "name": "search", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": list(content)}
    return [HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (DOCUMENT, "Weather\nOf today.\nRain."),
        (PARTS, "Rain."),
        ({**PARTS, "source": {"type": "content", "content": "Rain."}}, "Rain."),
        (RESULT, FOUND),
    ],
)
async def test_blocks_of_text_are_told_in_messages_and_in_results(block: dict[str, Any], told: str) -> None:
    served = _served()
    response = await _post(served, messages=[{"role": "user", "content": [block, {"type": "text", "text": "Well?"}]}])
    assert response.status_code == 200 and "x-kvferry-ignored" not in response.headers, response.text
    assert _prompt(served) == f"<user>{told}\nWell?<assistant>"
    response = await _post(served, messages=_answered({"type": "text", "text": "Here:"}, block))
    assert response.status_code == 200, response.text
    assert f"Here:\n{told}\n" in _prompt(served)


async def test_a_reference_to_a_tool_is_its_name() -> None:
    served = _served()
    response = await _post(served, messages=_answered({"type": "tool_reference", "tool_name": "read"}), tools=[TOOL])
    assert response.status_code == 200 and "<tool_response>\nread\n" in _prompt(served)


async def test_citations_that_are_asked_for_are_told_to_be_none() -> None:
    cited = {**DOCUMENT, "citations": {"enabled": True}}
    response = await _post(_served(), messages=[{"role": "user", "content": [cited]}])
    assert response.headers["x-kvferry-ignored"] == "messages[0].content[0].citations"


@pytest.mark.parametrize(
    "kind",
    [
        *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result"),
        *("mcp_tool_use", "mcp_tool_result", "compaction"),
    ],
)
async def test_what_ran_elsewhere_is_left_out_and_told(kind: str) -> None:
    served = _served()
    said = [{"type": kind, "id": "s", "content": []}, {"type": "text", "text": "Rain."}]
    response = await _post(served, messages=[HI, {"role": "assistant", "content": said}, HI])
    assert response.status_code == 200, response.text
    assert response.headers["x-kvferry-ignored"] == "messages[1].content[0]"
    assert _prompt(served) == "<user>hi<assistant>Rain.<user>hi<assistant>"


@pytest.mark.parametrize(
    ("block", "param"),
    [
        ({"type": "image", "source": {"type": "base64"}}, ": blocks of type 'image' are not supported"),
        ({"type": "document", "source": {"type": "base64"}}, ": documents whose source is of type 'base64'"),
        ({"type": "document", "source": {"type": "text"}}, ".source.data must be a string"),
        ({"type": "document", "source": "Rain."}, ".source must be an object with a type"),
        ({**DOCUMENT, "title": 5}, ".title must be a string"),
        ({**RESULT, "content": [{"type": "image"}]}, ".content[0]: blocks of type 'image'"),
        ({"type": "search_result"}, ".content must be a string or an array"),
    ],
)
async def test_other_blocks_are_refused_by_their_place(block: dict[str, Any], param: str) -> None:
    for messages in ([{"role": "user", "content": [block]}], _answered(block)):
        response = await _post(_served(), messages=messages)
        place = "messages[0].content[0]" if len(messages) == 1 else "messages[2].content[0].content[0]"
        assert response.status_code == 400 and f"{place}{param}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind",
    [
        *("web_search_20250305", "web_fetch_20250910", "code_execution_20250825", "mcp_toolset"),
        *("tool_search_tool_regex_20251119", "tool_search_tool_bm25"),
    ],
)
async def test_tools_that_nobody_runs_here_are_left_out_beside_others(kind: str) -> None:
    served, hosted = _served(), {"type": kind, "name": "web"}
    response = await _post(served, tools=[hosted, TOOL])
    assert response.status_code == 200, response.text
    assert response.headers["x-kvferry-ignored"] == "tools[0]"
    assert '"search"' in _prompt(served) and '"web"' not in _prompt(served)
    alone = await _post(served, tools=[hosted])
    assert alone.status_code == 400 and f"tools of type '{kind}'" in alone.json()["error"]["message"]
    wrong = await _post(served, tools=[hosted, {**TOOL, "name": "a b"}])
    assert "tools[1].name must be" in wrong.json()["error"]["message"]
    chosen = await _post(served, tools=[hosted, TOOL], tool_choice={"type": "tool", "name": "web"})
    assert chosen.status_code == 400 and "tool_choice.name" in chosen.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("bash_20250124", "bash", ["command", "restart"]),
        ("text_editor_20250728", "str_replace_based_edit_tool", ["command", "path", "insert_line", "view_range"]),
        ("memory_20250818", "memory", ["command", "path", "old_path", "new_path", "insert_text"]),
    ],
)
async def test_tools_that_the_client_runs_are_functions(kind: str, name: str, arguments: list[str]) -> None:
    call = f'<tool_call>\n{{"name": "{name}", "arguments": {{"command": "ls"}}}}\n</tool_call>'
    served = _served(call)
    response = await _post(served, tools=[{"type": kind, "name": name}])
    assert response.status_code == 200 and "x-kvferry-ignored" not in response.headers, response.text
    (block,) = response.json()["content"]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", name, {"command": "ls"})
    assert all(f'"{argument}"' in _prompt(served) for argument in [name, *arguments])


async def test_a_computer_is_none_of_them() -> None:
    response = await _post(_served(), tools=[{"type": "computer_20250124", "name": "computer"}, TOOL])
    assert response.status_code == 400 and "'computer_20250124'" in response.json()["error"]["message"]


async def test_parts_of_one_answer_are_told_as_one() -> None:
    served = _served()
    blocks = [{"type": kind, key: f"{key}{at} "} for at in range(50) for kind, key in PARTS_OF_ANSWERS]
    thoughts = "".join(f"thinking{at} " for at in range(50))
    (placed,) = chat_messages([{"role": "assistant", "content": blocks}], None, [])
    text = "".join(f"text{at} " for at in range(50))
    assert placed.message == {"role": "assistant", "content": text, "reasoning_content": thoughts}
    (placed,) = chat_messages([{"role": "assistant", "content": [{"type": "thinking", "thinking": ""}]}], None, [])
    assert placed.message == {"role": "assistant", "content": "", "reasoning_content": ""}
    response = await _post(served, messages=[HI, {"role": "assistant", "content": blocks}, HI])
    assert response.status_code == 200 and f"<assistant>{text}<user>" in _prompt(served)


async def test_more_messages_than_a_chat_may_have_are_refused_before_they_are_read() -> None:
    response = await _post(_served(), messages=[HI] * 4096 + [{"role": "robot"}])
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "at most 4096 messages, got 4097"
