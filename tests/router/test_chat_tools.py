"""Chats with tools over a scripted dispatcher: what the model is told, and its calls whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.common.grammar import CheckedGrammar, Grammar, pack_mask
from kvferry.models.chat_template import ChatTemplate
from kvferry.router.catalogue.version import ServedModel
from kvferry.router.turns.told import told_in_text

from . import fakes
from .fakes import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, Inline, Script, Served, events, serve, toy_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "a\\"b"}}\n</tool_call>'
TWO_CALLS = f"Let me look.\n{CALL}\n{CALL}"
LONG = 4096


def _served(text: str, **model: Any) -> Served:
    served = ServedModel(MODEL, LONG, VOCAB_SIZE, **model)
    return serve(Script(text), model=served)


async def _post(served: Served, **fields: Any) -> Any:
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json={"messages": CHAT, "tools": TOOLS, **fields})
    assert response.status_code == 200, response.text
    return response


async def _whole(served: Served, **fields: Any) -> dict[str, Any]:
    body = (await _post(served, **fields)).json()
    choice: dict[str, Any] = body["choices"][0]
    return choice


async def _streamed(served: Served, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message put together as a client does it, and the deltas of calls as they came."""
    chunks: Any = events((await _post(served, stream=True, **fields)).text)
    message: dict[str, Any] = {"content": "", "calls": {}}
    deltas = []
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["finish_reason"] = choice["finish_reason"]
            for call in delta.get("tool_calls", []):
                deltas.append(call)
                if "id" in call:
                    assert call["type"] == "function" and call["index"] not in message["calls"]
                    message["calls"][call["index"]] = {
                        "id": call["id"],
                        "type": "function",
                        "function": dict(call["function"]),
                    }
                else:
                    message["calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message, deltas


@pytest.mark.parametrize("end", ['"}}\n</tool_call>', '"}}\n</tool_call>\nSo.', ""])
async def test_half_a_surrogate_pair_in_arguments_is_a_question_mark_and_strict_parsers_read_them(end: str) -> None:
    text = CALL.replace(r'a\"b"}}' + "\n</tool_call>", r"\ud83d\ude00 \ud83d" + end)
    message, deltas = await _streamed(_served(text))
    whole = (await _whole(_served(text)))["message"]
    told = message["calls"][0]["function"]["arguments"]
    assert told == whole["tool_calls"][0]["function"]["arguments"] == '{"query": "\\ud83d\\ude00 ?' + end[:2]
    assert r"\ud83d\ude00" in [delta["function"]["arguments"] for delta in deltas]


async def test_an_answer_with_calls_has_openais_shape() -> None:
    choice = await _whole(_served(TWO_CALLS))
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me look."
    first, second = message["tool_calls"]
    assert first["function"] == {"name": "search", "arguments": '{"query": "a\\"b"}'} and first["type"] == "function"
    assert first["id"].startswith("call_") and first["id"] != second["id"]


async def test_an_answer_of_calls_alone_has_no_content() -> None:
    message = (await _whole(_served(CALL)))["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


async def test_a_stream_says_the_same_as_the_whole_answer() -> None:
    whole = await _whole(_served(TWO_CALLS), seed=3)
    message, deltas = await _streamed(_served(TWO_CALLS), seed=3)
    assert message["content"] == whole["message"]["content"]
    assert list(message["calls"].values()) == whole["message"]["tool_calls"]  # ids too
    assert message["finish_reason"] == "tool_calls"
    assert [call["index"] for call in deltas if "id" in call] == [0, 1]
    assert "".join(call["function"]["arguments"] for call in deltas if call["index"] == 1) == '{"query": "a\\"b"}'
    assert len(deltas) > 10  # as they are written


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("stop", ["a", '"', "}", "\n{", "name", "tool_call", "<"])
async def test_a_stop_string_ends_what_is_said_and_cuts_no_call(stop: str, parallel: bool) -> None:
    """A call's arguments are data: the client would get JSON without an end."""
    call = {"name": "search", "arguments": '{"query": "a\\"b"}'}
    choice = await _whole(_served(f"So:\n{CALL}"), stop=[stop], parallel_tool_calls=parallel)
    assert [each["function"] for each in choice["message"]["tool_calls"]] == [call]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("So:", "tool_calls")
    message, _ = await _streamed(_served(f"So:\n{CALL}"), stop=[stop], parallel_tool_calls=parallel)
    assert [each["function"] for each in message["calls"].values()] == [call]


async def test_a_stop_string_counts_before_and_behind_calls_and_in_what_only_begins_like_one() -> None:
    for text, content in ((f"a.b\n{CALL}", "a"), (f"a{CALL}b.c", "ab"), ("a <tool_cal.l>", "a <tool_cal")):
        choice = await _whole(_served(text), stop=["."])
        assert (choice["message"]["content"], choice["stop_reason"]) == (content, ".")
        message, _ = await _streamed(_served(text), stop=["."])
        assert message["content"] == content


async def test_calls_that_must_come_are_not_cut_by_a_stop_string() -> None:
    text = '[{"name": "search", "arguments": {"query": "a"}}]'
    served = serve(Script(text), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker())
    choice = await _whole(served, tool_choice="required", stop=["search", "a", "]"])
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": '{"query": "a"}'}


@pytest.mark.parametrize(("max_tokens", "num_calls"), [(12, 0), (60, 1)])
async def test_what_is_cut_of_calls_that_must_come_is_no_content(max_tokens: int, num_calls: int) -> None:
    text = '[{"name": "search", "arguments": {"query": "a"}}, {"name": "search", "arguments": {}}]'
    fields = {"tool_choice": "required", "max_tokens": max_tokens}
    served = serve(Script(text), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker())
    choice = await _whole(served, **fields)
    assert len(choice["message"].get("tool_calls", [])) == num_calls and not choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    served = serve(Script(text), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker())
    message, _ = await _streamed(served, **fields)
    assert (message["content"], len(message["calls"])) == ("", num_calls)


async def test_without_parallel_calls_the_first_one_is_told() -> None:
    served = _served(TWO_CALLS)
    answer = (await _post(served, parallel_tool_calls=False)).json()
    (choice,) = answer["choices"]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens"] == len(f"Let me look.\n{CALL}")  # no more were waited for
    assert served.dispatcher.finished_choices
    message, _ = await _streamed(_served(TWO_CALLS), parallel_tool_calls=False)
    assert list(message["calls"]) == [0] and message["finish_reason"] == "tool_calls"


async def test_a_call_that_is_cut_by_its_length_ended_by_length() -> None:
    choice = await _whole(_served(CALL), max_tokens=50)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")
    message, _ = await _streamed(_served(CALL), max_tokens=50)
    assert message["finish_reason"] == "length"


async def test_text_that_is_no_call_is_content() -> None:
    text = "<tool_call>\n{broken}\n</tool_call> \n"
    choice = await _whole(_served(text))
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]
    message, _ = await _streamed(_served(text))
    assert (message["content"], message["finish_reason"]) == (text, "stop")


@pytest.mark.parametrize("fields", [{"tools": None}, {"tool_choice": "none"}, {"tools": []}])
async def test_without_tools_nothing_is_a_call(fields: dict[str, Any]) -> None:
    served = _served(CALL)
    choice = await _whole(served, **fields)
    assert choice["message"] == {"role": "assistant", "content": CALL, "refusal": None}
    assert b"search" not in bytes(served.request.prompt_token_ids)


async def test_a_template_that_knows_no_tools_gets_them_as_text() -> None:
    served = _served("ok")
    function = {"name": "search", "arguments": '{"query": "x"}'}
    answered = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "found"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "more"}]},
    ]
    await _whole(served, messages=answered)
    prompt = bytes(served.request.prompt_token_ids).decode()
    assert prompt.startswith("<system># Tools") and '"name": "search", "description": "Search."' in prompt
    assert prompt.endswith(
        '<user>hi<assistant><tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
        "<user><tool_response>\nfound\n</tool_response>\n<tool_response>\nmore\n</tool_response><assistant>"
    )


async def test_every_choice_has_calls_of_its_own() -> None:
    served = _served(CALL)
    answer = (await _post(served, n=2)).json()
    ids = {choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}
    assert len(ids) == 2


async def test_logprobs_come_though_the_text_is_held_back() -> None:
    chunks: Any = events((await _post(_served(CALL), stream=True, logprobs=True)).text)
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(each["content"]) for each in logprobs if each) == len(CALL) + 1


async def test_an_operator_names_the_form() -> None:
    choice = await _whole(_served('[TOOL_CALLS]search{"query": "x"}', tool_parser="mistral"))
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": '{"query": "x"}'}
    assert len(call["id"]) == 9 and call["id"].isalnum()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ],
)
async def test_a_refusal_has_openais_shape(fields: dict[str, Any], param: str) -> None:
    async with _served("x").client() as client:
        response = await client.post("/v1/chat/completions", json={"messages": CHAT, "tools": TOOLS, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


async def test_a_call_behind_thoughts_that_never_end_is_called() -> None:
    text = '<think>I look it up.\n<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
    served = _served(text, reasoning_parser="think")
    choice = await _whole(served)
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("I look it up.", None)
    assert (call["function"]["arguments"], choice["finish_reason"]) == ('{"query": "x"}', "tool_calls")
    message, _ = await _streamed(served)
    assert message["calls"] == {0: {**call, "id": message["calls"][0]["id"]}}
    assert message["finish_reason"] == "tool_calls"


class Checker:
    """Takes every grammar without a certain word."""

    def __init__(self, wrong: bytes = b"") -> None:
        self.checked: list[tuple[Grammar, str]] = []
        self._wrong = wrong

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        self.checked.append((grammar, param))
        if self._wrong and self._wrong in grammar.text:
            raise RequestError(f"'{param}' cannot be kept", param=f"{param}.here", code="unsupported_grammar")
        return CheckedGrammar(grammar, pack_mask(b"\xff" * 4))

    def close(self) -> None: ...


async def test_a_call_that_must_come_follows_a_grammar_behind_its_thoughts() -> None:
    checker = Checker()
    text = 'Hm</think>[{"name": "search", "arguments": {"query": "x"}}, {"name": "search", "arguments": {}}]'
    model = ServedModel(MODEL, LONG, VOCAB_SIZE, reasoning_parser="deepseek_r1", tool_parser="mistral")
    served = serve(Script(text), model=model, grammars=checker)
    choice = await _whole(served, tool_choice="required")
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"query": "x"}', "{}"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert choice["message"]["reasoning_content"] == "Hm"
    (grammar, param), _ = checker.checked
    assert served.request.grammar is not None and param == "tools" and b'"const": "search"' in grammar.text
    followed = served.request.grammar.grammar
    assert followed.text == grammar.text and followed.thoughts is not None and "@answer" in followed.thoughts.around
    message, _ = await _streamed(served, tool_choice="required")
    assert len(message["calls"]) == 2
    await _whole(served, tool_choice="auto")
    assert served.request.grammar is None


async def test_a_streamed_answer_that_must_call_has_no_content_from_the_first() -> None:
    text = '[{"name": "search", "arguments": {"query": "x"}}]'
    served = serve(Script(text), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker())
    for choice, content in (("required", None), ("auto", "")):
        chunks: Any = events((await _post(served, stream=True, tool_choice=choice)).text)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": content}


THINK = ServedModel(MODEL, LONG, VOCAB_SIZE, reasoning_parser="think", tool_parser="hermes")
JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}


async def test_an_answer_of_a_form_comes_behind_thoughts() -> None:
    served = serve(Script('<think>Hm, {so}</think>\n\n{"a": 1}'), model=THINK, grammars=Checker())
    for fields in (JSON, {**JSON, "tools": TOOLS}):
        choice = await _whole(served, **fields)
        said = choice["message"]["reasoning_content"], choice["message"]["content"]
        assert said == ("Hm, {so}", '{"a": 1}')
        followed = served.request.grammar
        assert followed is not None and followed.grammar.thoughts is not None
    usage = (await _post(served, **JSON)).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    message, _ = await _streamed(served, **JSON)
    assert message["content"] == '{"a": 1}'


async def test_a_budget_for_thoughts_that_cannot_be_kept_is_told() -> None:
    """This vocabulary has no token for the end of thoughts."""
    for model, wanted in ((THINK, "thinking_token_budget"), (ServedModel(MODEL, LONG, VOCAB_SIZE), None)):
        served = serve(Script("<think>Hm</think>Yes"), model=model, grammars=Checker())
        response = await _post(served, thinking_token_budget=3)
        assert response.headers.get("x-kvferry-ignored") == wanted and served.request.grammar is None
    whole = await _post(serve(Script("x"), model=THINK, grammars=Checker()), thinking_token_budget=30, max_tokens=30)
    assert "x-kvferry-ignored" not in whole.headers, "so many are allowed in all"


async def test_the_form_of_text_is_for_answers_that_have_text() -> None:
    text = '[{"name": "search", "arguments": {}}]'
    served = serve(Script(text), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker())
    await _whole(served, tool_choice="required", response_format={"type": "json_object"})
    assert served.request.grammar is not None and served.request.grammar.grammar.kind == "json_schema"


def _strict(**said: str) -> list[dict[str, Any]]:
    """`said`: of its parameter, besides."""
    function: Any = TOOLS[0]["function"]
    parameters = function["parameters"]
    if said:
        parameters = {**parameters, "properties": {"query": {"type": "string", **said}}}
    return [{"type": "function", "function": {**function, "parameters": parameters, "strict": True}}]


@pytest.mark.parametrize(
    ("fields", "parser", "kind", "begins", "ignored"),
    [
        ({"tools": _strict()}, "hermes", "lark", b"start: (before", None),
        ({"tools": _strict()}, "json", "lark", b"start: BLANK (text", None),
        ({"tools": _strict()}, "gemma4", "lark", b'call: "call:search" part_', None),
        ({"tools": _strict(pattern="a+")}, "gemma4", "lark", b'call: "call:search" any_object', "tools.strict"),
        ({"tools": _strict()}, "mistral", None, b"", "tools.strict"),
        ({"tools": _strict()}, "granite", None, b"", "tools.strict"),
        ({"response_format": {"type": "json_object"}}, "granite", "lark", b"start: answer |", None),
        ({"tools": _strict(), "tool_choice": "none"}, "hermes", None, b"", None),
        ({"response_format": {"type": "json_object"}}, "hermes", "lark", b"start: answer |", None),
        ({"response_format": {"type": "json_object"}}, "qwen3_coder", "json_object", b"", "tools"),
        ({"structured_outputs": {"regex": "a+"}}, "hermes", "regex", b"a+", "tools"),
    ],
)
async def test_an_answer_that_may_call_follows_what_can_be_kept(
    fields: dict[str, Any], parser: Any, kind: str | None, begins: bytes, ignored: str | None
) -> None:
    checker = Checker()
    served = serve(Script("text"), model=ServedModel(MODEL, LONG, VOCAB_SIZE, tool_parser=parser), grammars=checker)
    response = await _post(served, **fields)
    checked = served.request.grammar
    grammar = None if checked is None else checked.grammar
    assert (None if grammar is None else grammar.kind) == kind
    assert grammar is None or begins in grammar.text
    assert response.headers.get("x-kvferry-ignored") == ignored


async def test_an_answer_that_may_call_may_reason() -> None:
    text = f"so</think>{CALL}"
    model = ServedModel(MODEL, LONG, VOCAB_SIZE, reasoning_parser="deepseek_r1")
    choice = await _whole(serve(Script(text), model=model, grammars=Checker()), tools=_strict())
    assert choice["message"]["reasoning_content"] == "so" and len(choice["message"]["tool_calls"]) == 1


async def test_the_models_own_choice_can_be_switched_off() -> None:
    async with _served("x", chooses_tools=False).client() as client:
        response = await client.post("/v1/chat/completions", json={"messages": CHAT, "tools": TOOLS})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tool_choice"


async def test_tokenize_counts_tools_too() -> None:
    served = serve(model=ServedModel(MODEL, MAX_MODEL_LEN * 8, VOCAB_SIZE))
    async with served.client() as client:
        bare = (await client.post("/tokenize", json={"messages": CHAT})).json()["count"]
        told = (await client.post("/tokenize", json={"messages": CHAT, "tools": TOOLS})).json()["count"]
    assert told > bare + 100


def test_a_user_who_goes_on_after_results_takes_one_turn() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    told = told_in_text(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "found"},
            {"role": "user", "content": "so?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And?"},
        ],
        [],
    )
    assert [message["role"] for message in told] == ["user", "assistant"] * 2 + ["user"]
    assert told[2]["content"] == "<tool_response>\nfound\n</tool_response>\nso?"


# Gemma 2's, as far as it refuses.
WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
)


async def test_tools_are_told_by_the_user_where_a_template_takes_no_system_message() -> None:
    renderer = Inline(toy_tokenizer())
    renderer._template = ChatTemplate(WITHOUT_SYSTEM)
    served = serve(Script(CALL), model=ServedModel(MODEL, LONG, VOCAB_SIZE), renderer=renderer)
    choice = await _whole(served)
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "search"
    prompt = bytes(served.request.prompt_token_ids).decode()
    assert prompt.startswith("<user># Tools") and prompt.endswith("</tool_call>\n\nhi")
    asked = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "search", "arguments": "{}"}}]}
    await _whole(served, messages=[*CHAT, asked, {"role": "tool", "tool_call_id": "a", "content": "found"}])
    assert bytes(served.request.prompt_token_ids).endswith(b"<user><tool_response>\nfound\n</tool_response>")
    async with served.client() as client:
        body = {"messages": [{"role": "system", "content": "Be brief."}, *CHAT], "tools": TOOLS}
        refused = await client.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["message"] == "System role not supported"


# Llama 3's, as far as it tells calls and refuses them.
ONE_CALL_AT_ONCE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for message in messages %}{% if 'tool_calls' in message %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{{ message.tool_calls[0].function | tojson }}"
    "{% else %}<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}"
)


def _called(*names: str) -> dict[str, Any]:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in names]
    return {"role": "assistant", "content": "So.", "tool_calls": calls}


def _result(name: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": f"{name}!"}


@pytest.mark.parametrize(
    ("results", "told"),
    [
        (("a", "b"), "<assistant>So.A<tool>a!<assistant>B<tool>b!"),
        (("b", "a"), "<assistant>So.A<tool>a!<assistant>B<tool>b!"),
        (("b", "x"), "<assistant>So.A<assistant>B<tool>b!<tool>x!"),
        ((), "<assistant>So.A<assistant>B"),
    ],
)
async def test_calls_are_told_apart_where_a_template_takes_one_at_once(
    results: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that made both must not be the end of its conversation."""
    fakes.use_template(tmp_path, monkeypatch, ONE_CALL_AT_ONCE)
    served = _served("ok")
    history = [*CHAT, _called("a", "b"), *map(_result, results), _called("c"), _result("c"), *CHAT]
    await _whole(served, messages=history)
    prompt = bytes(served.request.prompt_token_ids).decode()
    for name in "abc":
        prompt = prompt.replace(f'{{"name": "{name}", "arguments": {{}}}}', name.upper())
    assert prompt.partition("<user>")[2] == f"hi{told}<assistant>So.C<tool>c!<user>hi"


# --- reasoning --------------------------------------------------------------------------------------------

THOUGHT = "<think>\nHm, so.\n</think>\n\nYes."


async def test_reasoning_is_told_apart_and_counted() -> None:
    served = _served(THOUGHT, reasoning_parser="think")
    answer = (await _post(served, tools=None)).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["reasoning"], message["content"]) == ("Hm, so.", "Hm, so.", "Yes.")
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("<think>\nHm, so.\n</think>")}
    assert answer["usage"]["completion_tokens"] == len(THOUGHT) + 1


async def test_reasoning_streams() -> None:
    served = _served(THOUGHT, reasoning_parser="think")
    chunks: Any = events((await _post(served, tools=None, stream=True, stream_options={"include_usage": True})).text)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("<think>\nHm, so.\n</think>")


async def test_a_template_may_have_opened_the_tag() -> None:
    served = _served("Hm.</think>Yes.", reasoning_parser="think")
    choice = await _whole(served, tools=None, chat_template_kwargs={"enable_thinking": True})
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm.", "Yes.")


@pytest.mark.parametrize("stop", ["so", "\n\n", "think", "\n", "<", "Hm"])
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_stop_string_counts_in_no_thought(stop: str, parallel: bool) -> None:
    for tools in (None, TOOLS):
        fields: dict[str, Any] = {"tools": tools, "stop": [stop, "Yes"]}
        if tools:
            fields["parallel_tool_calls"] = parallel
        choice = await _whole(_served(THOUGHT, reasoning_parser="think"), **fields)
        message = choice["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm, so.", "")
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "Yes")
        streamed, _ = await _streamed(_served(THOUGHT, reasoning_parser="think"), **fields)
        assert streamed["content"] == ""


async def test_a_stop_string_counts_in_an_answer_without_thoughts() -> None:
    for text, content in (("  <thin so", "  <thin "), ("Yes, so.", "Yes, ")):
        choice = await _whole(_served(text, reasoning_parser="think"), tools=None, stop=["so"])
        assert (choice["message"]["content"], choice["stop_reason"]) == (content, "so")
    choice = await _whole(_served("Hm, so.</think>Yes, so.", reasoning_parser="deepseek_r1"), tools=None, stop=["so"])
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm, so.", "Yes, ")


async def test_reasoning_may_be_left_out() -> None:
    choice = await _whole(_served(THOUGHT, reasoning_parser="think"), tools=None, include_reasoning=False)
    assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


async def test_calls_come_after_reasoning() -> None:
    choice = await _whole(_served(f"<think>Hm.</think>\n{CALL}", reasoning_parser="think"))
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"] == "Hm."
    assert len(choice["message"]["tool_calls"]) == 1 and choice["message"]["content"] is None


async def test_without_a_parser_tags_are_text_and_nothing_is_counted() -> None:
    answer = (await _post(_served(THOUGHT), tools=None)).json()
    assert answer["choices"][0]["message"]["content"] == THOUGHT
    assert "completion_tokens_details" not in answer["usage"]


async def test_an_effort_goes_to_the_template_that_knows_it() -> None:
    served = _served("x")  # the toy template has enable_thinking
    response = await _post(served, tools=None, reasoning_effort="high")
    assert bytes(served.request.prompt_token_ids).endswith(b"<think>") and "x-kvferry-ignored" not in response.headers
    await _post(served, tools=None, reasoning_effort="none")
    assert not bytes(served.request.prompt_token_ids).endswith(b"<think>")


@pytest.mark.parametrize(("verbosity", "told"), [("low", "verbosity"), ("high", "verbosity"), ("medium", None)])
async def test_a_verbosity_has_no_effect_and_that_is_told(verbosity: str, told: str | None) -> None:
    served = _served("x")
    response = await _post(served, tools=None, verbosity=verbosity)
    assert response.headers.get("x-kvferry-ignored") == told
    async with served.client() as client:
        text = {"verbosity": verbosity}
        response = await client.post("/v1/responses", json={"input": "hi", "text": text})
        refused = await client.post("/v1/responses", json={"input": "hi", "text": {"verbosity": "loud"}})
    assert (response.status_code, response.json()["text"]["verbosity"]) == (200, verbosity)
    assert response.headers.get("x-kvferry-ignored") == (told and f"text.{told}")
    error = refused.json()["error"]
    assert (error["param"], error["message"][:26]) == ("text.verbosity", "'text.verbosity' should be")


async def test_unknown_fields_are_ignored_aloud_where_the_operator_says_so() -> None:
    served = serve(Script("x"), unknown_fields="warn", model=ServedModel(MODEL, 4096, VOCAB_SIZE))
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json={"messages": CHAT, "temprature": 1, "a\r\nb": 2})
        assert response.status_code == 200 and response.headers["x-kvferry-ignored"] == "temprature,a??b"
        named = [{**CHAT[0], "id": 7, "provider_specific_fields": {}, "createdAt": 1}]
        response = await client.post("/v1/chat/completions", json={"messages": named})
        assert response.headers["x-kvferry-ignored"] == "messages[0].createdAt"
        assert "kvferry_ignored_fields_total 3.0" in (await client.get("/metrics")).text
        part = {"type": "text", "text": "hi", "citations": {"enabled": False}}
        tool = {"type": "function", "function": {"name": "f", "examples": []}, "defer_loading": True}
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "thought": "x"}
        chat = [{"role": "user", "content": [part]}, {"role": "assistant", "tool_calls": [call]}, *CHAT]
        response = await client.post("/v1/chat/completions", json={"messages": chat, "tools": [tool]})
        assert set(response.headers["x-kvferry-ignored"].split(",")) == {
            "messages[0].content[0].citations",
            "messages[1].tool_calls[0].thought",
            "tools[0].defer_loading",
            "tools[0].function.examples",
        }
        schema = {"name": "n", "schema": {}, "foo": 1}
        for fields, names in (
            ({"response_format": {"type": "text", "foo": 1}}, "response_format.foo"),
            ({"structured_outputs": {"regex": "a", "foo": 1}}, "structured_outputs.foo"),
            ({"response_format": {"type": "json_schema", "json_schema": schema}}, "response_format.json_schema.foo"),
        ):
            response = await client.post("/v1/chat/completions", json={"messages": CHAT, **fields})
            assert response.headers["x-kvferry-ignored"] == names
            assert response.status_code == 200 or "is not supported" in response.text  # no grammar is, here
        response = await client.post(
            "/v1/responses", json={"input": "hi", "text": {"format": {"type": "text", "foo": 1}}}
        )
        assert (response.status_code, response.headers["x-kvferry-ignored"]) == (200, "text.format.foo")
        message = {"max_tokens": 5, "messages": [{"role": "user", "content": "hi", "id": "m"}]}
        response = await client.post("/v1/messages", json=message)
        assert response.headers["x-kvferry-ignored"] == "messages[0].id"
        for path in ("/v1/messages/count_tokens", "/tokenize"):
            response = await client.post(path, json={"messages": [{**CHAT[0], "at": 7}]})
            assert (response.status_code, response.headers["x-kvferry-ignored"]) == (200, "messages[0].at")
        assert (await client.post("/v1/chat/completions", json={"messages": CHAT, "suffix": "x"})).status_code == 400
    async with serve(Script("x")).client() as client:
        assert (await client.post("/v1/chat/completions", json={"messages": CHAT, "temprature": 1})).status_code == 400


@pytest.mark.parametrize(
    ("strict", "choice", "wrong", "param"),
    [
        (True, "auto", b"uniqueItems", "tools[1].function.parameters.here"),
        (False, "required", b"uniqueItems", "tools[1].function.parameters.here"),
        (True, "auto", b'"const": "search"', "tools.here"),  # all of them together
    ],
)
async def test_a_schema_that_cannot_be_kept_is_refused_by_the_tool_that_has_it(
    strict: bool, choice: str, wrong: bytes, param: str
) -> None:
    other = {"name": "other", "strict": strict, "parameters": {"type": "object", "uniqueItems": True}}
    served = serve(Script("x"), model=ServedModel(MODEL, LONG, VOCAB_SIZE), grammars=Checker(wrong))
    body = {"messages": CHAT, "tools": [*TOOLS, {"type": "function", "function": other}], "tool_choice": choice}
    async with served.client() as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
