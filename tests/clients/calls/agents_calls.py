"""OpenAI's Agents SDK: runs over responses, which is its default, and over chats."""

from __future__ import annotations

from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("openai-agents")
TRIP = "A trip to Paris for 2 days."


class Trip(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


@function_tool
def weather(city: str) -> str:
    """Tell a city's weather."""
    return f"sun in {city}"


def _agent(server: Server, kind: Any, **fields: Any) -> Agent[None]:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0)
    model = kind(model=server.model, openai_client=client)
    settings = ModelSettings(max_tokens=MAX_TOKENS)
    return Agent(name="a", instructions="Be brief.", model=model, model_settings=settings, **fields)


@CALLS.works("responses, the default, with tools at hand")
async def responses(server: Server) -> object:
    return (await Runner.run(_agent(server, OpenAIResponsesModel, tools=[weather]), TRIP)).final_output


@CALLS.works("responses, streamed")
async def streamed(server: Server) -> object:
    run = Runner.run_streamed(_agent(server, OpenAIResponsesModel), "hi")
    return [event.type async for event in run.stream_events()] and run.final_output


@CALLS.works("responses, output_type")
async def output_type(server: Server) -> object:
    run = await Runner.run(_agent(server, OpenAIResponsesModel, output_type=Trip), TRIP)
    return isinstance(run.final_output, Trip)


@CALLS.works("chats, with tools at hand")
async def chats(server: Server) -> object:
    return (await Runner.run(_agent(server, OpenAIChatCompletionsModel, tools=[weather]), TRIP)).final_output


@CALLS.works("chats, output_type")
async def chat_output_type(server: Server) -> object:
    run = await Runner.run(_agent(server, OpenAIChatCompletionsModel, output_type=Trip), TRIP)
    return isinstance(run.final_output, Trip)


if __name__ == "__main__":
    CALLS.main()
