"""Chats with a model that answers in channels, over a scripted dispatcher, on all surfaces."""

from __future__ import annotations

from typing import Any

import pytest

from kvferry.common.grammar import CheckedGrammar, Grammar, pack_mask
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.catalogue.version import ServedModel

from .fakes import MODEL, VOCAB_SIZE, Script, Served, events, serve, typed_events

CHAT = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]
THOUGHT = "<|channel|>analysis<|message|>Hm, so.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Yes."
LOOK = "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
CALL = '<|start|>assistant<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"query": "x"}'


class Checker:
    """Takes every grammar."""

    async def check(self, grammar: Grammar, param: str) -> CheckedGrammar:
        return CheckedGrammar(grammar, pack_mask(b"\xff" * 4))


def _served(text: str, **options: Any) -> Served:
    model = ServedModel(MODEL, 4096, VOCAB_SIZE, reasoning_parser="openai_gptoss")
    return serve(Script(text), model=model, **options)


async def _post(served: Served, path: str = "/v1/chat/completions", **fields: Any) -> Any:
    async with served.client() as client:
        response = await client.post(path, json={"model": MODEL, **fields})
    assert response.status_code == 200, response.text
    return response


async def _whole(served: Served, **fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = (await _post(served, messages=CHAT, **fields)).json()
    return answer


async def test_thoughts_and_answer_are_told_apart_and_counted() -> None:
    answer = await _whole(_served(THOUGHT + FINAL))
    (choice,) = answer["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm, so.", "Yes.")
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(THOUGHT)}
    (hidden,) = (await _whole(_served(THOUGHT + FINAL), include_reasoning=False))["choices"]
    assert hidden["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


async def test_a_stream_says_the_same_as_the_whole_answer() -> None:
    (whole,) = (await _whole(_served(THOUGHT + LOOK + CALL), tools=TOOLS, seed=3))["choices"]
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": "search", "arguments": '{"query": "x"}'}
    assert (whole["message"]["content"], whole["finish_reason"]) == ("I look.", "tool_calls")
    chunks: Any = events(
        (await _post(_served(THOUGHT + LOOK + CALL), messages=CHAT, tools=TOOLS, seed=3, stream=True)).text
    )
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, so."
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    calls = [each for delta in deltas for each in delta.get("tool_calls", [])]
    assert calls[0]["id"] == call["id"]
    assert "".join(each["function"]["arguments"] for each in calls) == '{"query": "x"}' and len(calls) > 3


@pytest.mark.parametrize("stop", ["final", "<", "assistant", "end", "query", "|", "json", "so"])
async def test_a_stop_string_counts_in_no_mark_and_no_call(stop: str) -> None:
    (choice,) = (await _whole(_served(THOUGHT + CALL), tools=TOOLS, stop=[stop]))["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"query": "x"}'
    (choice,) = (await _whole(_served(THOUGHT + FINAL), stop=[stop, "es"]))["choices"]
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm, so.", "Y")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "es")


async def test_an_answer_that_follows_a_grammar_is_the_final_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it must call, the model is put into the channel of answers: from there on all is the grammar's."""
    served = _served('{"name": "search", "arguments": {}}', grammars=Checker())
    (choice,) = (await _whole(served, tools=TOOLS, tool_choice="required"))["choices"]
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant><|channel|>final<|message|>")
    assert choice["message"]["tool_calls"]
    monkeypatch.setattr(Tokenizer, "mark_id", lambda tokenizer, text: 7)  # this one has none of them
    served = _served(THOUGHT + '<|start|>assistant<|channel|>final<|message|>{"a": 1}', grammars=Checker())
    (choice,) = (await _whole(served, response_format={"type": "json_object"}))["choices"]
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant>")
    assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("Hm, so.", '{"a": 1}')
    served = _served("x")
    await _whole(served, tools=TOOLS)
    assert bytes(served.request.prompt_token_ids).endswith(b"<assistant>")


async def test_blocks_of_messages_and_items_of_responses_stand_in_their_order() -> None:
    said = THOUGHT + LOOK + "<|start|>assistant" + THOUGHT + CALL
    tools = [{"name": "search", "input_schema": {"type": "object", "properties": {}}}]
    answer = (await _post(_served(said), "/v1/messages", messages=CHAT, max_tokens=2000, tools=tools)).json()
    kinds = [block["type"] for block in answer["content"]]
    assert kinds == ["thinking", "text", "thinking", "tool_use"]
    assert answer["content"][-1]["input"] == {"query": "x"} and answer["stop_reason"] == "tool_use"
    asked = {"input": "hi", "tools": [{"type": "function", **TOOLS[0]["function"]}]}  # type: ignore[dict-item]
    told = (await _post(_served(said), "/v1/responses", **asked)).json()
    assert [item["type"] for item in told["output"]] == ["reasoning", "message", "reasoning", "function_call"]
    streamed = typed_events((await _post(_served(said), "/v1/responses", **asked, stream=True)).text)
    added = [event["item"]["type"] for event in streamed if event["type"] == "response.output_item.added"]
    assert added == ["reasoning", "message", "reasoning", "function_call"]


async def test_an_unfinished_message_goes_on_as_text() -> None:
    messages = [*CHAT, {"role": "assistant", "content": "So it"}]
    (choice,) = (
        await _post(_served(" is."), messages=messages, continue_final_message=True, add_generation_prompt=False)
    ).json()["choices"]
    assert choice["message"]["content"].endswith(" is.")
