"""The anthropic package: messages, whole and streamed, tools, counting, and what is refused."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("anthropic")
HI: list[Any] = [{"role": "user", "content": "Say hello."}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris"]}}, "required": ["city"]}
TOOLS: list[Any] = [{"name": "weather", "description": "Tell the weather.", "input_schema": SCHEMA}]


def _create(server: Server, **fields: Any) -> Any:
    client = Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    return client.messages.create(**{"model": server.model, "max_tokens": 16, "messages": HI, **fields})


@CALLS.works("messages")
def messages(server: Server) -> object:
    return _create(server).content[0].text


@CALLS.works("messages, streamed")
def stream(server: Server) -> object:
    client = Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    with client.messages.stream(model=server.model, max_tokens=16, messages=HI) as events:
        return "".join(events.text_stream)


@CALLS.works("tools, with the result")
def tools(server: Server) -> object:
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    answer = _create(server, tools=TOOLS, tool_choice=choice, max_tokens=MAX_TOKENS)
    [call] = [block for block in answer.content if block.type == "tool_use"]
    told = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]}
    return _create(server, messages=[*HI, {"role": "assistant", "content": answer.content}, told], tools=TOOLS).content


@CALLS.works("count_tokens")
def count_tokens(server: Server) -> object:
    client = Anthropic(base_url=server.url, api_key=KEY, max_retries=0)
    return client.messages.count_tokens(model=server.model, messages=HI).input_tokens


@CALLS.refused("images", "image")
def images(server: Server) -> object:
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    return _create(server, messages=[{"role": "user", "content": [{"type": "image", "source": source}]}])


if __name__ == "__main__":
    CALLS.main()
