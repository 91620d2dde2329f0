"""The openai package: completions, chats, structured output, tools, responses, embeddings, and what is refused."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("openai")
HI: list[Any] = [{"role": "user", "content": "Say hello."}]
TRIP: list[Any] = [{"role": "user", "content": "A trip to Paris for 2 days."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Tell the weather.", "parameters": PARAMETERS}}
]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0)


def _chat(server: Server, messages: list[Any] | None = None, **fields: Any) -> Any:
    fields.setdefault("max_tokens", 16)
    return _client(server).chat.completions.create(model=server.model, messages=messages or HI, **fields)


def _complete(server: Server, **fields: Any) -> Any:
    fields = {"prompt": "Hello", "max_tokens": 8, **fields}
    return _client(server).completions.create(model=server.model, **fields)


@CALLS.works("models")
def models(server: Server) -> object:
    return server.model in [model.id for model in _client(server).models.list()]


@CALLS.works("chat")
def chat(server: Server) -> object:
    return _chat(server).choices[0].message.content


@CALLS.works("chat, streamed")
def stream(server: Server) -> object:
    return "".join(chunk.choices[0].delta.content or "" for chunk in _chat(server, stream=True))


@CALLS.works("chat, .stream()")
def stream_helper(server: Server) -> object:
    """The helper takes an end by length for an error: the answer must end by itself."""
    client = _client(server)
    with client.chat.completions.stream(model=server.model, messages=HI, max_tokens=512, temperature=0) as events:
        return [event.type for event in events] and events.get_final_completion().choices[0].message.content


@CALLS.works("include_usage")
def include_usage(server: Server) -> object:
    *_, last = _chat(server, stream=True, stream_options={"include_usage": True})
    return last.usage.total_tokens


@CALLS.works("async, four at once")
async def at_once(server: Server) -> object:
    async with AsyncOpenAI(base_url=server.openai_url, api_key=KEY) as client:
        calls = [client.chat.completions.create(model=server.model, messages=HI, max_tokens=8) for _ in range(4)]
        return all(answer.choices for answer in await asyncio.gather(*calls))


@CALLS.works("completions")
def completions(server: Server) -> object:
    return _complete(server).choices[0].text


@CALLS.works("completions, a list of prompts")
def prompts(server: Server) -> object:
    return len(_complete(server, prompt=["a", "b", "c"]).choices) == 3


@CALLS.works("logprobs with echo")
def logprobs_echo(server: Server) -> object:
    return len(_complete(server, logprobs=2, echo=True).choices[0].logprobs.tokens) > 8


@CALLS.works("echo alone (max_tokens 0)")
def echo_alone(server: Server) -> object:
    return _complete(server, logprobs=1, echo=True, max_tokens=0).choices[0].text == "Hello"


@CALLS.works("n")
def several(server: Server) -> object:
    return len(_chat(server, n=3).choices) == 3


@CALLS.works("seed")
def seed(server: Server) -> object:
    answers = {_chat(server, seed=7, temperature=1.0).choices[0].message.content for _ in range(2)}
    return len(answers) == 1


@CALLS.works("top_logprobs")
def top_logprobs(server: Server) -> object:
    return len(_chat(server, logprobs=True, top_logprobs=3).choices[0].logprobs.content[0].top_logprobs) == 3


@CALLS.works("developer role")
def developer(server: Server) -> object:
    return _chat(server, [{"role": "developer", "content": "Be brief."}, *HI]).choices


@CALLS.works("text parts")
def parts(server: Server) -> object:
    return _chat(server, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]).choices


@CALLS.works("max_completion_tokens")
def max_completion_tokens(server: Server) -> object:
    return _client(server).chat.completions.create(model=server.model, messages=HI, max_completion_tokens=8).choices


@CALLS.works("metadata, user, store, service_tier")
def labels(server: Server) -> object:
    return _chat(server, metadata={"a": "b"}, user="u", store=False, service_tier="auto").choices


@CALLS.works("tools=[]")
def no_tools(server: Server) -> object:
    return _chat(server, tools=[]).choices


@CALLS.works("continue_final_message")
def continued(server: Server) -> object:
    body = {"continue_final_message": True, "add_generation_prompt": False}
    return _chat(server, [*HI, {"role": "assistant", "content": "Hel"}], extra_body=body).choices


@CALLS.works("vLLM's fields")
def vllm_fields(server: Server) -> object:
    body = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 4}
    return _chat(server, extra_body=body).choices


@CALLS.works("prompt_logprobs")
def prompt_logprobs(server: Server) -> object:
    return _complete(server, extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs


@CALLS.works("tools")
def tools(server: Server) -> object:
    return _chat(server, tools=TOOLS, max_tokens=MAX_TOKENS).choices[0].message


@CALLS.works("tool_choice required")
def required(server: Server) -> object:
    answer = _chat(server, TRIP, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=MAX_TOKENS)
    return answer.choices[0].message.tool_calls[0].function.name == "weather"


@CALLS.works("tool_choice of allowed tools")
def allowed_tools(server: Server) -> object:
    other = {"type": "function", "function": {"name": "other", "parameters": PARAMETERS}}
    named = {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": named}
    fields: Any = {"tools": [*TOOLS, other], "tool_choice": choice, "parallel_tool_calls": False}
    answer = _chat(server, TRIP, **fields, max_tokens=MAX_TOKENS)
    return answer.choices[0].message.tool_calls[0].function.name == "weather"


@CALLS.works("tool_choice none")
def choice_none(server: Server) -> object:
    return not _chat(server, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls


@CALLS.works("tool calls in the history")
def history(server: Server) -> object:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
    return _chat(
        server, [*HI, called, {"role": "tool", "tool_call_id": "call_1", "content": "sun"}], tools=TOOLS
    ).choices


@CALLS.works("response_format json_object")
def json_object(server: Server) -> object:
    return _chat(server, TRIP, response_format={"type": "json_object"}, max_tokens=MAX_TOKENS).choices


@CALLS.works("response_format json_schema")
def json_schema(server: Server) -> object:
    schema = {"name": "trip", "schema": PARAMETERS, "strict": True}
    text = (
        _chat(server, TRIP, response_format={"type": "json_schema", "json_schema": schema}).choices[0].message.content
    )
    return "Paris" in text or "Rome" in text


@CALLS.works(".parse()")
def parse(server: Server) -> object:
    answer = _client(server).chat.completions.parse(
        model=server.model, messages=TRIP, response_format=Trip, max_tokens=MAX_TOKENS
    )
    return isinstance(answer.choices[0].message.parsed, Trip)


@CALLS.works("guided_json")
def guided_json(server: Server) -> object:
    return _chat(server, TRIP, extra_body={"guided_json": PARAMETERS}).choices[0].message.content


@CALLS.works("structured_outputs")
def structured_outputs(server: Server) -> object:
    body = {"structured_outputs": {"choice": ["yes", "no"]}}
    return _chat(server, extra_body=body).choices[0].message.content in ("yes", "no")


@CALLS.works("reasoning_effort")
def reasoning_effort(server: Server) -> object:
    return _chat(server, reasoning_effort="low").choices


@CALLS.works("responses")
def responses(server: Server) -> object:
    answer = _client(server).responses.create(model=server.model, input="Say hello.", max_output_tokens=16)
    return answer.output_text


@CALLS.works("responses, streamed, .parse()")
def responses_parse(server: Server) -> object:
    client = _client(server)
    with client.responses.stream(model=server.model, input=TRIP, text_format=Trip, max_output_tokens=96) as events:
        kinds = {event.type for event in events}
        return "response.completed" in kinds and isinstance(events.get_final_response().output_parsed, Trip)


@CALLS.works("embeddings")
def embeddings(server: Server) -> object:
    answer = _client(server).embeddings.create(model=server.model, input=["hello", "world"], dimensions=64)
    return [len(item.embedding) for item in answer.data] == [64, 64]


@CALLS.refused("suffix", "suffix")
def suffix(server: Server) -> object:
    return _complete(server, suffix="!")


@CALLS.works("best_of above n")
def best_of(server: Server) -> object:
    return len(_complete(server, best_of=2).choices) == 1


@CALLS.works("files, batches")
def batches(server: Server) -> object:
    client = _client(server)
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body = {"model": server.model, "messages": HI, "max_tokens": 8}
    lines = [json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) for name in ("a", "b")]
    given = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=given.id, endpoint=url, completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.output_file_id is not None, batch
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    return [answer["custom_id"] for answer in answers] == ["a", "b"]


@CALLS.refused("images", "image_url")
def images(server: Server) -> object:
    return _chat(server, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}])


@CALLS.refused("a schema that cannot be kept", "pattern")
def unkept(server: Server) -> object:
    schema = {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}}
    return _chat(server, response_format={"type": "json_schema", "json_schema": schema})


if __name__ == "__main__":
    CALLS.main()
