"""LlamaIndex's OpenAI-like model and embeddings."""

from __future__ import annotations

from typing import Any, Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("llama-index")
TRIP = "A trip to Paris for 2 days."


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def _model(server: Server, **fields: Any) -> OpenAILike:
    fields = {"is_chat_model": True, "max_tokens": MAX_TOKENS, "context_window": 2048, "max_retries": 0, **fields}
    return OpenAILike(model=server.model, api_base=server.openai_url, api_key=KEY, **fields)


def _weather(city: str) -> str:
    """Tell a city's weather."""
    return f"sun in {city}"


@CALLS.works("chat")
def chat(server: Server) -> object:
    return _model(server).chat([ChatMessage("hi")]).message.content


@CALLS.works("chat, streamed")
def stream(server: Server) -> object:
    return "".join(chunk.delta or "" for chunk in _model(server).stream_chat([ChatMessage("hi")]))


@CALLS.works("completion")
def completion(server: Server) -> object:
    return _model(server, is_chat_model=False).complete("Hello").text


@CALLS.works("as_structured_llm, by a tool")
def structured_by_tool(server: Server) -> object:
    model = _model(server, is_function_calling_model=True, should_use_structured_outputs=False)
    answer = model.as_structured_llm(Trip).chat([ChatMessage(TRIP)])
    return isinstance(answer.raw, Trip)


@CALLS.works("as_structured_llm, by a schema")
def structured_by_schema(server: Server) -> object:
    model = _model(server, should_use_structured_outputs=True)
    return isinstance(model.as_structured_llm(Trip).chat([ChatMessage(TRIP)]).raw, Trip)


@CALLS.works("tools")
def tools(server: Server) -> object:
    model, called = _model(server, is_function_calling_model=True), FunctionTool.from_defaults(_weather)
    answer = model.chat_with_tools([called], user_msg=TRIP, tool_required=True, allow_parallel_tool_calls=False)
    return model.get_tool_calls_from_response(answer)


@CALLS.works("embeddings")
def embeddings(server: Server) -> object:
    model = OpenAILikeEmbedding(model_name=server.model, api_base=server.openai_url, api_key=KEY)
    return len({len(vector) for vector in model.get_text_embedding_batch(["hello", "world"])}) == 1


if __name__ == "__main__":
    CALLS.main()
