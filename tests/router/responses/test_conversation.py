"""A conversation as it is kept: what is not whole is none, and files of the earlier format go on."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from kvferry.router.responses.conversation import Conversation, joined_arrays

WHOLE = Conversation(b'[{"id":"msg_1"}]', b'[{"role":"user","content":"a"}]', b"{}", b'{"id":"resp_1"}', b"[1]", b"k")


def test_parts_are_found_again_and_what_is_cut_or_longer_is_none() -> None:
    data = WHOLE.joined()
    assert Conversation.parted(memoryview(data)) == WHOLE
    for end in range(len(data)):
        assert Conversation.parted(memoryview(data[:end])) is None
    assert Conversation.parted(memoryview(data + b" ")) is None


@pytest.mark.parametrize("form", [b"kvr0", b"kvr4", b"\0\0\0\0"])
def test_another_format_is_none(form: bytes) -> None:
    assert Conversation.parted(memoryview(form + WHOLE.joined()[4:])) is None


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(WHOLE)])
def test_a_part_that_is_damaged_is_none_to_who_looks_at_it(name: str) -> None:
    part, others = bytes(getattr(WHOLE, name)), {field.name for field in dataclasses.fields(WHOLE)} - {name}
    before = b"".join(bytes(getattr(WHOLE, field.name)) for field in dataclasses.fields(WHOLE)).index(part)
    data = WHOLE.joined()
    at = len(data) - sum(len(getattr(WHOLE, field.name)) for field in dataclasses.fields(WHOLE)) + before
    assert data[at : at + len(part)] == part
    for number in range(len(part)):
        damaged = memoryview(data[: at + number] + bytes(1) + data[at + number + 1 :])
        assert Conversation.parted(damaged) is None and Conversation.parted(damaged, {name}) is None
        found = Conversation.parted(damaged, others)
        assert found is not None and all(getattr(found, other) == getattr(WHOLE, other) for other in others)


def test_a_conversation_of_the_format_without_checksums_goes_on() -> None:
    parts = (WHOLE.items, WHOLE.messages, WHOLE.names, WHOLE.response, WHOLE.input, WHOLE.answer)
    data = b"kvr2" + struct.pack("<6I", *map(len, parts)) + b"".join(map(bytes, parts))
    assert Conversation.parted(memoryview(data)) == WHOLE


def test_a_conversation_of_the_earlier_format_goes_on() -> None:
    parts = (WHOLE.items, WHOLE.messages, WHOLE.names, WHOLE.response)
    data = b"kvr1" + struct.pack("<4I", *map(len, parts)) + b"".join(map(bytes, parts))
    found = Conversation.parted(memoryview(data))
    assert found is not None
    told = found.told("previous_response_id")
    assert (told.messages, told.names, told.items) == ([{"role": "user", "content": "a"}], {}, b'[{"id":"msg_1"}]')
    assert (found.response, found.asked.answer) == (WHOLE.response, "")


def test_arrays_are_joined() -> None:
    assert joined_arrays(b"[]", b"[]") == b"[]"
    assert joined_arrays(b"[1,2]", b"[]", memoryview(b"[3]")) == b"[1,2,3]"
