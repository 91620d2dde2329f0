"""A conversation as it is kept: what is not whole is none, and files of the earlier format go on."""

from __future__ import annotations

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


@pytest.mark.parametrize("form", [b"kvr0", b"kvr3", b"\0\0\0\0"])
def test_another_format_is_none(form: bytes) -> None:
    assert Conversation.parted(memoryview(form + WHOLE.joined()[4:])) is None


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
