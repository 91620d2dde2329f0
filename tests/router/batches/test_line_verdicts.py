"""What a line is answered, judged by its code: a line that ends workers is not asked until its window is over."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.errors import CapacityError
from kvferry.router.api.middleware import Endpoint
from kvferry.router.batches import run
from kvferry.router.batches.call import CallAnswer, EndpointCalls
from kvferry.router.state.errors import StreamError

from ...fake_clock import FakeClock
from ..fakes import Script
from .batch_server import answers, batch_server, client_of, jsonl, line, until_ended
from .test_batch_run import Caller, create, deps_of, output, run_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "FLUSH_EVERY_S", 0.001)


@pytest.mark.parametrize("script", [{"fails_queued": True}, {"fail_after": 2}], ids=["before a token", "behind two"])
async def test_a_line_that_ends_workers_is_asked_once(tmp_path: Path, script: dict[str, object]) -> None:
    poison = StreamError("3 workers were lost while they computed this request", "poison_request", 500)
    server = batch_server(tmp_path, Script(error=poison, **script))  # type: ignore[arg-type]
    async with server as (served, address), client_of(address) as client:
        uploaded = await client.files.create(file=jsonl(line("a")), purpose="batch")
        batch = await client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h"
        )
        batch = await until_ended(client, batch.id)
        assert batch.status == "completed" and len(served.dispatcher.requests) == 1
        (error,) = await answers(client, batch.error_file_id)
        assert error["response"]["status_code"] == 500
        assert error["response"]["body"]["error"]["code"] == "poison_request"


async def asked(tmp_path: Path, answer: CallAnswer) -> tuple[int, int]:
    """Have a line answered so nine times, and well then. Returns how often it was asked, and the status that stays."""
    before = [answer] * 9
    caller = Caller(lambda name: before.pop() if before else None)
    deps = deps_of(tmp_path, caller)
    each = run_of(deps, create(deps, 1))
    await each.run()
    record = each.record
    (found,) = output(deps, record.output_file_id) + output(deps, record.error_file_id)
    response = found["response"]
    assert isinstance(response, dict)
    return len(caller.asked), response["status_code"]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (503, "worker_lost"),  # with which its attempts ended, one worker after the other
        (503, "no_answer"),
        (503, "request_aborted"),
        (503, "not_known_here"),
        (503, None),
        (500, "worker_failure"),
        (504, "deadline_exceeded"),
    ],
)
async def test_a_line_that_the_server_fails_is_asked_three_times(
    tmp_path: Path, status: int, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_MAX_PAUSE_S", 0.001)
    assert await asked(tmp_path, CallAnswer(status, "r", b"{}", code=code)) == (3, status)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "rate_limit_exceeded"),
        (503, "overloaded"),
        (503, "deadline_exceeded"),
        (503, "no_decode_capacity"),
        (503, "no_prefill_capacity"),
        (503, "retry_budget_exhausted"),
        (503, "router_stopping"),
        (503, "shutting_down"),
    ],
)
async def test_a_line_that_finds_no_room_is_asked_until_it_does(
    tmp_path: Path, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_MAX_PAUSE_S", 0.001)
    assert await asked(tmp_path, CallAnswer(status, "r", b"{}", code=code)) == (10, 200)


async def test_an_error_that_is_raised_tells_its_code() -> None:
    async def full(request: object) -> None:
        raise CapacityError("the queue is full", retry_after_s=2.0)

    endpoint: Endpoint = full  # type: ignore[assignment]
    answer = await EndpointCalls({"/v1/x": endpoint}, FakeClock(0.0)).ask("/v1/x", b"{}", b"me")
    assert (answer.status, answer.code, answer.retry_after_s) == (429, "rate_limit_exceeded", 2.0)
