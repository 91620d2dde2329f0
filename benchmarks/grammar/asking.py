"""What is asked, and what came back: a schema's answer with its verdict, or a pair of streams with their times."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import httpx
import jsonschema
from referencing.exceptions import Unresolvable

from kvferry.benchmarks.grammar.schemas import Case, Schema

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
    gaps_s: tuple[tuple[float, ...], tuple[float, ...]]  # between tokens

    def tpot_s(self, side: int) -> float:
        return sum(self.gaps_s[side]) / len(self.gaps_s[side])


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
                timed[side] = await time_stream(client, url, _timed_body(model, sides[side], number))
            if number >= 0:
                pairs.append(Pair((timed[0][0], timed[1][0]), (timed[0][1], timed[1][1])))
    return pairs


def _timed_body(model: str, schema: Schema | None, number: int) -> dict[str, object]:
    # Log-probabilities make an event of every token.
    salt = f"pair {number}, {'bound' if schema else 'free'}"  # neither finds the other's prompt
    fields = {"stream": True, "ignore_eos": True, "seed": number, "logprobs": True, "cache_salt": salt}
    return _body(model, schema, max_tokens=_PAIR_TOKENS, **fields)


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


async def time_stream(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> tuple[float, tuple[float, ...]]:
    """Return the seconds to the first token, and those between tokens, to the microsecond."""
    began = time.perf_counter()
    times: list[float] = []
    async with client.stream("POST", f"{url}/chat/completions", json=body) as stream:
        if stream.status_code != 200:
            raise RuntimeError(f"{stream.status_code}: {(await stream.aread()).decode()}")
        async for line in stream.aiter_lines():
            if '"logprobs":{' in line.replace(" ", ""):
                times.append(time.perf_counter())
    return round(times[0] - began, 6), tuple(round(after - before, 6) for before, after in pairwise(times))
