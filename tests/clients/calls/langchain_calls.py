"""LangChain's `ChatOpenAI`, `OpenAI` and `OpenAIEmbeddings`."""

from __future__ import annotations

from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("langchain")
TRIP = "A trip to Paris for 2 days."


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


@tool
def weather(city: str) -> str:
    """Tell a city's weather."""
    return f"sun in {city}"


def _chat(server: Server, **fields: Any) -> ChatOpenAI:
    fields.setdefault("max_tokens", MAX_TOKENS)
    return ChatOpenAI(model=server.model, base_url=server.openai_url, api_key=KEY, max_retries=0, **fields)


@CALLS.works("invoke")
def invoke(server: Server) -> object:
    return _chat(server).invoke("hi").content


@CALLS.works("stream")
def stream(server: Server) -> object:
    return "".join(str(chunk.content) for chunk in _chat(server).stream("hi"))


@CALLS.works("batch")
def batch(server: Server) -> object:
    return len(_chat(server, max_tokens=8).batch(["a", "b", "c"])) == 3


@CALLS.works("completions")
def completions(server: Server) -> object:
    return OpenAI(model=server.model, base_url=server.openai_url, api_key=KEY, max_tokens=8).invoke("Hello")


@CALLS.works("logprobs")
def logprobs(server: Server) -> object:
    return _chat(server, logprobs=True, max_tokens=4).invoke("hi").response_metadata["logprobs"]


@CALLS.works("with_structured_output, json_schema")
def json_schema(server: Server) -> object:
    return isinstance(_chat(server).with_structured_output(Trip, method="json_schema").invoke(TRIP), Trip)


@CALLS.works("with_structured_output, function_calling")
def function_calling(server: Server) -> object:
    return isinstance(_chat(server).with_structured_output(Trip, method="function_calling").invoke(TRIP), Trip)


@CALLS.works("bind_tools, with the result")
def bind_tools(server: Server) -> object:
    model = _chat(server).bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
    called = model.invoke(TRIP)
    [call] = called.tool_calls
    return _chat(server).invoke([HumanMessage(TRIP), called, ToolMessage("sun", tool_call_id=call["id"])]).content


@CALLS.works("responses")
def responses(server: Server) -> object:
    return _chat(server, use_responses_api=True).invoke("hi").content


@CALLS.works("embeddings")
def embeddings(server: Server) -> object:
    model = OpenAIEmbeddings(
        model=server.model, base_url=server.openai_url, api_key=KEY, check_embedding_ctx_length=False, dimensions=32
    )
    return [len(vector) for vector in model.embed_documents(["hello", "world"])] == [32, 32]


if __name__ == "__main__":
    CALLS.main()
