"""LiteLLM: its own functions over our OpenAI and Anthropic surfaces."""

from __future__ import annotations

from typing import Any, Literal

import litellm
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("litellm")
TRIP: list[Any] = [{"role": "user", "content": "A trip to Paris for 2 days."}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def _complete(server: Server, **fields: Any) -> Any:
    fields = {"messages": TRIP, "max_tokens": MAX_TOKENS, "num_retries": 0, **fields}
    return litellm.completion(model=f"openai/{server.model}", api_base=server.openai_url, api_key=KEY, **fields)


@CALLS.works("completion")
def completion(server: Server) -> object:
    return _complete(server).choices[0].message.content


@CALLS.works("completion, streamed")
def stream(server: Server) -> object:
    return litellm.stream_chunk_builder(list(_complete(server, stream=True))).choices[0].message.content


@CALLS.works("tools, with the result")
def tools(server: Server) -> object:
    message = _complete(server, tools=TOOLS, tool_choice="required").choices[0].message
    call = message.tool_calls[0]
    told = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "sun"}
    return _complete(server, messages=[*TRIP, message.model_dump(), told], tools=TOOLS).choices


@CALLS.works("response_format")
def response_format(server: Server) -> object:
    return Trip.model_validate_json(_complete(server, response_format=Trip).choices[0].message.content)


@CALLS.works("responses")
def responses(server: Server) -> object:
    model = f"openai/{server.model}"
    answer = litellm.responses(model=model, api_base=server.openai_url, api_key=KEY, input="hi", max_output_tokens=16)
    return answer.output


@CALLS.works("messages (anthropic/)")
def messages(server: Server) -> object:
    model = f"anthropic/{server.model}"
    answer = litellm.completion(model=model, api_base=server.url, api_key=KEY, messages=TRIP, max_tokens=16)
    return answer.choices[0].message.content


@CALLS.works("embedding")
def embedding(server: Server) -> object:
    answer = litellm.embedding(
        model=f"openai/{server.model}", api_base=server.openai_url, api_key=KEY, input=["hello", "world"]
    )
    return len(answer.data) == 2


if __name__ == "__main__":
    CALLS.main()
