"""A `tool_choice` of some of the tools: the model hears of all of them, and calls none but those."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.grammar import CheckedGrammar, Grammar, pack_mask
from kvferry.router.catalogue.version import ServedModel

from .fakes import MODEL, VOCAB_SIZE, Script, Served, serve

NAMES = ("search", "delete")
FUNCTIONS = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in NAMES]
TOOLS = [{"type": "function", "function": each} for each in FUNCTIONS]
CALL = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
HOSTED = {"type": "image_generation"}


class Checker:
    """Takes every grammar, and keeps them."""

    def __init__(self) -> None:
        self.checked: list[Grammar] = []

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        self.checked.append(grammar)
        return CheckedGrammar(grammar, pack_mask(b"\xff" * 4))

    def close(self) -> None: ...


def _served(text: str, checker: Checker | None = None, **model: Any) -> Served:
    return serve(Script(text), model=ServedModel(MODEL, 4096, VOCAB_SIZE, **model), grammars=checker)


def _allowed(mode: str, *tools: dict[str, Any]) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


async def _post(served: Served, choice: object, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "tool_choice": choice, **fields}
    async with served.client() as client:
        return await client.post("/v1/chat/completions", json=body)


async def _respond(served: Served, choice: object, *more: object) -> Any:
    tools = [*({"type": "function", **each} for each in FUNCTIONS), *more]
    async with served.client() as client:
        return await client.post("/v1/responses", json={"input": "hi", "tools": tools, "tool_choice": choice})


def _prompt(served: Served) -> str:
    return bytes(served.request.prompt_token_ids).decode()


@pytest.mark.parametrize(
    ("mode", "text"), [("auto", f"So: {CALL}"), ("required", '[{"name": "search", "arguments": {}}]')]
)
async def test_all_tools_are_told_and_a_grammar_holds_the_allowed_ones(mode: str, text: str) -> None:
    checker = Checker()
    served = _served(text, checker)
    response = await _post(served, _allowed(mode, TOOLS[0]))
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["search"]
    (grammar,) = checker.checked
    assert b"search" in grammar.text and b"delete" not in grammar.text
    assert all(f'"{name}"' in _prompt(served) for name in NAMES)
    limited = _prompt(served)
    await _post(served, "auto")
    assert _prompt(served) == limited  # the chat's kept prefix is the same


async def test_where_no_grammar_holds_calls_the_model_hears_of_the_allowed_ones_alone() -> None:
    for checker, model in ((None, {}), (Checker(), {"tool_parser": "mistral"})):
        served = _served("Hello", checker, **model)
        response = await _post(served, _allowed("auto", TOOLS[1]))
        assert response.status_code == 200 and '"delete"' in _prompt(served) and '"search"' not in _prompt(served)
        assert "x-kvferry-ignored" not in response.headers


async def test_beside_a_form_of_answers_the_allowed_calls_are_in_its_grammar() -> None:
    checker = Checker()
    response = await _post(_served("{}", checker), _allowed("auto", TOOLS[0]), response_format={"type": "json_object"})
    assert response.status_code == 200, response.text
    assert b"search" in checker.checked[-1].text and b"delete" not in checker.checked[-1].text


async def test_responses_take_it_in_their_own_form() -> None:
    checker = Checker()
    served = _served('[{"name": "search", "arguments": {}}]', checker)
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "search"}, HOSTED]}
    response = await _respond(served, choice, HOSTED)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert [item["name"] for item in answer["output"]] == ["search"] and answer["tool_choice"] == choice
    assert b"delete" not in checker.checked[0].text and '"delete"' in _prompt(served)
    assert response.headers["x-kvferry-ignored"] == "tools[2],tool_choice.tools[1]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mode": "sometimes"}, "tool_choice.mode"),
        ({"tools": []}, "tool_choice.tools"),
        ({"tools": [{"type": "function", "name": "other"}]}, "tool_choice.tools"),
        ({"tools": [{"type": "function"}]}, "tool_choice.tools"),
        ({"tools": None}, "tool_choice.tools"),
        ({"nmae": "x"}, "tool_choice.nmae"),
    ],
)
async def test_a_refusal_has_the_clients_names(fields: dict[str, Any], param: str) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "search"}], **fields}
    error = (await _respond(_served("x", Checker()), choice)).json()["error"]
    assert error["param"] == param and param in error["message"] and "allowed_tools" not in error["message"]
