"""Chats are rendered elsewhere, with the same prompts and the same errors, and what does not end is ended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.errors import CapacityError, ConfigError, RequestError
from kvferry.models.chat_template import ChatTemplate
from kvferry.models.render_budget import RenderLimits
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.helpers import chat_renderer
from kvferry.router.helpers.chat_renderer import QUICK_BYTES, ChatRenderer
from kvferry.router.helpers.wire import Chat

from ..fakes import Script, serve, write_model_dir

PATH = "/v1/chat/completions"

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}{{ date_string }}"
)
SPECIAL = {"bos_token": "<s>"}


@asynccontextmanager
async def _rendering(source: str) -> AsyncIterator[ChatRenderer]:
    renderer = ChatRenderer(ChatTemplate(source, origin="the model's"), SPECIAL)
    try:
        yield renderer
    finally:
        renderer.close()


def _chat(content: str = "hi", kwargs: Mapping[str, object] | None = None, *, continues: bool = False) -> Chat:
    role = "assistant" if continues else "user"
    return Chat([{"role": role, "content": content}], kwargs or {}, not continues, continues)


def _here(source: str, chat: Chat) -> str:
    return ChatTemplate(source).render(
        chat.messages,
        special_tokens=SPECIAL,
        add_generation_prompt=chat.add_generation_prompt,
        continue_final_message=chat.continue_final_message,
        template_kwargs=chat.template_kwargs,
    )


@pytest.mark.slow
async def test_prompts_are_the_same_as_here_whichever_process_makes_them() -> None:
    chats = [
        _chat(), _chat("ä 🙂\n</x>\t\x00 \U00100000"), _chat("x" * QUICK_BYTES), _chat("", continues=True),
        _chat("to be continued", continues=True), _chat("hi", {"date_string": "today"}),
    ]  # fmt: skip
    async with _rendering(CHATML) as renderer:
        assert [await renderer.render(chat) for chat in chats] == [_here(CHATML, chat) for chat in chats]
        assert renderer.quick.pid and renderer.long.pid and renderer.quick.pid != renderer.long.pid


@pytest.mark.parametrize(
    ("source", "kwargs", "error", "match"),
    [("{{ raise_exception('roles must alternate') }}", {}, RequestError, "roles must alternate"),
     ("{{ messages[7].content }}", {}, RequestError, "cannot render these messages"),
     ("{{ '%1000000000d' % 1 }}", {}, ConfigError, "^the chat template does what the sandbox forbids"),
     ("{{ messages[0].content }}{{ {}.update(a=1) if messages[0].content == 'hi' }}", {}, RequestError,
      "the sandbox forbids.* these messages$"),
     ("Be brief.", {}, ConfigError, "^the chat template prints nothing of what a user says"),
     ("{{ messages[0].content }}", {"messages": 1}, RequestError, "must not set messages"),
     ("{{ messages[0].content }}{{ '\ud800' }}", {}, RequestError, "lone surrogate")],
)  # fmt: skip
async def test_errors_are_what_they_are_here(
    source: str, kwargs: Mapping[str, object], error: type[Exception], match: str
) -> None:
    source = source.encode("ascii", "backslashreplace").decode()
    async with _rendering(source) as renderer:
        with pytest.raises(error, match=match):
            await renderer.render(_chat("hi", kwargs))


@pytest.mark.parametrize(
    ("source", "fields"),
    [("{% if tools %}{{ messages[-1].content }}{% endif %}", {"tools": [{"type": "function"}]}),
     ("{% if guideline %}{{ messages[-1].content }}{% endif %}", {"template_kwargs": {"guideline": "No."}})],
)  # fmt: skip
async def test_what_a_user_says_may_be_told_beside_tools_or_arguments_alone(
    source: str, fields: Mapping[str, Any]
) -> None:
    async with _rendering(source) as renderer:
        assert await renderer.render(replace(_chat(), **fields)) == "hi"
        with pytest.raises(ConfigError, match="prints nothing of what a user says"):
            await renderer.render(_chat())


@pytest.mark.slow
async def test_what_is_too_much_for_the_quick_process_gets_its_time_in_the_other_one() -> None:
    source = "{% for i in range(11000) %}{% if loop.last %}{{ i }}{% endif %}{% endfor %}{{ messages[0].content }}"
    async with _rendering(source) as renderer:
        assert await renderer.render(_chat()) == "10999hi"
        assert renderer.long.pid is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "status", "match"),
    [("{% for i in range(200000) %}{% endfor %}", 400, "loops over more than 100000 numbers"),
     ("{% for i in range(2000) %}{{ messages[0].content }}{% endfor %}", 413, "more than 16777216 characters")],
)  # fmt: skip
async def test_what_is_too_much_for_both_is_the_clients_to_mend(source: str, status: int, match: str) -> None:
    async with _rendering(source) as renderer:
        with pytest.raises(RequestError, match=match) as caught:
            await renderer.render(_chat("x" * 14_000))
        assert (caught.value.status, caught.value.param) == (status, "messages")


# Comparing equal texts of megabytes a million times, in one call: within every bound of the sandbox.
HOLE = (
    "{% if messages[0].content == 'bomb' %}"
    "{{ ([{'a': 'a' * 4000000}] * 1000000)|groupby('a', case_sensitive=true)|length }}{% endif %}"
    "ok{{ messages[0].content }}"
)


@pytest.mark.slow
async def test_what_the_sandbox_cannot_end_is_killed_and_the_next_chat_is_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_renderer, "QUICK", RenderLimits(max_s=0.2))
    monkeypatch.setattr(chat_renderer, "LONG", RenderLimits(max_s=0.2))
    async with _rendering(HOLE) as renderer:
        assert await renderer.render(_chat()) == "okhi"
        bombs = [asyncio.create_task(renderer.render(_chat("bomb"))) for _ in range(2)]
        async with asyncio.timeout(20):  # each of them would take a minute
            assert await renderer.render(_chat()) == "okhi"
            for bomb in bombs:
                with pytest.raises(RequestError, match=r"took more than 0.2 s") as caught:
                    await bomb
                assert caught.value.status == 400
        assert await renderer.render(_chat()) == "okhi"


@asynccontextmanager
async def _losing_its_process(num_times: int) -> AsyncIterator[asyncio.Task[str]]:
    """A rendering whose process is killed, and so are those that are started for it."""
    async with _rendering(CHATML) as renderer:
        await renderer.render(_chat("x" * QUICK_BYTES))
        pid = renderer.long.pid or 0
        os.kill(pid, signal.SIGSTOP)
        rendering = asyncio.create_task(renderer.render(_chat("x" * QUICK_BYTES)))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        for _ in range(num_times - 1):
            while renderer.long.pid in (None, pid):  # noqa: ASYNC110
                await asyncio.sleep(0)
            pid = renderer.long.pid or 0
            os.kill(pid, signal.SIGKILL)
        yield rendering


async def test_a_process_that_ends_is_the_servers_fault() -> None:
    async with _losing_its_process(2) as rendering:
        with pytest.raises(CapacityError) as caught:
            await rendering
        assert caught.value.status == 503


async def test_a_chat_whose_process_is_killed_is_rendered_by_another() -> None:
    async with _losing_its_process(1) as rendering:
        assert await rendering == _here(CHATML, _chat("x" * QUICK_BYTES))


async def test_a_bomb_holds_up_nobody_else(tmp_path: Path) -> None:
    """Over HTTP: chats of others are answered, and so is /live."""
    tokenizer = Tokenizer.from_dir(write_model_dir(tmp_path))
    template = tmp_path / "hole.jinja"
    template.write_text(HOLE)
    tokenizer = Tokenizer.from_dir(tmp_path, template)
    assert tokenizer.chat_template is not None
    renderer = ChatRenderer(tokenizer.chat_template, {})
    served = serve(Script("ab"), renderer=renderer)
    try:
        async with served.client() as client:
            bomb = asyncio.create_task(client.post(PATH, json={"messages": [{"role": "user", "content": "bomb"}]}))
            while renderer.quick.pid is None:  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert (await client.get("/live")).status_code == 200
            answer = await client.post(PATH, json={"messages": [{"role": "user", "content": "hi"}]})
            assert answer.status_code == 200 and not bomb.done()
            bomb.cancel()
    finally:
        renderer.close()
