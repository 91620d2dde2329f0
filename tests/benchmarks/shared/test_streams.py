"""A stream is the whole answer and has times, or it raises and has none."""

from __future__ import annotations

import httpx
import pytest

from kvferry.benchmarks.shared.streams import Cut, read_stream, time_stream

from ..scripted_server import DONE, Script, chat_chunk, event, scripted_server, text_chunk, usage

WORDS = [text_chunk("a"), text_chunk("b"), text_chunk("c", finish_reason="length")]


async def _timed(*pieces: bytes, status: int = 200, num_tokens: int = 3) -> list[float]:
    async with scripted_server(lambda request: Script(pieces, status)) as server:
        async with httpx.AsyncClient(base_url=server.base_url, trust_env=False) as client:
            answer = await time_stream(client, "/v1/completions", {"prompt": "x"}, num_tokens)
            body = server.requests[0].body
    assert body["stream"] and body["ignore_eos"] and body["max_tokens"] == num_tokens
    assert answer.ttft_s > 0 and answer.tpot_s == pytest.approx(sum(answer.gaps_s) / (num_tokens - 1))
    return list(answer.gaps_s)


async def test_a_whole_answer_is_timed_between_its_tokens_alone() -> None:
    beginning = chat_chunk(role="assistant", content="")
    assert len(await _timed(beginning, *WORDS, usage(5, 3), DONE)) == 2


async def test_tokens_that_come_together_are_still_counted() -> None:
    assert len(await _timed(text_chunk("a"), text_chunk("b" * 9, finish_reason="length"), usage(5, 30), DONE,
                            num_tokens=30)) == 1  # fmt: skip


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([*WORDS[:2], event(error={"message": "worker_lost"})], "error event: worker_lost"),
        ([*WORDS[:2], event(error={"message": "worker_lost"}), DONE], "error event: worker_lost"),
        ([*WORDS[:2], event(object="error", message="worker_lost"), DONE], "error event: worker_lost"),
        ([*WORDS, usage(5, 3)], "no .DONE."),
        ([*WORDS[:2], usage(5, 3), DONE], "finish_reason None"),
        ([*WORDS[:2], text_chunk("", finish_reason="error"), usage(5, 3), DONE], "finish_reason 'error'"),
        ([*WORDS[:1], text_chunk("b", finish_reason="stop"), usage(5, 2), DONE], "2 tokens by usage instead of 3"),
        ([*WORDS, DONE], "None tokens by usage instead of 3"),
        ([text_chunk("abc", finish_reason="length"), usage(5, 3), DONE], "3 tokens came in 1 chunks"),
        ([text_chunk("", finish_reason="length"), usage(5, 3), DONE], "3 tokens came in 0 chunks"),
        ([b"data: {\n\n"], "unreadable event"),
    ],
)
async def test_a_stream_that_is_not_the_whole_answer_has_no_time(pieces: list[bytes], told: str) -> None:
    with pytest.raises(Cut, match=told):
        await _timed(*pieces)


async def test_a_refusal_is_told_with_its_words() -> None:
    with pytest.raises(Cut, match="429 full"):
        await _timed(b"full", status=429)


async def test_a_connection_is_used_again_after_a_whole_answer() -> None:
    async with scripted_server(lambda request: Script([*WORDS, usage(5, 3), DONE])) as server:
        async with httpx.AsyncClient(base_url=server.base_url, trust_env=False) as client:
            for _ in range(3):
                texts = [choice.text async for choice in read_stream(client, "/v1/completions", {}, 3)]
                assert texts == ["a", "b", "c"]
        assert server.num_connections == 1
