from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvferry.tools.load.endpoint import Endpoint, EndpointName, RequestRecord

from ...benchmarks.scripted_server import (
    DONE,
    Script,
    answer,
    chat_chunk,
    event,
    prompt_chunk,
    scripted_server,
    text_chunk,
    usage,
)


async def ask(script: Script, *, num_tokens: int = 8, name: EndpointName = "completions") -> RequestRecord:
    async with scripted_server(lambda _: script) as server:
        endpoint = Endpoint(server.base_url, model="m", name=name, timeout_s=30)
        record = await endpoint.send([1, 2, 3], num_tokens, index=4)
        endpoint.close()
        return record


async def ask_stream(pieces: Sequence[bytes], name: EndpointName = "completions") -> RequestRecord:
    return await ask(Script(pieces), name=name)


async def test_every_chunk_has_its_time_and_its_tokens() -> None:
    pieces = [text_chunk("a", token_ids=[1]), text_chunk("bc", token_ids=[2, 3]), text_chunk("d", token_ids=[4])]
    record = await ask_stream([*pieces, usage(3, 4), DONE])
    assert record.is_ok
    assert (record.index, record.status, record.counted_by) == (4, 200, "token_ids")
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 4)
    assert record.chunk_tokens == [1, 2, 1]
    assert record.chunk_times_s == sorted(record.chunk_times_s)
    assert record.finished_s is not None
    assert record.sent_s < record.chunk_times_s[0] <= record.chunk_times_s[-1] <= record.finished_s
    assert record.ttft_s == record.chunk_times_s[0] - record.sent_s


async def test_without_token_ids_usage_settles_how_many_tokens_the_chunks_held() -> None:
    record = await ask_stream(
        [text_chunk("a"), text_chunk(" b c d"), text_chunk("", finish_reason="stop"), usage(3, 6), DONE]
    )
    assert (record.counted_by, record.num_output_tokens, record.chunk_tokens) == ("usage", 6, [1, 1])


async def test_without_token_ids_and_usage_each_chunk_is_a_token() -> None:
    record = await ask_stream([text_chunk("a"), text_chunk(""), text_chunk("b", finish_reason="length"), DONE])
    assert (record.counted_by, record.num_output_tokens) == ("chunks", 3)


async def test_what_is_said_of_the_prompt_is_no_token() -> None:
    record = await ask(Script([prompt_chunk(5), text_chunk("a", token_ids=[1], finish_reason="length"), DONE]))
    assert (record.chunk_tokens, record.num_output_tokens, record.tpot_s) == ([1], 1, None)
    alone = await ask(Script([prompt_chunk(5), DONE]))
    assert alone.error == "stream without a token"


async def test_usage_is_believed_where_there_are_not_as_many_token_ids() -> None:
    pieces = [text_chunk("a", token_ids=[1]), text_chunk("b", token_ids=[2, 3])]
    record = await ask_stream([*pieces, usage(3, 2), DONE])
    assert (record.chunk_tokens, record.num_output_tokens) == ([1, 2], 2)
    assert (record.counted_by, record.ids_differ) == ("usage", True)
    for end in (usage(3, 3), usage(3, 0)):
        record = await ask_stream([*pieces, end, DONE])
        assert (record.counted_by, record.ids_differ, record.num_output_tokens) == ("token_ids", False, 3)


async def test_nulls_are_as_good_as_nothing() -> None:
    null_usage = {"prompt_tokens": None, "completion_tokens": None, "completion_tokens_details": None}
    details = {
        "prompt_tokens_details": {"cached_tokens": None},
        "completion_tokens_details": {"reasoning_tokens": None},
    }
    pieces = [event(choices=None), text_chunk("a"), event(choices=None, usage=null_usage), event(usage=details), DONE]
    record = await ask_stream(pieces)
    assert (record.error, record.chunk_tokens, record.counted_by) == (None, [1], "chunks")
    assert (record.num_output_tokens, record.num_prompt_tokens, record.num_cached_tokens) == (1, 0, 0)


async def test_chunk_that_says_nothing_is_no_token() -> None:
    keep_alive, half_character = chat_chunk(), chat_chunk(content="")
    pieces = [keep_alive, chat_chunk(content="a"), keep_alive, half_character, event(choices=[{"index": 0}]), DONE]
    record = await ask_stream(pieces, "chat")
    assert (record.error, record.chunk_tokens) == (None, [1, 1])


async def test_calls_are_tokens() -> None:
    call = {"index": 0, "function": {"arguments": "{"}}
    pieces = [chat_chunk(role="assistant", tool_calls=[call]), chat_chunk(tool_calls=[call]), DONE]
    record = await ask_stream(pieces, "chat")
    assert (record.error, record.chunk_tokens) == (None, [1, 1])


async def test_hidden_thoughts_are_counted_and_not_in_the_time_of_a_token() -> None:
    seen = [chat_chunk(role="assistant", content=""), chat_chunk(content="a"), chat_chunk(content="b")]
    record = await ask_stream([*seen, usage(9, 52, num_thoughts=50), DONE], "chat")
    assert (record.num_output_tokens, record.num_hidden_tokens) == (52, 50)
    assert record.tpot_s == record.chunk_times_s[1] - record.chunk_times_s[0]


@pytest.mark.parametrize(
    "pieces",
    [
        [chat_chunk(reasoning_content="hm"), chat_chunk(content="a"), usage(9, 52, num_thoughts=50)],
        [chat_chunk(reasoning="hm"), chat_chunk(content="a"), usage(9, 52, num_thoughts=50)],
        [chat_chunk(content=[{"type": "thinking"}]), chat_chunk(content="a"), usage(9, 52, num_thoughts=50)],
        [text_chunk("hm"), text_chunk("a"), usage(9, 52, num_thoughts=50)],
        # Within a text of many tokens a chunk: fewer were seen than would be left.
        [chat_chunk(content="<think>hm</think>"), chat_chunk(content="a"), usage(9, 100, num_thoughts=60)],
        # Counted beside the answer: more was seen than would be left.
        [chat_chunk(content="a"), chat_chunk(content="b"), usage(9, 2, num_thoughts=50)],
    ],
)
async def test_thoughts_that_are_shown_or_counted_elsewhere_are_not_hidden(pieces: Sequence[bytes]) -> None:
    record = await ask_stream([*pieces, DONE], "chat")
    assert (record.error, record.num_hidden_tokens) == (None, 0)


async def test_chat_chunk_that_only_names_the_role_is_no_first_token() -> None:
    record = await ask_stream(
        [chat_chunk(role="assistant", content=""), chat_chunk(content="hi"), usage(9, 1), DONE], "chat"
    )
    assert (record.chunk_tokens, record.num_output_tokens, record.is_ok) == ([1], 1, True)


@pytest.mark.parametrize(
    "chunk", [chat_chunk(refusal="no"), chat_chunk(function_call={"name": "f"}), chat_chunk(tool_calls=[{"index": 0}])]
)
async def test_refusals_and_calls_are_tokens(chunk: bytes) -> None:
    record = await ask_stream([chat_chunk(role="assistant", content=""), chunk, chunk, DONE], "chat")
    assert (record.error, record.chunk_tokens) == (None, [1, 1])


@pytest.mark.parametrize("name", ["content", "reasoning_content", "reasoning"])
async def test_thoughts_are_tokens_where_every_chunk_names_the_role(name: str) -> None:
    thought = chat_chunk(role="assistant", **{"content": "", name: "hm"})
    answered = chat_chunk(role="assistant", content="yes")
    record = await ask_stream([chat_chunk(role="assistant", content=""), thought, thought, answered, DONE], "chat")
    assert (record.error, record.chunk_tokens, record.num_output_tokens) == (None, [1, 1, 1], 3)


async def test_content_may_be_a_list_of_parts() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]
    record = await ask_stream([chat_chunk(role="assistant", content=parts), chat_chunk(content="yes"), DONE], "chat")
    assert (record.error, record.chunk_tokens) == (None, [1, 1])


async def test_one_token_without_text_came_with_the_end() -> None:
    pieces = [chat_chunk(role="assistant", content=""), chat_chunk(finish_reason="length"), usage(9, 1), DONE]
    record = await ask_stream(pieces, "chat")
    assert (record.error, record.chunk_tokens, record.num_output_tokens) == (None, [1], 1)
    assert record.tpot_s is None


async def test_tokens_that_no_chunk_held_are_no_answer() -> None:
    pieces = [chat_chunk(role="assistant", content=""), chat_chunk(finish_reason="length"), usage(9, 64), DONE]
    record = await ask_stream(pieces, "chat")
    assert record.error == "stream without a token, of which its usage counts 64"
    assert (record.ttft_s, record.tpot_s) == (None, None)


async def test_several_events_in_one_piece_and_one_event_in_several_are_read_alike() -> None:
    stream = b"".join(answer(4))
    whole = await ask_stream([stream])
    single_bytes = await ask_stream([stream[at : at + 1] for at in range(len(stream))])
    assert whole.chunk_tokens == single_bytes.chunk_tokens == [1, 1, 1, 1]


async def test_connections_are_kept_and_fields_are_sent() -> None:
    async with scripted_server(lambda _: Script(answer(2))) as server:
        endpoint = Endpoint(f"{server.base_url}/v1", model="m", api_key="secret", ignore_eos=True, temperature=0.5)
        await endpoint.send([1, 2], 7)
        await endpoint.send("text", 7)
        endpoint.close()
    first, second = server.requests
    assert server.num_connections == 1
    assert (first.method, first.path, first.headers["authorization"]) == ("POST", "/v1/completions", "bearer secret")
    assert first.body == {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.5,
        "return_token_ids": True,
    }
    assert second.body["prompt"] == "text"


async def test_record_tells_that_it_was_sent_anew() -> None:
    scripts = iter([Script(answer(1)), Script([], raw=b""), Script(answer(1))])
    async with scripted_server(lambda _: next(scripts)) as server:
        endpoint = Endpoint(server.base_url, model="m")
        records = [await endpoint.send([1], 1) for _ in range(2)]
        endpoint.close()
    assert [(record.error, record.num_resent) for record in records] == [(None, 0), (None, 1)]


async def test_chat_sends_the_prompt_as_a_user_message() -> None:
    async with scripted_server(lambda _: Script([chat_chunk(content="x"), DONE])) as server:
        endpoint = Endpoint(server.base_url, model="m", name="chat", return_token_ids=False)
        await endpoint.send("hello", 3)
        endpoint.close()
    assert server.requests[0].path == "/v1/chat/completions"
    assert server.requests[0].body["messages"] == [{"role": "user", "content": "hello"}]
    assert "return_token_ids" not in server.requests[0].body


FAILURES = {
    "http error": (
        Script([b'{"error": {"message": "queue is full", "code": 429}}'], status=429),
        "HTTP 429: queue is full",
    ),
    "http error that is no json": (Script([b"Bad gateway"], status=502), "HTTP 502: Bad gateway"),
    "error event": (
        Script([*answer(2)[:2], event(error={"message": "worker lost", "code": 500}), DONE]),
        "error event: worker lost",
    ),
    "error object": (Script([event(object="error", message="too long"), DONE]), "error event: too long"),
    "cut inside the body": (Script(answer(3)[:2], is_cut=True), "connection closed before the end"),
    "clean end without done": (Script(answer(3)[:3]), r"ended without \[DONE\] after 2 tokens"),
    "event that is no json": (Script([b"data: {oops\n\n", DONE]), "unreadable event"),
    "nothing but done": (Script([DONE]), "without a token"),
    "finish reason of an error": (Script([text_chunk("a", finish_reason="error"), DONE]), "finish_reason 'error'"),
}


@pytest.mark.parametrize(("script", "message"), FAILURES.values(), ids=FAILURES.keys())
async def test_answer_that_is_not_whole_is_a_failure_with_its_reason(script: Script, message: str) -> None:
    record = await ask(script)
    assert not record.is_ok
    assert record.finished_s is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(record.error)


async def test_tokens_before_a_failure_are_kept() -> None:
    record = await ask(Script(answer(3)[:3], is_cut=True))
    assert record.chunk_tokens == [1, 1]


async def test_answer_without_end_fails_when_its_time_is_over() -> None:
    async with scripted_server(lambda _: Script(answer(1)[:1], is_stuck=True)) as server:
        endpoint = Endpoint(server.base_url, model="m", timeout_s=0.05)
        record = await endpoint.send([1], 5)
        endpoint.close()
    assert record.error == "no end of the answer within 0.05 s"


async def test_server_that_is_down_is_a_failed_request() -> None:
    record = await Endpoint("http://127.0.0.1:1", model="m").send([1], 5)
    assert record.error is not None
    assert record.error.startswith("cannot connect to 127.0.0.1:1")


def test_gaps_of_a_chunk_with_several_tokens_are_zero_inside_it() -> None:
    record = RequestRecord(0, 0.0, 6, chunk_times_s=[1.0, 1.5, 3.5], chunk_tokens=[2, 1, 3], num_output_tokens=6)
    assert record.token_gaps_s() == [0.0, 0.5, 2.0, 0.0, 0.0]
    assert record.chunk_gaps_s() == [0.5, 2.0]
    assert record.tpot_s == 0.5


def test_answer_of_one_token_has_no_tpot() -> None:
    record = RequestRecord(0, 0.0, 1, chunk_times_s=[1.0], chunk_tokens=[1], num_output_tokens=1)
    assert record.tpot_s is None
    assert record.token_gaps_s() == []
