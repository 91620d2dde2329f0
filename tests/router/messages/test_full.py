"""A full context is told in the words by which Anthropic's clients find its numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kvferry.common.errors import RequestError
from kvferry.router.messages.full import full_context

from ..fakes import MAX_MODEL_LEN, MODEL, Script, serve
from ..fleet import SPEC, Fleet, config

# As Claude Code reads them.
ASKS_TOO_MUCH = re.compile(r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)")
IS_TOO_LONG = re.compile(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)")


async def _refused(text: str, max_tokens: int) -> str:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": max_tokens, "messages": [{"role": "user", "content": text}]}
    async with serve(Script()).client() as client:
        response = await client.post("/v1/messages", json=body)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
    message = response.json()["error"]["message"]
    assert isinstance(message, str)
    return message


async def test_an_answer_that_does_not_fit_is_told_with_what_would() -> None:
    found = ASKS_TOO_MUCH.search(await _refused("hi", 32000))
    assert found is not None
    prompt, asked, limit = map(int, found.groups())
    assert (asked, limit) == (32000, MAX_MODEL_LEN) and 0 < prompt < 100


@pytest.mark.parametrize("num_chars", [MAX_MODEL_LEN, 100_000])  # the second is not even tokenized
async def test_a_prompt_that_leaves_no_room_is_too_long(num_chars: int) -> None:
    found = IS_TOO_LONG.search(await _refused("x" * num_chars, 16))
    assert found is not None and int(found[1]) > int(found[2]) == MAX_MODEL_LEN - 1


def test_what_workers_cannot_hold_is_told_alike() -> None:
    fleet = Fleet(config(expect_prefill=False))
    fleet.join("d-0", num_blocks=4)
    limit = 4 * SPEC.block_size
    with pytest.raises(RequestError) as caught:
        fleet.submit(10, max_tokens=limit)
    found = ASKS_TOO_MUCH.search(full_context(str(caught.value)))
    assert found is not None and tuple(map(int, found.groups())) == (10, limit, limit)
    with pytest.raises(RequestError) as caught:
        fleet.submit(limit)
    assert IS_TOO_LONG.search(full_context(str(caught.value)))
