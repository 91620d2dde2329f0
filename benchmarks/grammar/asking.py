"""What is asked, and what came back: a schema's answer with its verdict, or a pair of streams with their times."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
import jsonschema
from referencing.exceptions import Unresolvable

from kvferry.benchmarks.grammar.schemas import Case, Schema
from kvferry.benchmarks.shared.streams import time_stream

_TIMEOUT_S = 300.0
_PAIR_TOKENS = 80
_PROMPT = "Describe some people and places that you have made up, as JSON."


@dataclass(slots=True, frozen=True)
class Asked:
    """One schema and its answer."""

    source: str
    name: str
    status: int
    finish: str  # empty: refused or failed
    is_valid: bool  # of an answer that finished
    reason: str  # of a refusal: the keyword, or what is said in place of one
    num_tokens: int


@dataclass(slots=True, frozen=True)
class Pair:
    """Two streams, one after the other: without a grammar, and with one that the server has never seen."""

    ttft_s: tuple[float, float]
    gaps_s: tuple[tuple[float, ...], tuple[float, ...]]  # between chunks of `_PAIR_TOKENS` tokens

    def tpot_s(self, side: int) -> float:
        return sum(self.gaps_s[side]) / (_PAIR_TOKENS - 1)


async def ask_all(
    url: str, model: str, cases: Sequence[Case], *, max_tokens: int, concurrency: int, seed: int
) -> list[Asked]:
    """Ask with every schema, so many at once."""
    free = asyncio.Semaphore(concurrency)

    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:

        async def one(number: int, case: Case) -> Asked:
            async with free:
                body = _body(model, case.schema, max_tokens=max_tokens, seed=seed + number)
                answer = await client.post(f"{url}/chat/completions", json=body)
                return _judged(case, answer)

        return list(await asyncio.gather(*(one(number, case) for number, case in enumerate(cases))))


def _body(model: str, schema: Schema | None, **fields: object) -> dict[str, object]:
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "temperature": 1,
        **fields,
    }
    if schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return body


def _judged(case: Case, answer: httpx.Response) -> Asked:
    if answer.status_code != 200:
        error = answer.json()["error"]
        return Asked(case.source, case.name, answer.status_code, "", False, _reason(error), 0)
    body = answer.json()
    [choice] = body["choices"]
    is_valid = choice["finish_reason"] == "stop" and _validates(choice["message"]["content"], case.schema)
    num_tokens = body["usage"]["completion_tokens"]
    return Asked(case.source, case.name, 200, choice["finish_reason"], is_valid, "", num_tokens)


def _reason(error: dict[str, object]) -> str:
    """Return the keyword that a refusal is about, or its message without what differs from schema to schema."""
    _, _, path = str(error["param"]).partition(".schema.")
    return path.rpartition(".")[2] or str(error["message"]).partition("' ")[2][:80]


def _validates(text: str, schema: Schema) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError):
        return False
    except Unresolvable:  # a server took a schema that refers to others: nobody can say, so it has the doubt's benefit
        return True
    return True


# --- pairs ----------------------------------------------------------------------------------------------------


async def ask_pairs(url: str, model: str, count: int) -> list[Pair]:
    """Time pairs of streams; which of the two is the first alternates. The first pair of all warms up."""
    pairs = []
    async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
        for number in range(-1, count):
            sides = [None, _long_schema(number)]
            timed = {}
            for side in (0, 1) if number % 2 else (1, 0):
                body = _timed_body(model, sides[side], number)
                timed[side] = await time_stream(client, f"{url}/chat/completions", body, _PAIR_TOKENS)
            if number >= 0:
                pairs.append(Pair((timed[0].ttft_s, timed[1].ttft_s), (timed[0].gaps_s, timed[1].gaps_s)))
    return pairs


def _timed_body(model: str, schema: Schema | None, number: int) -> dict[str, object]:
    # Log-probabilities make an event of every token.
    salt = f"pair {number}, {'bound' if schema else 'free'}"  # neither finds the other's prompt
    return _body(model, schema, seed=number, logprobs=True, cache_salt=salt)


def _long_schema(number: int) -> Schema:
    """A schema that no request has come with, whose answers have no end within the tokens of a pair."""
    person = {
        "type": "object",
        "properties": {
            f"name{number}": {"type": "string", "maxLength": 30},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
        },
        "required": [f"name{number}", "age", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": person, "minItems": 100}
