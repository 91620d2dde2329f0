"""Chats that are told in another way: each text once, and only where the template itself has refused them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest

from kvferry.common.errors import RequestError
from kvferry.models.chat_template import TOO_LARGE, overrun_error
from kvferry.router.turns.rendering import rendered
from kvferry.router.turns.told import told_in_text, told_in_turns, told_singly

Fields = Mapping[str, object]
BETWEEN = {"role": "assistant", "content": "Done."}


def _call(call_id: str = "a") -> dict[str, object]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {}}}


def _calling(*call_ids: str, **fields: object) -> Fields:
    return {"role": "assistant", "content": "", "tool_calls": [_call(each) for each in call_ids or ("a",)], **fields}


def _merged_by_pairs(messages: Sequence[Fields]) -> list[Fields]:
    """Merge two neighbours after the other: as slow as it is plain."""
    told: list[Fields] = []
    for message in messages:
        last = told[-1] if told else {"role": ""}
        if message["role"] == "user" and (last["role"] == "tool" or "tool_calls" in last):
            told += [BETWEEN, message]
        elif message["role"] == last["role"] != "tool" and "tool_calls" not in last:
            names = [name for name in ("content", "reasoning_content") if name in last or name in message]
            texts = {name: "\n\n".join(str(each[name]) for each in (last, message) if each.get(name)) for name in names}
            told[-1] = {**message, **texts}
        else:
            told.append(message)
    return told


@pytest.mark.parametrize("seed", range(200))
def test_neighbours_of_one_role_are_told_as_one(seed: int) -> None:
    rng = random.Random(seed)
    texts = ("", "a", "b c", "\n")
    kinds: list[Fields] = [
        {"role": "user", "content": rng.choice(texts)},
        {"role": "user", "content": rng.choice(texts), "name": "n"},
        {"role": "assistant", "content": rng.choice(texts)},
        {"role": "assistant", "content": rng.choice(texts), "reasoning_content": rng.choice(texts)},
        _calling(content=rng.choice(texts)),
        {"role": "tool", "content": rng.choice(texts), "tool_call_id": "a"},
        {"role": "system", "content": rng.choice(texts)},
    ]
    messages = rng.choices(kinds, k=rng.randint(0, 12))
    merged = _merged_by_pairs(messages)
    assert told_in_turns(messages) == (None if merged == messages else merged)


def test_the_results_of_a_turn_and_what_the_user_says_to_them_are_one_message() -> None:
    results: list[Fields] = [{"role": "tool", "content": str(at)} for at in range(100)]
    said: Fields = {"role": "user", "content": "so?"}
    told = told_in_text([said, _calling(), *results, said, said, _calling(), results[0]], [])
    assert [message["role"] for message in told] == ["user", "assistant", "user", "user", "assistant", "user"]
    written = [f"<tool_response>\n{at}\n</tool_response>" for at in range(100)]
    assert told[2]["content"] == "\n".join([*written, "so?"]) and told[3]["content"] == "so?"
    assert told[5]["content"] == written[0]


def test_each_call_has_its_own_results() -> None:
    results: list[Fields] = [{"role": "tool", "content": str(at), "tool_call_id": "ab"[at % 2]} for at in range(6)]
    told = told_singly([_calling("a", "b", "c"), *results, {"role": "tool", "content": "x", "tool_call_id": "d"}])
    assert [message["content"] for message in told] == ["", "0", "2", "4", "", "1", "3", "5", "", "x"]


CHATS: dict[str, list[Fields]] = {
    "roles that take no turns": [{"role": "user", "content": "a"}] * 3,
    "a later system message": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
    "several calls": [{"role": "user", "content": "a"}, _calling("a", "b")],
    "arguments that are an object": [{"role": "user", "content": "a"}, _calling()],
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    ("error", "is_told_again"),
    [
        (RequestError("roles must alternate", param="messages"), True),
        (RequestError("more than 8388608 characters", param="messages", code=TOO_LARGE), False),
        (overrun_error("took more than 5 s", is_size=False), False),
        (overrun_error("would have more than 16777216 characters", is_size=True), False),
    ],
)
async def test_only_what_the_template_itself_refuses_is_told_in_another_way(
    chat: str, error: RequestError, is_told_again: bool
) -> None:
    tried: list[Sequence[Fields]] = []

    async def render(messages: Sequence[Fields]) -> str:
        tried.append(messages)
        raise error

    with pytest.raises(RequestError) as caught:
        await rendered(render, CHATS[chat], True)
    assert caught.value is error and (len(tried) > 1) == is_told_again
