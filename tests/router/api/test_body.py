"""Reading and parsing a request's body: bounds, deadlines, and JSON without its usual loopholes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message

from kvferry.common.errors import CapacityError, RequestError
from kvferry.router.api.body import BodyRoom, ClientGone, read_body
from kvferry.router.helpers.strict_json import parse_json


def _request(parts: list[bytes], headers: dict[str, str] | None = None, *, gone: bool = False) -> Request:
    """A request whose body comes in `parts`, and then not at all, unless the last part ends it."""
    headers = {"content-type": "application/json", **(headers or {})}

    async def messages() -> AsyncIterator[Message]:
        for index, part in enumerate(parts):
            yield {"type": "http.request", "body": part, "more_body": index < len(parts) - 1 or gone}
        if gone:
            yield {"type": "http.disconnect"}
        await asyncio.Event().wait()

    source = messages()
    scope = {"type": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    return Request(scope, lambda: anext(source))


async def _read(request: Request, room: BodyRoom | None = None, **limits: float) -> bytes:
    with (room or BodyRoom()).held() as held:
        return await read_body(dict(request.scope["headers"]), request.receive, held, **limits)  # type: ignore[arg-type]


async def test_a_body_is_read_in_parts() -> None:
    assert await _read(_request([b"ab", b"cd"])) == b"abcd"


async def test_a_declared_length_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(RequestError, match="11") as caught:
        await _read(_request([], {"content-length": "11"}), max_bytes=10)
    assert caught.value.status == 413


async def test_a_body_of_undeclared_length_is_refused_at_the_limit() -> None:
    with pytest.raises(RequestError, match="more than 10 bytes") as caught:
        await _read(_request([b"12345", b"67890", b"1", b""]), max_bytes=10)
    assert caught.value.status == 413


async def test_the_bodies_of_all_calls_share_one_room_and_give_it_back() -> None:
    room = BodyRoom(10)
    with room.held() as held:
        request = _request([b"123", b"456"])
        assert await read_body(dict(request.scope["headers"]), request.receive, held) == b"123456"
        assert room.num_bytes == 6
        with pytest.raises(CapacityError, match="6 bytes already") as caught:
            await _read(_request([b"12345"]), room)
        assert caught.value.status == 503
        assert await _read(_request([b"1234"]), room) == b"1234"
    assert room.num_bytes == 0


async def test_a_body_that_does_not_come_is_a_timeout() -> None:
    with pytest.raises(RequestError, match="did not arrive") as caught:
        await _read(_stuck(), timeout_s=0.01)
    assert caught.value.status == 408


def _stuck() -> Request:
    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, never)


async def test_a_client_that_leaves_in_the_body_is_no_error_of_ours() -> None:
    with pytest.raises(ClientGone):
        await _read(_request([b"ab"], gone=True))


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_other_content_types_are_refused(kind: str) -> None:
    with pytest.raises(RequestError, match="application/json") as caught:
        await _read(_request([b"{}"], {"content-type": kind}))
    assert caught.value.status == 415


async def test_a_body_in_a_coding_beside_chunks_is_refused_by_its_name() -> None:
    assert await _read(_request([b"{}"], {"transfer-encoding": "Chunked"})) == b"{}"
    with pytest.raises(RequestError, match="Transfer-Encoding: 'gzip, chunked'") as caught:
        await _read(_request([b"\x1f\x8b"], {"transfer-encoding": "gzip, chunked"}))
    assert caught.value.status == 501


async def test_a_charset_may_stand_behind_the_content_type() -> None:
    assert await _read(_request([b"{}"], {"content-type": "Application/JSON; charset=utf-8"})) == b"{}"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a": 1', "line 1 column"),
        (b'{"a": \xff}', "not UTF-8 at byte 6"),
        (b'{"a": NaN}', "'NaN' is not a number that JSON has at line 1 column 7"),
        (b'{"a":\n -Infinity}', "'-Infinity' is not a number that JSON has at line 2 column 2"),
        (b'{"a": 1e999}', "'1e999' is not a number"),
        (b'{"a": %s}' % (b"1" * 5000), "is not a number"),
        (b'{"a": [1, 18446744073709551616]}', "'18446744073709551616' is a whole number of more than 64 bits at"),
        (b'{"a": -9223372036854775809}', "is a whole number of more than 64 bits"),
        (b'{"a": 1, "b": {"a": 2}, "a": 3}', "the key 'a' stands twice in one object at line 1 column 25"),
        (b'{"a": {"b": 1, "\\u0062": 2}}', "the key 'b' stands twice in one object"),
        (b'{"a": "\\ud800"}', "a lone surrogate in a string at line 1 column 7"),
        (b'{"\\udc00": 1}', "a lone surrogate in a string at line 1 column 2"),
        (b'{"a": %s}' % (b"[" * 100_000 + b"]" * 100_000), "nesting deeper than 32 at line 1 column 38"),
        (b"[1]", "must be an object"),
        (b"null", "must be an object"),
        (b"", "line 1 column 1"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "line 1 column 1"),
        (b'\xef\xbb\xbf{"a": \xff}', "not UTF-8 at byte 9"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1} x', "line 1 column 10"),
        (b'{"a": "\x01"}', "line 1 column 8"),
    ],
)
def test_what_json_parsers_let_pass_is_refused_with_its_position(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"
    assert message in str(caught.value)


def test_escaped_surrogate_pairs_and_escaped_backslashes_are_fine() -> None:
    body = rb'{"a": "\ud83d\ude00", "b": "\\ud800", "c": {"a": 1}}'
    assert parse_json(body) == {"a": "\U0001f600", "b": "\\ud800", "c": {"a": 1}}


def test_a_byte_order_mark_may_stand_before_a_body() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf"}') == {"a": "\ufeff"}


def test_whole_numbers_have_sixty_four_bits() -> None:
    body = b'{"a": [18446744073709551615, -9223372036854775808, 0, -1]}'
    assert parse_json(body) == {"a": [2**64 - 1, -(2**63), 0, -1]}


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_values_without_bytes_to_speak_of_are_bounded_in_number() -> None:
    with pytest.raises(RequestError, match="more than 99 commas") as caught:
        parse_json(b'{"prompt": [' + b"1," * 100 + b"1]}", max_commas=99)
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")
    assert len(parse_json(b'{"prompt": [' + b"1," * 99 + b"1]}", max_commas=99)["prompt"]) == 100  # type: ignore[arg-type]


@pytest.mark.slow
@given(st.dictionaries(st.text(), _values, max_size=4), st.booleans())
def test_sound_json_is_what_it_was(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=60) | st.text('{}[]",:\\u0d8aNIe1-', max_size=40).map(str.encode))
def test_no_bytes_make_the_parser_fail_in_another_way(body: bytes) -> None:
    try:
        assert isinstance(parse_json(body), dict)
    except RequestError as error:
        assert error.status == 400
