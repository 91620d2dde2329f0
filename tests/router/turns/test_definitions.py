"""A request's tools: what is taken, and how a refusal reads."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.turns.definitions import MAX_TOOLS, ToolUse, parse_tool_use

SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        "strict": True,
    },
}


def _tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "search", **fields}}


def _allowed(**fields: Any) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [_tool()], **fields}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_tools_may_be_called_unless_the_choice_says_otherwise() -> None:
    use = parse_tool_use([SEARCH], None, None)
    assert (use.choice, use.is_parallel) == ("auto", True)
    assert use.schemas == {"search": SEARCH["function"]["parameters"]}
    (told,) = use.told()
    assert told["function"] == {key: value for key, value in SEARCH["function"].items() if key != "strict"}
    assert parse_tool_use([SEARCH], "auto", False).is_parallel is False


@pytest.mark.parametrize(("tools", "choice"), [(None, None), ([], "auto"), ([SEARCH], "none"), (None, "none")])
def test_without_tools_or_with_none_of_them_the_model_hears_of_none(tools: object, choice: object) -> None:
    assert parse_tool_use(tools, choice, True) == ToolUse()


def test_a_tool_without_parameters_takes_an_object() -> None:
    (told,) = parse_tool_use([_tool()], None, None).told()
    assert told["function"] == {"name": "search", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([_tool(description="x" * 300_000)], "tools"),
        ([_tool()] * (MAX_TOOLS + 1), "tools"),
        (["search"], "tools[0]"),
        ([{"function": {"name": "a"}}], "tools[0].type"),
        ([{"type": "custom", "custom": {}}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {"name": "a"}, "x": 1}], "tools[0].x"),
        ([_tool(name="")], "tools[0].function.name"),
        ([_tool(name="a b")], "tools[0].function.name"),
        ([_tool(name="x" * 129)], "tools[0].function.name"),
        ([_tool(name=None)], "tools[0].function.name"),
        ([_tool(nmae="x")], "tools[0].function.nmae"),
        ([_tool(description=5)], "tools[0].function.description"),
        ([_tool(strict="yes")], "tools[0].function.strict"),
        ([_tool(parameters=[])], "tools[0].function.parameters"),
        ([_tool(parameters={"type": "string"})], "tools[0].function.parameters.type"),
        ([_tool(parameters={"properties": []})], "tools[0].function.parameters.properties"),
        ([_tool(parameters=_nested(20))], "tools[0].function.parameters"),
        ([SEARCH, _tool()], "tools[1].function.name"),
    ],
)
def test_a_wrong_tool_is_refused_at_its_place(tools: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tool_use(tools, None, None)
    assert (caught.value.param, caught.value.status) == (param, 400)
    assert param in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([SEARCH], "sometimes", "tool_choice"),
        ([SEARCH], {"type": "function"}, "tool_choice"),
        ([SEARCH], {"type": "function", "function": {"name": "other"}}, "tool_choice.function.name"),
        (None, "required", "tool_choice"),
        ([SEARCH], {"type": "allowed_tools"}, "tool_choice"),
        ([SEARCH], _allowed(mode="named"), "tool_choice.allowed_tools.mode"),
        ([SEARCH], _allowed(tools=[]), "tool_choice.allowed_tools.tools"),
        (
            [SEARCH],
            _allowed(tools=[{"type": "custom", "custom": {"name": "search"}}]),
            "tool_choice.allowed_tools.tools",
        ),
        ([SEARCH], _allowed(tools=[_tool(), {}]), "tool_choice.allowed_tools.tools"),
        (None, _allowed(), "tool_choice.allowed_tools.tools"),
    ],
)
def test_a_wrong_choice_is_refused(tools: object, choice: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_tool_use(tools, choice, None)
    assert caught.value.param == param


def test_a_call_may_have_to_come() -> None:
    assert parse_tool_use([SEARCH], "required", None).is_forced
    use = parse_tool_use([SEARCH], {"type": "function", "function": {"name": "search"}}, None)
    assert use.is_forced and use.allowed == frozenset({"search"})
    assert not parse_tool_use([SEARCH], "auto", None).is_forced


def test_some_tools_may_be_allowed_and_all_of_them_are_told() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    use = parse_tool_use([SEARCH, other], _allowed(tools=[SEARCH]), None)  # a whole definition, too
    assert (use.choice, use.is_forced, use.is_bound) == ("auto", False, True)
    assert [tool.name for tool in use.callable] == ["search"] and len(use.told()) == 2
    assert [each["function"]["name"] for each in use.narrowed.told()] == ["search"]  # type: ignore[index]
    assert parse_tool_use([SEARCH, other], _allowed(mode="required"), None).is_forced
