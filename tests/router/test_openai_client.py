"""The unmodified openai client over loopback: every field, whole and streamed, sync and async; and its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import ResponseCompletedEvent, ResponseCreatedEvent, ResponseTextDeltaEvent

from kvferry.common.errors import CapacityError
from kvferry.router.kept.answers import KeptAnswers
from kvferry.router.state.errors import StreamError

from .fakes import MODEL, Script, Served, ids_of, listening, serve

MESSAGES: Any = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
]
COMMON: dict[str, Any] = {
    "n": 2,
    "stop": ["never", "ever"],
    "seed": 7,
    "max_tokens": 40,
    "temperature": 0.5,
    "top_p": 0.9,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "logit_bias": {"33": -1},
    "user": "someone",
    "extra_body": {
        "top_k": 5,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "ignore_eos": False,
        "min_tokens": 1,
        "stop_token_ids": [0],
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "return_token_ids": True,
        "priority": 1,
        "add_special_tokens": False,
        "cache_salt": "s",
        "request_id": "mine",
    },
}
CHAT: dict[str, Any] = {
    **COMMON,
    "logprobs": True,
    "top_logprobs": 2,
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "extra_body": {
        **COMMON["extra_body"],
        "chat_template_kwargs": {"enable_thinking": False},
        "add_generation_prompt": True,
        "continue_final_message": False,
        "echo": False,
    },
}
COMPLETION: dict[str, Any] = {**COMMON, "logprobs": 2, "echo": True, "best_of": 2}
USAGE: Any = {"include_usage": True}


@asynccontextmanager
async def _async_client(served: Served, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    async with listening(served.app) as address:
        async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="key", max_retries=0, **options) as client:
            yield client


@contextmanager
def _sync_client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://{address}/v1", api_key="key", max_retries=0) as client:
        yield client


async def test_a_whole_chat_with_every_field() -> None:
    served = serve(Script("Hello", numbered=True))
    async with _async_client(served) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **CHAT)
    assert [choice.message.content for choice in answer.choices] == ["Hello0", "Hello1"]
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [entry.token for entry in logprobs.content][:5] == list("Hello")
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None and answer.usage.completion_tokens == 14
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 0
    assert served.request.prompt_token_ids == ids_of("<system>Be brief.<user>hi<assistant>")
    sampling = served.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.logit_bias) == (0.5, 5, 7, {33: -1.0})


async def test_a_streamed_chat_with_every_field() -> None:
    async with _async_client(serve(Script("Hello", numbered=True))) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options=USAGE, **CHAT
        )
        chunks = [chunk async for chunk in stream]
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == f"Hello{index}"
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 14
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_a_whole_completion_with_every_field() -> None:
    async with _async_client(serve(Script("Hello", numbered=True))) as client:
        answer = await client.completions.create(model=MODEL, prompt=["hi", "ho"], **COMPLETION)
    assert [choice.text for choice in answer.choices] == ["hiHello0", "hiHello1", "hoHello0", "hoHello1"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.text_offset == [*range(9)]
    assert answer.usage is not None and answer.usage.prompt_tokens == 4


async def test_a_streamed_completion_with_every_field() -> None:
    async with _async_client(serve(Script("Hello", numbered=True))) as client:
        stream = await client.completions.create(
            model=MODEL, prompt=[[104, 105]], stream=True, stream_options=USAGE, **COMPLETION
        )
        chunks = [chunk async for chunk in stream]
    mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == 1]
    assert "".join(choice.text for choice in mine) == "hiHello1"
    assert mine[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 2 + 14


async def test_the_sync_client_whole_and_streamed() -> None:
    served = serve(Script("Hello"))

    def talk(address: str) -> list[str]:
        with _sync_client(address) as client:
            whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=5)
            streamed = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
            completed = client.completions.create(model=MODEL, prompt="hi")
            pieces = client.completions.create(model=MODEL, prompt="hi", stream=True)
            joined = "".join(chunk.choices[0].text for chunk in pieces)
            models = [model.id for model in client.models.list()]
            return [whole.choices[0].message.content or "", text, completed.choices[0].text, joined, *models]

    async with listening(served.app) as address:
        assert await asyncio.to_thread(talk, address) == ["Hello"] * 4 + [MODEL]


async def test_the_clients_own_accumulator_reads_a_stream() -> None:
    async with _async_client(serve(Script("Hello"))) as client:
        async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
            final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello"


async def test_errors_are_the_clients_own_classes() -> None:
    served = serve(api_keys=("key",))
    async with _async_client(served) as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.completions.create(model="other", prompt="hi")
        assert not_found.value.code == "model_not_found" and not_found.value.param == "model"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[{"type": "function"}])  # type: ignore[list-item]
        assert bad.value.param == "tools[0].function" and bad.value.code == "invalid_value"
        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        served.script.refuse = CapacityError("the queue is full")
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model=MODEL, prompt="hi")


async def test_a_stream_that_fails_raises_in_the_client() -> None:
    async with _async_client(serve(Script("abcdef", fail_after=3))) as client:
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        seen = ""
        with pytest.raises(openai.APIError) as caught:
            async for chunk in stream:
                seen += chunk.choices[0].text
    assert seen == "abc"
    assert caught.value.code == "worker_lost"


async def test_a_client_that_closes_its_stream_aborts_the_request() -> None:
    served = serve(Script("abcdef", hold_at=1))
    async with _async_client(served) as client:
        async with await client.completions.create(model=MODEL, prompt="hi", stream=True) as stream:
            await anext(aiter(stream))
        await served.dispatcher.abort_seen.wait()
    assert served.dispatcher.aborted == [served.request.request_id]


async def test_a_background_response_is_followed_left_and_followed_again(tmp_path: Path) -> None:
    served = serve(Script("Hello, world", hold_at=3), kept_answers=KeptAnswers(tmp_path))
    async with _async_client(served) as client:
        asked = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        async with await asked as stream:
            had = [await anext(aiter(stream)) for _ in range(4)]
        created = had[0]
        assert isinstance(created, ResponseCreatedEvent)
        assert (await client.responses.retrieve(created.response.id)).status == "in_progress"
        served.dispatcher.go.set()
        after = had[-1].sequence_number
        async for event in await client.responses.retrieve(created.response.id, stream=True, starting_after=after):
            had.append(event)
        completed = had[-1]
        assert isinstance(completed, ResponseCompletedEvent) and completed.response.output_text == "Hello, world"
        deltas = [event.delta for event in had if isinstance(event, ResponseTextDeltaEvent)]
        assert "".join(deltas) == "Hello, world" and not served.dispatcher.aborted
        async with client.responses.stream(response_id=created.response.id, starting_after=0) as again:
            assert (await again.get_final_response()).output_text == "Hello, world"


async def test_the_client_retries_what_may_succeed_and_not_what_cannot() -> None:
    served = serve(Script(refuse=CapacityError("full", retry_after_s=0.001)))
    async with _async_client(served) as client:
        retrying = client.with_options(max_retries=2)
        with pytest.raises(openai.RateLimitError):
            await retrying.completions.create(model=MODEL, prompt="hi")
        served.script.refuse = StreamError("it killed two workers", "poison_request", 500)
        with pytest.raises(openai.InternalServerError):
            await retrying.completions.create(model=MODEL, prompt="hi")
        text, _ = served.metrics.scrape([(MODEL, served.dispatcher.view())], num_in_flight=0)()
    assert b'kvferry_requests_total{code="429"} 3.0' in text
    assert b'kvferry_requests_total{code="500"} 1.0' in text
