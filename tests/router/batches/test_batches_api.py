"""The unmodified openai client's files and batches, against an application with a scripted dispatcher."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest

from kvferry.router.catalogue.version import ServedModel

from ..fakes import MODEL, VOCAB_SIZE, Script, listening, serve
from .batch_server import answers, batch_server, client_of, jsonl, line, until_ended


async def test_a_file_is_uploaded_listed_read_and_deleted(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        data = jsonl(*(line(str(number)) for number in range(20_000)))
        assert len(data) > 2**20
        uploaded = await client.files.create(file=("in.jsonl", data), purpose="batch")
        assert (uploaded.filename, uploaded.bytes, uploaded.purpose) == ("in.jsonl", len(data), "batch")
        assert uploaded.status == "processed"
        second = await client.files.create(file=b"x", purpose="batch")
        assert [each.id async for each in client.files.list()] == [second.id, uploaded.id]
        assert [each.id async for each in client.files.list(limit=1, order="asc")] == [uploaded.id, second.id]
        assert (await client.files.retrieve(uploaded.id)).bytes == len(data)
        assert (await client.files.content(uploaded.id)).content == data
        assert (await client.files.delete(uploaded.id)).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                await call(uploaded.id)


@pytest.mark.parametrize("num_bytes", [0, 1, 2**16, 2**17])
async def test_a_connection_that_has_read_a_file_takes_the_next_request(tmp_path: Path, num_bytes: int) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=b"x" * num_bytes, purpose="batch")
        reader, writer = await asyncio.open_connection(*address.split(":"))
        for _ in range(10):
            writer.write(f"GET /v1/files/{uploaded.id}/content HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200") and b"\r\ncontent-length: %d\r\n" % num_bytes in head
            assert b"\r\ncontent-disposition: attachment; filename=" in head
            assert await reader.readexactly(num_bytes) == b"x" * num_bytes
        writer.close()


async def test_lines_of_a_batch_are_no_answers_that_clients_wait_for(tmp_path: Path) -> None:
    async with batch_server(tmp_path, Script(hold_at=0)) as (served, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a"), line("b")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        await served.dispatcher.held.wait()
        async with httpx.AsyncClient() as plain:
            metrics = await plain.get(f"http://{address}/metrics")
        assert "kvferry_in_flight_requests 0.0" in metrics.text
        served.dispatcher.go.set()
        assert (await until_ended(client, batch.id)).status == "completed"


async def test_a_batch_is_answered_line_by_line_in_the_order_of_its_input(tmp_path: Path) -> None:
    script = Script(choose=lambda request: bytes(request.prompt_token_ids).decode())
    async with batch_server(tmp_path, script) as (served, address), client_of(address) as client:
        data = jsonl(*(line(f"prompt {number}") for number in range(100)))
        uploaded = await client.files.create(file=data, purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
        )
        assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
        await client.files.delete(uploaded.id)  # the batch has it
        batch = await until_ended(client, batch.id)
        assert batch.status == "completed" and batch.errors is None and batch.error_file_id is None
        assert batch.request_counts is not None
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (
            100,
            100,
            0,
        )
        stamps = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
        assert None not in stamps and list(stamps) == sorted(stamps)  # type: ignore[type-var]
        found = await answers(client, batch.output_file_id)
        assert [each["custom_id"] for each in found] == [f"prompt {number}" for number in range(100)]
        for each in found:
            assert each["error"] is None and each["response"]["status_code"] == 200
            assert each["response"]["body"]["choices"][0]["text"] == each["custom_id"]
        assert len({each["id"] for each in found}) == 100
        assert all(request.is_background for request in served.dispatcher.requests)
        assert [each.id async for each in client.batches.list(limit=1)] == [batch.id]
        assert [(each.id, each.purpose) async for each in client.files.list()] == [
            (batch.output_file_id, "batch_output")
        ]
        folder = tmp_path / "batches" / batch.id
        kept = {"batch.json", "lock"}
        for _ in range(2000):  # what is not needed any more goes after the end was told
            if {path.name for path in folder.iterdir()} != kept:
                await asyncio.sleep(0.01)
        assert {path.name for path in folder.iterdir()} == kept


async def test_chats_and_responses_are_batched_too(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        for url, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/responses", {"input": "hi"}),
        ):
            uploaded = await client.files.create(file=jsonl(line("a", url, **body)), purpose="batch")
            batch = await client.batches.create(
                input_file_id=uploaded.id,
                endpoint=url,  # type: ignore[arg-type]
                completion_window="24h",
            )
            batch = await until_ended(client, batch.id)
            (answer,) = await answers(client, batch.output_file_id)
            assert answer["response"]["status_code"] == 200


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
async def test_a_batch_tells_the_tokens_of_all_its_answers(tmp_path: Path, url: Any, body: dict[str, Any]) -> None:
    script = Script("<think>Hm.</think>Yes.", num_cached_tokens=1)
    model = ServedModel(MODEL, 4096, VOCAB_SIZE, reasoning_parser="think")
    async with batch_server(tmp_path, script, model=model) as (_, address), client_of(address) as client:
        lines = jsonl(line("a", url, **body), line("b", url, **body), line("c", url, temperature=-1, **body))
        uploaded = await client.files.create(file=lines, purpose="batch")
        batch = await client.batches.create(input_file_id=uploaded.id, endpoint=url, completion_window="24h")
        assert batch.usage is None  # nothing was counted
        batch = await until_ended(client, batch.id)
        found = [each["response"]["body"]["usage"] for each in await answers(client, batch.output_file_id)]
        assert batch.usage is not None and batch.request_counts is not None and batch.request_counts.failed == 1
        assert len(found) == 2 and batch.usage.total_tokens == sum(each["total_tokens"] for each in found) > 0
        assert batch.usage.input_tokens + batch.usage.output_tokens == batch.usage.total_tokens
        assert batch.usage.input_tokens_details.cached_tokens == 2
        assert (batch.usage.output_tokens_details.reasoning_tokens > 0) == (url != "/v1/completions")


async def test_a_batchs_responses_are_not_kept_beside_those_of_conversations(tmp_path: Path) -> None:
    """Its thousands of lines would drive out what clients go on with in the same minute."""
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a", "/v1/responses", input="hi")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/responses", completion_window="24h"
        )
        (answer,) = await answers(client, (await until_ended(client, batch.id)).output_file_id)
        response = answer["response"]["body"]
        assert response["status"] == "completed" and response["store"] is False
        with pytest.raises(openai.BadRequestError, match="is not kept here"):
            await client.responses.create(model="toy", input="more", previous_response_id=response["id"])


async def _failed(
    client: openai.AsyncOpenAI,
    data: bytes,
    endpoint: Literal["/v1/completions", "/v1/chat/completions"] = "/v1/completions",
) -> list[tuple[Any, ...]]:
    uploaded = await client.files.create(file=data, purpose="batch")
    batch = await client.batches.create(input_file_id=uploaded.id, endpoint=endpoint, completion_window="24h")
    batch = await until_ended(client, batch.id)
    assert batch.status == "failed" and batch.failed_at is not None and batch.errors is not None
    assert batch.errors.data is not None
    return [(each.line, each.code, each.param) for each in batch.errors.data]


def _spoil(path: Path, kind: str) -> None:
    """Leave something in a record's place that nobody can read, as a disk or somebody's hand may."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path.name)
        case "no text":
            path.write_bytes(b'{"id": "\xff"}')
        case "no record":
            path.write_bytes(b"{}")


@pytest.mark.parametrize("kind", ["folder", "link to itself", "no text", "no record"])
async def test_what_cannot_be_read_holds_up_no_other_batch_and_no_other_file(tmp_path: Path, kind: str) -> None:
    _spoil(tmp_path / "batches" / f"batch_{'0' * 32}" / "batch.json", kind)
    _spoil(tmp_path / "files" / f"file-{'0' * 24}.json", kind)
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await until_ended(client, batch.id)
        assert batch.status == "completed"
        assert [each.id async for each in client.batches.list()] == [batch.id]
        assert {each.id async for each in client.files.list()} == {uploaded.id, batch.output_file_id}


async def test_a_batch_whose_lock_cannot_be_taken_holds_up_no_other(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")
        call: dict[str, Any] = {
            "input_file_id": uploaded.id,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        done = await until_ended(client, (await client.batches.create(**call)).id)
        record = json.loads((tmp_path / "batches" / done.id / "batch.json").read_bytes())
        stuck = tmp_path / "batches" / f"batch_{'0' * 32}"
        (stuck / "lock").mkdir(parents=True)
        record |= {"id": stuck.name, "status": "in_progress", "created_ns": 0}
        (stuck / "batch.json").write_text(json.dumps(record))
        later = await client.batches.create(**call)
        assert (await until_ended(client, later.id)).status == "completed"


async def test_an_input_may_be_written_on_windows(tmp_path: Path) -> None:
    script = Script(choose=lambda request: bytes(request.prompt_token_ids).decode())
    async with batch_server(tmp_path, script) as (_, address), client_of(address) as client:
        texts = [jsonl(line("a"), line("b")), jsonl(line("c"))]  # written one behind the other
        data = b"".join(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") for text in texts)
        uploaded = await client.files.create(file=data, purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await until_ended(client, batch.id)
        found = await answers(client, batch.output_file_id)
        assert [each["response"]["body"]["choices"][0]["text"] for each in found] == ["a", "b", "c"]


async def test_a_wrong_input_fails_the_batch_with_the_lines_numbers(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (served, address), client_of(address) as client:
        assert await _failed(client, b"") == [(None, "empty_file", None)]
        body = line("x")["body"]
        wrong = [
            line("a"),
            "no object",
            {**line("b"), "method": "GET"},
            {**line("c"), "url": "/v1/chat/completions"},
            line("a"),
            {**line("d"), "body": []},
            {**line("e"), "body": {**body, "stream": True}},
            {**line("f"), "body": {**body, "model": "other"}},
            {**line("g"), "more": 1},
            {"custom_id": 1},
        ]
        data = jsonl(*wrong) + b"{\n\n" + b'{"custom_id": "' + b"x" * 9 * 2**20 + b'"}\n' + b"\xff\xfe"
        assert await _failed(client, data) == [
            (2, "invalid_json_line", None),
            (3, "invalid_request", "method"),
            (4, "mismatched_endpoint", "url"),
            (5, "duplicate_custom_id", "custom_id"),
            (6, "invalid_request", "body"),
            (7, "invalid_request", "body.stream"),
            (8, "model_not_found", "body.model"),
            (9, "invalid_request", "more"),
            (10, "invalid_request", "custom_id"),
            (11, "invalid_json_line", None),
            (13, "line_too_long", None),
            (14, "invalid_json_line", None),
        ]
        assert len(await _failed(client, b"x\n" * 1000)) == 100
        assert not served.dispatcher.requests


async def test_a_body_that_is_refused_is_its_lines_own_error(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        wrong = line("b", model="toy", prompt="x", temperature=-1)
        uploaded = await client.files.create(file=jsonl(line("a"), wrong, line("c")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await until_ended(client, batch.id)
        assert batch.status == "completed" and batch.request_counts is not None
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        assert [each["custom_id"] for each in await answers(client, batch.output_file_id)] == ["a", "c"]
        (error,) = await answers(client, batch.error_file_id)
        assert error["custom_id"] == "b" and error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["param"] == "temperature"


BODY_FAULTS = {  # what makes a body none for this API, though it is JSON
    "surrogate": (rb'{"prompt": "x\ud800y"}', "a lone surrogate in a string"),
    "twice": (rb'{"prompt": "x", "prompt": "y"}', "the key 'prompt' stands twice"),
    "integer": (b'{"prompt": "x", "seed": 123456789012345678901}', "is a whole number of more than 64 bits"),
    "depth": (b'{"prompt": ' + b"[" * 32 + b"]" * 32 + b"}", "nesting deeper than 32"),
    "much": (b'{"prompt": [' + b"1," * 500_001 + b"1]}", "more than 500000 commas"),
}


@pytest.mark.parametrize("fault", BODY_FAULTS)
async def test_a_body_that_is_none_for_this_api_is_its_lines_own_error(tmp_path: Path, fault: str) -> None:
    body, words = BODY_FAULTS[fault]
    other = b'{"custom_id": "b {}", "method": "POST", "url": "/v1/completions", "body": %b}\n' % body
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")) + other + jsonl(line("c")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await until_ended(client, batch.id)
        assert batch.status == "completed" and batch.request_counts is not None, batch.errors
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        (error,) = await answers(client, batch.error_file_id)
    assert error["custom_id"] == "b {}" and error["response"]["status_code"] in (400, 413)
    assert words in error["response"]["body"]["error"]["message"]


async def test_a_body_may_be_as_deep_as_in_a_call_of_its_own(tmp_path: Path) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    while _depth(schema) < 32 - 3:
        schema = {"items": schema}
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"model": "toy", "messages": [], "response_format": asked}
    assert _depth(body) == 32
    deep = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "stream": True}}
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        failed = await _failed(client, jsonl(deep), endpoint="/v1/chat/completions")
    assert failed == [(1, "invalid_request", "body.stream")], "it was read"


def _depth(value: Any) -> int:
    return 1 + max(map(_depth, value.values()), default=0) if isinstance(value, dict) else 0


@pytest.mark.parametrize(
    "wrong",
    [
        rb'{"custom_id": "\ud800", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}',
        b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"seed": 1}, "body": {"seed": 1}}',
        b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": nope}}',
        rb'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": "\ud800"}',
        rb'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "\ud800", "prompt": x}}',
        b'{"custom_id": "b", "method": "POST", "body": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
async def test_a_frame_that_is_none_for_this_api_fails_the_batch(tmp_path: Path, wrong: bytes) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        assert await _failed(client, jsonl(line("a")) + wrong + b"\n") == [(2, "invalid_json_line", None)]


async def test_a_batch_of_a_file_that_is_not_there_names_the_field(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.batches.create(
                input_file_id="file-" + "0" * 24, endpoint="/v1/completions", completion_window="24h"
            )
        assert (caught.value.param, caught.value.code) == ("input_file_id", "file_not_found")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.files.retrieve("file-" + "0" * 24)
        assert caught.value.param == "id"


async def test_a_cancelled_batch_keeps_what_was_answered(tmp_path: Path) -> None:
    server = batch_server(tmp_path, Script(hold_at=2), max_batch_requests=2)
    async with server as (served, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(*(line(str(n)) for n in range(5))), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        await served.dispatcher.held.wait()
        batch = await client.batches.cancel(batch.id)
        assert batch.status == "cancelling" and batch.cancelling_at is not None
        batch = await until_ended(client, batch.id)
        assert batch.status == "cancelled" and batch.cancelled_at is not None and batch.output_file_id is None
        errors = await answers(client, batch.error_file_id)
        assert [each["custom_id"] for each in errors] == ["0", "1", "2", "3", "4"]
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
        assert len(served.dispatcher.aborted) == len(served.dispatcher.requests) == 2
        assert (await client.batches.cancel(batch.id)).status == "cancelled"  # as it was asked before


async def test_a_batch_that_has_ended_cannot_be_cancelled(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        await until_ended(client, batch.id)
        with pytest.raises(openai.BadRequestError, match="a batch that is completed cannot be cancelled"):
            await client.batches.cancel(batch.id)


@pytest.mark.slow
async def test_a_batch_expires_with_its_window(tmp_path: Path) -> None:
    async with batch_server(tmp_path, Script(hold_at=2)) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")
        window: Any = "1s"
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window=window
        )
        batch = await until_ended(client, batch.id)
        assert batch.status == "expired" and batch.expired_at is not None
        (error,) = await answers(client, batch.error_file_id)
        assert error["response"] is None and error["error"]["code"] == "batch_expired"


async def test_a_request_that_is_sent_again_with_its_key_makes_one_batch(tmp_path: Path) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")

        async def create(key: str, **changes: Any) -> Any:
            asked = {"input_file_id": uploaded.id, "endpoint": "/v1/completions", "completion_window": "24h"}
            return await client.batches.create(**asked | changes, extra_headers={"Idempotency-Key": key})

        at_once = await asyncio.gather(*(create("a") for _ in range(5)))
        ended = await until_ended(client, at_once[0].id)
        again, other = await create("a"), await create("b")
        assert {batch.id for batch in (*at_once, ended, again)} == {again.id} != {other.id}
        assert again.status == "completed"
        assert {batch.id async for batch in client.batches.list()} == {again.id, other.id}
        for changes in ({"completion_window": "23h"}, {"metadata": {"a": "b"}}, {"endpoint": "/v1/embeddings"}):
            with pytest.raises(openai.UnprocessableEntityError, match="another request"):
                await create("a", **changes)
        with pytest.raises(openai.BadRequestError, match="visible ASCII"):
            await create("a b")


async def test_a_key_sees_its_own_alone(tmp_path: Path) -> None:
    server = batch_server(tmp_path, api_keys=("one", "two"))
    async with server as (_, address), client_of(address, "one") as one, client_of(address, "two") as two:
        uploaded = await one.files.create(file=jsonl(line("a")), purpose="batch")
        batch = await one.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")
        batch = await until_ended(one, batch.id)
        assert batch.output_file_id is not None
        assert [each.id async for each in two.files.list()] == [each.id async for each in two.batches.list()] == []
        for call, name in (
            (two.files.content, batch.output_file_id),
            (two.files.delete, uploaded.id),
            (two.batches.retrieve, batch.id),
            (two.batches.cancel, batch.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await call(name)
        with pytest.raises(openai.NotFoundError):
            await two.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"endpoint": "/v1/models"}, "endpoint: must be one of /v1/chat/completions, "),
    ({"completion_window": "24"}, "completion_window: must be a time such as 24h"),
    ({"completion_window": "31d"}, "completion_window: must be a time such as 24h"),
    ({"metadata": {"a": "x" * 513}}, "metadata: "),
    ({"input_file_id": "../batch"}, "there is no file"),
    ({"extra_body": {"more": 1}}, "there is no such field"),
    ({"output_expires_after": {"anchor": "created_at", "seconds": 0}}, "output_expires_after: needs"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "text"), WRONG)
async def test_a_wrong_batch_is_refused_by_name(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    async with batch_server(tmp_path) as (_, address), client_of(address) as client:
        body: dict[str, Any] = {
            "input_file_id": "file-" + "0" * 24,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        with pytest.raises(openai.APIStatusError, match=text):
            await client.batches.create(**{**body, **change})


async def test_without_a_folder_the_flag_is_named() -> None:
    served = serve()
    async with listening(served.app) as address, client_of(address) as client:
        with pytest.raises(openai.APIStatusError, match="start it with --data-dir DIR") as caught:
            await client.files.create(file=b"x", purpose="batch")
        assert caught.value.status_code == 501
        with pytest.raises(openai.APIStatusError, match="start it with --data-dir DIR"):
            await client.batches.list()
