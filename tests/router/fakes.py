"""A dispatcher that answers from a script, and a tokenizer whose tokens are bytes.

A script is what one request's choices yield, update by update. `hold` stops before an update until the test lets go,
so that tests decide what is under way when something else happens.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import httpx
import msgspec
import pytest
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvferry import __version__
from kvferry.common.request import SampledToken
from kvferry.models.tokenizer import Tokenizer
from kvferry.router.access.keys import ApiKeys
from kvferry.router.app import Application, build_app
from kvferry.router.catalogue.catalogue import Catalogue
from kvferry.router.catalogue.version import ServedModel, Version
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.router.dispatch.worker_group import Expected
from kvferry.router.helpers.chat_renderer import Renderer
from kvferry.router.helpers.grammar_checker import GrammarChecker
from kvferry.router.helpers.wire import Chat
from kvferry.router.http.http_server import HttpServer
from kvferry.router.http.protocol import DeadlineProtocol
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.state.errors import StreamError
from kvferry.router.state.request import RequestStatus, RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.views import PoolView
from kvferry.settings.sockets import listen
from kvferry.tests.fake_clock import FakeClock
from kvferry.wire.address import Address
from kvferry.wire.results import ChoiceTokens

MODEL = "toy"
EOS = 256
BOS = 257
MAX_MODEL_LEN = 512
VOCAB_SIZE = 260
PROMPT_RANK = 9  # of each token of a prompt
# The tag is spelled so that the template has no sign of reasoning, which tests ask for by name.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking %}<{{ 'think' }}>{% endif %}{{ date_string }}"
)


def write_model_dir(path: Path) -> Path:
    """A tokenizer with one token for each byte, id = byte; then eos and bos."""
    alphabet = _byte_alphabet()
    backend = Backend(models.BPE(vocab={char: byte for byte, char in alphabet.items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<s>"])
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def token(token_id: int, num_top: int | None = None) -> SampledToken:
    """With logprobs: the token itself at -0.5, then its neighbours."""
    if num_top is None:
        return SampledToken(token_id)
    top = tuple(((token_id + rank) % 256, -0.5 - rank) for rank in range(num_top))
    return SampledToken(token_id, -0.5, top)


@dataclass(slots=True)
class Script:
    """What every request is answered with. Choice c says `text` with its number behind it if `numbered`."""

    text: str = "Hello, world"
    numbered: bool = False
    ends_with_eos: bool = True
    tokens_per_update: int = 1
    fail_after: int | None = None  # updates, then `error`
    fails_queued: bool = False  # with `error`, before a worker hears of it
    error: StreamError = field(default_factory=lambda: StreamError("worker d-1 was lost", "worker_lost", 503))
    refuse: Exception | None = None  # raised by submit
    vanish_after: int | None = None  # updates, then the stream ends with no finish reason: a bug
    hold_at: int | None = None  # update before which everything waits for `FakeDispatcher.go`
    num_cached_tokens: int = 0
    choose: Callable[[RouterRequest], str] | None = None  # the text, by request


class FakeDispatcher:
    """What the API needs of a dispatcher."""

    def __init__(self, script: Script, clock: FakeClock) -> None:
        self.script = script
        self.clock = clock
        self.requests: list[RouterRequest] = []
        self.finished_choices: list[tuple[str, int]] = []
        self.aborted: list[str] = []
        self.reasons: list[str] = []
        self.pools = PoolView()
        self.room = 1 << 30  # tokens of a choice that a worker holds
        self.go = asyncio.Event()
        self.held = asyncio.Event()
        self.abort_seen = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def longest_answer(self, num_prompt_tokens: int, num_choices: int, limit: int) -> int:
        return min(limit, self.room - num_prompt_tokens)

    def submit(self, request: RouterRequest) -> TokenStream:
        if self.script.refuse is not None:
            raise self.script.refuse
        self.requests.append(request)
        stream = TokenStream(request, lambda: self._abort(request), lambda c: self._finish_choice(request, c))
        request.timestamps["queued"] = self.clock.now()
        task = asyncio.create_task(self._play(request, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def ready(self) -> list[str]:
        return self.reasons

    def view(self) -> PoolView:
        return self.pools

    def _abort(self, request: RouterRequest) -> None:
        if not request.is_finished:
            request.advance(RequestStatus.ABORTED, self.clock.now())
            self.aborted.append(request.request_id)
            self.abort_seen.set()

    def _finish_choice(self, request: RouterRequest, choice: int) -> None:
        self.finished_choices.append((request.request_id, choice))
        request.choices[choice].end_now("stop")
        if not request.unfinished:
            request.advance(RequestStatus.FINISHED, self.clock.now())

    async def _play(self, request: RouterRequest, stream: TokenStream) -> None:
        if request.sampling.prompt_logprobs is not None:
            k = request.sampling.prompt_logprobs
            scored = [token(token_id, k) for token_id in request.prompt_token_ids[1:]]
            request.prompt_logprobs.extend(msgspec.structs.replace(one, rank=PROMPT_RANK) for one in scored)
        if self.script.fails_queued:
            request.advance(RequestStatus.FAILED, self.clock.now())
            stream.fail(self.script.error)
            return
        self.clock.advance(0.01)
        request.timestamps["prefill_start"] = self.clock.now()
        request.num_cached_tokens = self.script.num_cached_tokens
        plans = [self._plan(request, choice) for choice in range(request.n)]
        for step in range(max(map(len, plans))):
            if step == self.script.fail_after:
                request.advance(RequestStatus.FAILED, self.clock.now())
                stream.fail(self.script.error)
                return
            if step == self.script.vanish_after:
                request.advance(RequestStatus.FINISHED, self.clock.now())
                stream.wake()
                return
            await self._maybe_hold(step)
            if request.is_finished:
                return
            self.clock.advance(0.02)
            for choice, plan in enumerate(plans):
                if step < len(plan):
                    request.choices[choice].accept(plan[step])
            request.timestamps.setdefault("first_token", self.clock.now())
            request.timestamps["last_token"] = self.clock.now()
            if not request.unfinished:
                request.advance(RequestStatus.FINISHED, self.clock.now())
            stream.wake()
            await asyncio.sleep(0)

    async def _maybe_hold(self, step: int) -> None:
        if step == self.script.hold_at:
            self.held.set()
            await self.go.wait()

    def _plan(self, request: RouterRequest, choice: int) -> list[ChoiceTokens]:
        """The updates of one choice."""
        script, sampling = self.script, request.sampling
        text = script.choose(request) if script.choose is not None else script.text
        ids = ids_of(text + (str(choice) if script.numbered else ""))
        natural = len(ids) < sampling.max_tokens and script.ends_with_eos and not sampling.ignore_eos
        ids = [*ids, EOS] if natural else ids[: sampling.max_tokens]
        finish = "length"
        for index, token_id in enumerate(ids):
            if token_id in (EOS, *sampling.stop_token_ids) and index + 1 >= sampling.min_tokens:
                ids, finish = ids[: index + 1], "stop"
                break
        size = script.tokens_per_update
        sampled = [token(token_id, sampling.logprobs) for token_id in ids]
        cuts = range(0, len(sampled), size)
        return [
            ChoiceTokens(choice, start, tuple(sampled[start : start + size]), finish if start == cuts[-1] else None)
            for start in cuts
        ]


@dataclass(slots=True)
class Served:
    """An application over a script."""

    app: Application
    dispatcher: FakeDispatcher
    metrics: RouterMetrics
    script: Script

    @property
    def request(self) -> RouterRequest:
        """The last one submitted."""
        return self.dispatcher.requests[-1]

    def client(self, **headers: str) -> httpx.AsyncClient:
        """In process."""
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


class Inline:
    """Renders where it is asked: tests of everything else need no process for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.chat_template is not None
        self._template = tokenizer.chat_template
        self._special_tokens = tokenizer.special_tokens

    async def render(self, chat: Chat) -> str:
        return self._template.render(
            chat.messages,
            special_tokens=self._special_tokens,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            template_kwargs=chat.template_kwargs,
            tools=chat.tools,
        )

    def start(self) -> None: ...

    def close(self) -> None: ...


@cache
def toy_tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_dir(write_model_dir(Path(folder)))


def use_template(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Let the servers that follow have this chat template."""
    (write_model_dir(folder) / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer.from_dir(folder)
    monkeypatch.setattr(sys.modules[__name__], "toy_tokenizer", lambda: tokenizer)


class Submitter(Protocol):
    """What the API needs of a dispatcher."""

    def submit(self, request: RouterRequest) -> TokenStream: ...

    def longest_answer(self, num_prompt_tokens: int, num_choices: int, limit: int) -> int: ...

    def ready(self) -> list[str]: ...

    def view(self) -> PoolView: ...


def catalogue_of(
    dispatcher: Submitter,
    model: ServedModel | None = None,
    renderer: Renderer | None = None,
    grammars: GrammarChecker | None = None,
) -> Catalogue:
    """One version with the toy tokenizer."""
    model = model or ServedModel(MODEL, MAX_MODEL_LEN, VOCAB_SIZE)
    expected = Expected(__version__, model.name)
    version = Version.create(model, toy_tokenizer(), cast(Dispatcher, dispatcher), expected, renderer, grammars)
    return Catalogue([version])


def serve(script: Script | None = None, api_keys: tuple[str, ...] = (), **options: object) -> Served:
    """Call on a running loop. `options` are build_app's, and `model`, `renderer` and `grammars`."""
    script = script or Script()
    clock = FakeClock(100.0)
    dispatcher = FakeDispatcher(script, clock)
    metrics = RouterMetrics(MODEL)
    options.setdefault("allowed_hosts", ("x", "test"))  # as the tests' clients call it
    renderer = options.pop("renderer", None) or Inline(toy_tokenizer())
    model, grammars = options.pop("model", None), options.pop("grammars", None)
    catalogue = catalogue_of(dispatcher, model, renderer, grammars)  # type: ignore[arg-type]
    options.setdefault("keys", ApiKeys(api_keys))
    app = build_app(catalogue, metrics, clock=clock, seed=1, **options)  # type: ignore[arg-type]
    return Served(app, dispatcher, metrics, script)


@asynccontextmanager
async def listening(app: FastAPI, protocol: type[DeadlineProtocol] = DeadlineProtocol) -> AsyncIterator[str]:
    """The application on a real socket; yields host:port."""
    sock = listen(Address("127.0.0.1", 0))
    async with HttpServer(app, protocol=protocol).serving(sock):
        yield f"127.0.0.1:{sock.getsockname()[1]}"


def events(body: str) -> list[dict[str, object]]:
    """The JSON events of a stream, without [DONE]."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def texts(chunks: Sequence[dict[str, object]]) -> list[str]:
    """The text pieces of a completion's chunks."""
    found = []
    for chunk in chunks:
        choices = chunk["choices"]
        assert isinstance(choices, list)
        found += [choice["text"] for choice in choices]
    return found


def typed_events(text: str) -> list[dict[str, Any]]:
    """The data of a stream whose events have names: each one's name is the type that its data tells."""
    found = []
    for event in text.split("\n\n"):
        if event:
            name, data = event.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found
