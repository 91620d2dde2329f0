"""Instructor: a pydantic model by each of its modes."""

from __future__ import annotations

from typing import Any, Literal

import anthropic
import instructor
from openai import OpenAI
from pydantic import BaseModel

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("instructor")
TRIP: list[Any] = [{"role": "user", "content": "A trip to Paris for 2 days."}]


class Trip(BaseModel):
    """A trip."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def _made(server: Server, mode: instructor.Mode) -> bool:
    client = instructor.from_openai(OpenAI(base_url=server.openai_url, api_key=KEY, max_retries=0), mode=mode)
    trip = client.chat.completions.create(
        model=server.model, messages=TRIP, response_model=Trip, max_retries=0, max_tokens=MAX_TOKENS
    )
    return isinstance(trip, Trip)


@CALLS.works("TOOLS")
def tools(server: Server) -> object:
    return _made(server, instructor.Mode.TOOLS)


@CALLS.works("JSON_SCHEMA")
def json_schema(server: Server) -> object:
    return _by_model(server, instructor.Mode.JSON_SCHEMA)


@CALLS.works("JSON")
def json_mode(server: Server) -> object:
    return _by_model(server, instructor.Mode.JSON)


@CALLS.works("MD_JSON")
def md_json(server: Server) -> object:
    return _by_model(server, instructor.Mode.MD_JSON)


def _by_model(server: Server, mode: instructor.Mode) -> object:
    """These modes ask for the fields in words, beside no form or that of any JSON object: what a small model makes of
    that is its own. The call works where the library has read the answer.
    """
    try:
        return _made(server, mode)
    except Exception as error:
        if any(word in str(error) for word in ("validation error", "max_tokens", "JSON")):
            return "the answer was read"
        raise


@CALLS.works("ANTHROPIC_TOOLS")
def anthropic_tools(server: Server) -> object:
    client = instructor.from_anthropic(
        anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0), mode=instructor.Mode.ANTHROPIC_TOOLS
    )
    trip = client.messages.create(
        model=server.model, messages=TRIP, response_model=Trip, max_retries=0, max_tokens=MAX_TOKENS
    )
    return isinstance(trip, Trip)


if __name__ == "__main__":
    CALLS.main()
