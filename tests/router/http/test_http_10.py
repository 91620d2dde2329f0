"""Clients of HTTP/1.0, as ApacheBench and older proxies: they know no chunks, and a body ends with its connection."""

from __future__ import annotations

import json

import pytest

from ..fakes import Script
from .test_leaving import site

TEXT = "Hello, wide world."


async def _ask(path: str, body: dict[str, object] | None, *headers: str) -> tuple[str, bytes]:
    """Return the head and the body of what comes until the server closes."""
    data = b"" if body is None else json.dumps(body).encode()
    head = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.0", "host: localhost", *headers]
    head += ["content-type: application/json"]
    async with site(Script(TEXT)) as there:
        client = await there.connect()
        client.writer.write("\r\n".join([*head, f"content-length: {len(data)}", "", ""]).encode() + data)
        got = await client.rest()
    head_bytes, _, rest = got.partition(b"\r\n\r\n")
    return head_bytes.decode().lower(), rest


@pytest.mark.parametrize("headers", [(), ("connection: keep-alive",), ("expect: 100-continue",)])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_has_no_frames(path: str, headers: tuple[str, ...]) -> None:
    asked = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    head, body = await _ask(path, {**asked, "max_tokens": 50, "stream": True}, *headers)
    assert head.startswith("http/1.1 200") and "transfer-encoding" not in head and "connection: close" in head
    *events, end = body.decode().split("\n\n")
    assert end == "" and events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    texts = [choice.get("text", choice.get("delta", {}).get("content")) or "" for choice in choices]
    assert "".join(texts) == TEXT and len(texts) > 2


async def test_an_answer_whose_length_is_told_is_as_ever() -> None:
    head, body = await _ask("/live", None)
    assert f"content-length: {len(body)}" in head and json.loads(body) == {"status": "live"}
