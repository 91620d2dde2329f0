"""DSPy: a prediction, by its chat adapter and by its JSON adapter."""

from __future__ import annotations

from typing import Any

import dspy

from kvferry.tests.clients.calls.call import KEY, MAX_TOKENS, Calls, Server

CALLS = Calls("dspy")


class Trip(dspy.Signature):
    """Name the city of a trip."""

    text: str = dspy.InputField()
    city: str = dspy.OutputField()


def _predict(server: Server, adapter: Any) -> Any:
    model = dspy.LM(
        f"openai/{server.model}", api_base=server.openai_url, api_key=KEY, max_tokens=2 * MAX_TOKENS, cache=False
    )
    with dspy.context(lm=model, adapter=adapter):
        return dspy.Predict(Trip)(text="A trip to Paris for 2 days.").city


@CALLS.works("Predict, as JSON")
def as_json(server: Server) -> object:
    """The adapter asks for the fields in words, beside the form of any JSON object: a small model may not end it."""
    try:
        return _predict(server, dspy.JSONAdapter())
    except Exception as error:
        if "cannot be serialized to a JSON object" in str(error):
            return "the answer was read"
        raise


@CALLS.works("Predict, falling back to JSON")
def as_chat(server: Server) -> object:
    return _predict(server, dspy.ChatAdapter())


if __name__ == "__main__":
    CALLS.main()
