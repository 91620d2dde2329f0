"""One request to an OpenAI-compatible endpoint, watched: when each chunk came and how many tokens it held.

A request's life: sent -> first chunk with tokens -> further chunks -> usage -> `[DONE]`. Anything else is a failure
and is kept as one: a status that is not 200, an error event, an end without `[DONE]`, no end in time.

Tokens of a chunk are counted by its `token_ids` where the server sends them (`return_token_ids`). Elsewhere a chunk
counts as one token while it arrives. The total is what `usage` says at the end, if it says anything; where the ids
were not as many, the record tells. An answer of one token that has no text (an end, the mark where thoughts begin) has
its token in the chunk that ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Literal

import msgspec

from ...common.errors import ConfigError, KVFerryError
from .chunks import Models, Usage, body_message, count_tokens, decode_chunk, error_message, shows_thoughts
from .http_client import HttpClient, HttpError, ResponseHead
from .sse import EventSplitter

EndpointName = Literal["completions", "chat"]
Prompt = str | Sequence[int]

PATHS: dict[EndpointName, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_MAX_ERROR_CHARS = 300
_MAX_UNSEEN = 2  # tokens: the marks around thoughts

_encode = msgspec.json.Encoder().encode


class StreamFailure(KVFerryError):
    """The answer ended in another way than `[DONE]`."""


@dataclass(slots=True)
class RequestRecord:
    """The record of one request. Times are perf_counter seconds."""

    index: int
    sent_s: float
    num_asked_tokens: int
    late_s: float = 0.0  # how long after its planned time an open-loop request was sent
    finished_s: float | None = None
    chunk_times_s: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, from a prefix cache, where the server says so
    num_output_tokens: int = 0
    num_hidden_tokens: int = 0  # thoughts among them that no chunk showed
    token_ids: list[int] | None = None  # of the answer; None: they are counted and not kept
    counted_by: Literal["token_ids", "usage", "chunks"] = "chunks"
    ids_differ: bool = False  # there were other than as many token ids as `usage` says
    num_resent: int = 0  # times that it was sent anew, as a kept connection was closed already
    status: int | None = None
    error: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.finished_s is not None and self.error is None

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_times_s[0] - self.sent_s if self.chunk_times_s else None

    @property
    def e2e_s(self) -> float | None:
        return self.finished_s - self.sent_s if self.finished_s is not None else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first one to be seen; None when there is no second one."""
        num_shown = self.num_output_tokens - self.num_hidden_tokens
        if num_shown < 2 or not self.chunk_times_s:  # `usage` may count what no chunk held
            return None
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / (num_shown - 1)

    def chunk_gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.chunk_times_s)]

    def token_gaps_s(self) -> list[float]:
        """Gaps between neighbouring tokens as a reader sees them: tokens of one chunk arrive together, 0 s apart."""
        gaps = [0.0] * (self.chunk_tokens[0] - 1) if self.chunk_tokens else []
        for gap, num_tokens in zip(self.chunk_gaps_s(), self.chunk_tokens[1:], strict=True):
            gaps.append(gap)
            gaps.extend([0.0] * (num_tokens - 1))
        return gaps


class _StreamReader:
    """Turns body bytes into the record's times and counts. Runs in the socket's callback: keeps errors, raises none."""

    __slots__ = ("_body", "_events", "_record", "_shows_thoughts", "_usage", "ended_s", "is_done", "problem")

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._events = EventSplitter()
        self._body: list[bytes] = []  # of an answer that is no stream
        self._usage = Usage()
        self._shows_thoughts = False
        self.is_done = False
        self.problem: str | None = None
        self.ended_s: float | None = None  # when the chunk with the reason of the answer's end came

    def on_resend(self) -> None:
        self._record.num_resent += 1

    def on_head(self, head: ResponseHead) -> None:
        self._record.status = head.status

    def on_body(self, data: bytes) -> None:
        now_s = perf_counter()
        if self._record.status != 200:
            self._body.append(data)
            return
        for event in self._events.push(data):
            if event == b"[DONE]":
                self.is_done = True
            else:
                self._on_event(event, now_s)

    def error_text(self) -> str:
        return b"".join(self._body).decode(errors="replace")

    def _on_event(self, event: bytes, now_s: float) -> None:
        try:
            chunk = decode_chunk(event)
        except msgspec.MsgspecError as error:
            self.problem = self.problem or f"unreadable event ({error}): {event[:80].decode(errors='replace')}"
            return
        if chunk.error is not None or chunk.kind == "error":
            self.problem = self.problem or f"error event: {error_message(chunk.error or chunk.message)}"
        if chunk.usage is not None:
            self._usage = chunk.usage
            self._record.num_prompt_tokens = chunk.usage.prompt_tokens or 0
            self._record.num_output_tokens = chunk.usage.completion_tokens or 0
            self._record.num_cached_tokens = chunk.usage.num_cached_tokens
        choices = chunk.choices or ()
        num_tokens = sum(map(count_tokens, choices))
        if num_tokens:
            self._record.chunk_times_s.append(now_s)
            self._record.chunk_tokens.append(num_tokens)
        for choice in choices:
            self._shows_thoughts = self._shows_thoughts or shows_thoughts(choice)
            if choice.finish_reason is not None:
                self.ended_s = now_s
            if choice.token_ids:
                self._record.counted_by = "token_ids"
                if self._record.token_ids is not None:
                    self._record.token_ids += choice.token_ids
            if choice.finish_reason in ("error", "abort"):
                self.problem = self.problem or f"finish_reason {choice.finish_reason!r}"

    def settle_counts(self) -> None:
        """Bring what the chunks held and what `usage` says together, once no more comes."""
        record, num_seen = self._record, sum(self._record.chunk_tokens)
        if not record.num_output_tokens:  # there is no usage, or it counts nothing
            record.num_output_tokens = num_seen
            return
        if record.counted_by != "token_ids":
            record.counted_by = "usage"
        elif record.num_output_tokens != num_seen:
            record.counted_by, record.ids_differ = "usage", True
        num_thoughts = self._usage.num_thought_tokens
        # Hidden where what was seen is what is left, but for the marks around them. Else they are counted beside the
        # answer's tokens, not among them, or stand within a text of several tokens a chunk.
        if not self._shows_thoughts and 0 <= record.num_output_tokens - num_thoughts - num_seen <= _MAX_UNSEEN:
            record.num_hidden_tokens = num_thoughts


class Endpoint:
    """The address that requests go to, and what all of them have in common."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        name: EndpointName = "completions",
        api_key: str | None = None,
        ignore_eos: bool = False,
        temperature: float | None = None,
        return_token_ids: bool = True,
        timeout_s: float = 600.0,
    ) -> None:
        self.model = model
        self.name = name
        self.return_token_ids = return_token_ids
        self._client = HttpClient(base_url.rstrip("/").removesuffix("/v1"))
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s
        self._common: dict[str, object] = {"stream": True, "stream_options": {"include_usage": True}}
        if ignore_eos:
            self._common["ignore_eos"] = True
        if temperature is not None:
            self._common["temperature"] = temperature

    async def send(
        self, prompt: Prompt, num_output_tokens: int, *, index: int = 0, record: RequestRecord | None = None
    ) -> RequestRecord:
        """Runs one request to its end; a failure is in the record. Pass a record to watch it while it grows."""
        body = _encode(self._body(prompt, num_output_tokens))
        record = record or RequestRecord(index, 0.0, num_output_tokens)
        reader = _StreamReader(record)
        record.sent_s = perf_counter()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.request(
                    "POST", PATHS[self.name], body=body, headers=self._headers,
                    on_resend=reader.on_resend, on_head=reader.on_head, on_body=reader.on_body,
                )  # fmt: skip
            _check_end(reader, record)
        except (HttpError, StreamFailure) as error:
            record.error = str(error)[:_MAX_ERROR_CHARS]
        except TimeoutError:
            record.error = f"no end of the answer within {self._timeout_s:g} s"
        record.finished_s = perf_counter()
        reader.settle_counts()
        return record

    async def model_names(self) -> list[str]:
        """Return the models that the server serves, by its own list."""
        head, body = await self._client.read("GET", "/v1/models", headers=self._headers)
        if head.status != 200:
            raise ConfigError(f"/v1/models answered {head.status}: name the model with --model")
        try:
            return [entry.id for entry in msgspec.json.decode(body, type=Models).data]
        except msgspec.MsgspecError as error:
            raise ConfigError(f"/v1/models is no list of models ({error}): name the model with --model") from error

    def close(self) -> None:
        self._client.close()

    def _body(self, prompt: Prompt, num_output_tokens: int) -> dict[str, object]:
        body = {"model": self.model, "max_tokens": num_output_tokens, **self._common}
        if self.return_token_ids:
            body["return_token_ids"] = True
        if self.name == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return body


def _check_end(reader: _StreamReader, record: RequestRecord) -> None:
    if record.status != 200:
        raise StreamFailure(f"HTTP {record.status}: {body_message(reader.error_text())}")
    if reader.problem is not None:
        raise StreamFailure(reader.problem)
    if not reader.is_done:
        raise StreamFailure(f"stream ended without [DONE] after {sum(record.chunk_tokens)} tokens")
    if record.chunk_times_s:
        return
    if record.num_output_tokens != 1 or reader.ended_s is None:
        counted = f", of which its usage counts {record.num_output_tokens}" if record.num_output_tokens else ""
        raise StreamFailure(f"stream without a token{counted}")
    record.chunk_times_s.append(reader.ended_s)
    record.chunk_tokens.append(1)
