"""One generation call: body -> prompts -> requests -> the reply. What both endpoints share, and where they differ.

Anything wrong with a body is answered before the dispatcher hears of it. A batch of prompts is as many requests;
they are taken all or none.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog
from fastapi import Request

from ...common.clock import Clock, wall_time_s
from ...common.grammar import CheckedGrammar
from ...common.request import Pooling, SamplingParams
from ..access.quota import Quotas
from ..bodies.schemas import Body, ChatBody, CompletionBody, GenerationBody, validate
from ..bodies.values import bad_word_runs
from ..catalogue.catalogue import Catalogue
from ..catalogue.version import Version
from ..helpers.json_parser import JsonParser
from ..helpers.strict_json import MAX_COMMAS
from ..http.in_flight import InFlight
from ..kept.answers import KeptAnswers
from ..kept.asking import KEY_HEADER, answer_key, one_key
from ..kept.kept_answer import given_back
from ..state.classes import CLASS_HEADER, TIMEOUT_HEADER, RequestClasses
from ..state.errors import clip
from ..state.objectives import BACKGROUND, DEFAULT_CLASS
from ..state.request import RouterRequest
from ..state.token_stream import TokenStream
from .answer import NO_GAPS, Answer, GapObserver, PromptText
from .body import MAX_BODY_BYTES, MAX_VECTOR_BYTES, BodyRoom, CallBody, HeldBody, read_body, tenant_of
from .chat_turns import ChatTurns, TurnOptions
from .completions import CompletionForm
from .events import OPENAI_EVENTS, EventFormat
from .form import Form
from .middleware import RequestContext, ResponseObserver, context_of
from .options import (
    beside_grammar,
    chat_grammar,
    form_context,
    max_new_tokens,
    text_options,
    thinking_budget,
    turn_options,
)
from .paying import enter, take_paid
from .prompts import PromptReader
from .reply import AnswerObserver, Reply
from .surface import ChatSurface, OpenAISurface, naming_fields

_MAX_LOGGED_NAMES = 256  # clients make them up
_BATCH_STEP = 2  # prompts of a batch that are submitted in one go: some other batches may have their turn with it
_MAX_SEED = 2**63 - 1
_CHECKED_BYTES_PER_CHAR = 8  # checking fields is so much faster than tokenizing

log = structlog.get_logger(__name__)


class ApiObserver(AnswerObserver, GapObserver, ResponseObserver, Protocol):
    """The API tells an observer what happens."""

    def on_ignored_fields(self, number: int) -> None:
        """Fields of a body had no effect."""


@dataclass(slots=True)
class Api:
    """The parts that every endpoint works with."""

    catalogue: Catalogue
    clock: Clock  # the dispatchers'
    observer: ApiObserver
    random: random.Random  # draws the seeds that clients do not give
    quotas: Quotas
    classes: RequestClasses = field(default_factory=RequestClasses)
    shares_prefixes: bool = False  # between keys: what one has cached, others find
    max_body_bytes: int = MAX_BODY_BYTES
    refuses_unknown: bool = True  # fields of a body; False: they are ignored, and that is told
    logged_names: set[str] = field(default_factory=set)  # of ignored fields
    prompts: PromptReader = field(default_factory=PromptReader)
    body_room: BodyRoom = field(default_factory=BodyRoom)
    vector_room: BodyRoom = field(default_factory=partial(BodyRoom, MAX_VECTOR_BYTES, "the vectors under way"))
    json: JsonParser = field(default_factory=JsonParser)
    kept_answers: KeptAnswers | None = None  # None: nobody finds an answer again
    in_flight: InFlight = field(default_factory=InFlight)
    started_s: int = field(default_factory=wall_time_s)

    async def body(
        self, request: Request, held: HeldBody, kind: type[Body], surface: ChatSurface | None = None
    ) -> tuple[Body, Version]:
        """Return what the client asks, and of which version. `surface` makes a body of `kind` from another one.

        Raises CapacityError (429) before anything is read where the caller's quota is used up.
        """
        context = context_of(request.scope)
        is_named = KEY_HEADER in context.headers and issubclass(kind, GenerationBody)
        enter(self.quotas, self.kept_answers, context, is_named=is_named)
        data = await read_body(context.headers, request.receive, held, max_bytes=self.max_body_bytes)
        max_commas = max(MAX_COMMAS, 2 * self.catalogue.max_model_len)
        raw = await self.json.parse(data, max_commas)
        ignored: list[str] | None = None if self.refuses_unknown else []
        size = len(data) // _CHECKED_BYTES_PER_CHAR
        if is_named:
            path = str(request.scope["path"])
            context.answer_key = await self.prompts.run(size, answer_key, context.headers, context.tenant, path, raw)
        if surface is not None:
            size += surface.num_to_look_up(raw) // _CHECKED_BYTES_PER_CHAR
            raw = await self.prompts.run(size, surface.chat_body, raw, ignored)
            held.add(surface.num_looked_up)
        unknown: list[str] = []  # fields, by the names of `kind`
        body = await self.prompts.run(size, validate, kind, raw, None if self.refuses_unknown else unknown)
        self.tell_ignored(context, [*(ignored or ()), *map(surface.own_names if surface else str, unknown)])
        return body, self.catalogue.version(body.model or None, generates=isinstance(body, GenerationBody))

    def tell_ignored(self, context: RequestContext, names: Sequence[str]) -> None:
        """Tell the client, the metrics and, once for each name, the log, where fields have no effect."""
        if not names:
            return
        context.ignored += names
        self.observer.on_ignored_fields(len(names))
        for name in map(clip, names[:_MAX_LOGGED_NAMES]):
            if name not in self.logged_names and len(self.logged_names) < _MAX_LOGGED_NAMES:
                self.logged_names.add(name)
                log.warning("field_ignored", field=name, request_id=context.request_id)

    def close(self) -> None:
        """End the threads and the processes that work on bodies."""
        self.prompts.close()
        self.catalogue.close()
        self.json.close()

    async def complete(self, request: Request) -> Reply:
        context = self.begin(request)
        with self.body_room.held() as held:
            body, version = await self.body(request, held, CompletionBody)
            context.marks["read"] = self.clock.now()
            reading = self.prompts.completion(version, body, held.num_bytes)
            prompts, grammar = await beside_grammar(reading, version, body)
        context.marks["tokenize"] = self.clock.now()
        limits = [max_new_tokens(body, prompt, version) for prompt in prompts]
        answer = await self._answer(context, version, body, prompts, limits, grammar)
        shown = form_context("cmpl-", context.request_id, version, body, answer)
        return self.reply(answer, CompletionForm(shown), body)

    async def chat(self, request: Request, surface: ChatSurface | None = None) -> Reply:
        """Answer a chat, in OpenAI's words or in those of another surface."""
        surface = surface or OpenAISurface()
        context = self.begin(request)
        with self.body_room.held() as held, naming_fields(surface.own_names):
            body, version = await self.body(request, held, ChatBody, surface)
            context.answer_key = one_key(context.answer_key, surface.key)
            context.marks["read"] = self.clock.now()
            prompts = self.prompts.chat(version, body, held.num_bytes, refuses_unknown=self.refuses_unknown)
            chat, asked = await beside_grammar(prompts, version, body)
            follows = await chat_grammar(version, chat, asked, thinking_budget(body))
            limit = max_new_tokens(body, chat.prompt, version)
        context.marks["tokenize"] = self.clock.now()
        self.tell_ignored(context, [*surface.left_out, *map(surface.own_names, (*chat.ignored, *follows.ignored))])
        turns = turn_options(version, body, chat, is_free=follows.is_free)
        answer = await self._answer(context, version, body, [chat.prompt], [limit], follows.grammar, turns)
        shown = form_context(surface.id_prefix, context.request_id, version, body, answer)
        return self.reply(answer, surface.form(shown, ChatTurns(answer, turns), body, chat), body, surface.events)

    async def count_chat(self, request: Request, surface: ChatSurface) -> int:
        """Return how many tokens a chat's prompt has."""
        with self.body_room.held() as held, naming_fields(surface.own_names):
            body, version = await self.body(request, held, ChatBody, surface)
            chat = await self.prompts.chat(version, body, held.num_bytes, refuses_unknown=self.refuses_unknown)
        self.tell_ignored(context_of(request.scope), [*surface.left_out, *map(surface.own_names, chat.ignored)])
        return len(chat.prompt.token_ids)

    def begin(self, request: Request) -> RequestContext:
        """Return the call's context, with its class and the time that it has. Raises where the server ends."""
        self.in_flight.check_open()
        context = context_of(request.scope)
        if context.is_background:
            return context
        named = context.header(CLASS_HEADER)
        context.request_class = DEFAULT_CLASS if named is None else named
        context.timeout_s = self.classes.timeout_s(context.request_class, context.header(TIMEOUT_HEADER))
        return context

    def _remaining_s(self, context: RequestContext) -> float | None:
        """Return what is left of the client's time: what reading its body has taken is off."""
        if context.timeout_s is None:
            return None
        return max(0.0, context.timeout_s - (self.clock.now() - context.started_s))

    async def _answer(
        self,
        context: RequestContext,
        version: Version,
        body: GenerationBody,
        prompts: Sequence[PromptText],
        limits: Sequence[int],
        grammar: CheckedGrammar | None,
        turns: TurnOptions | None = None,
    ) -> Answer:
        sampling = self._sampling(version, body, limits)
        self.in_flight.check_open()
        num_prompt = sum(len(prompt.token_ids) for prompt in prompts)
        kept = await take_paid(self.kept_answers, context, version.identity, sampling, body.num_choices, num_prompt)
        if kept is None and KEY_HEADER in context.headers:
            self.tell_ignored(context, ["Idempotency-Key"])
        with given_back(kept):
            if kept is None or kept.head is None:  # else it has begun, with the limits of then
                body.check_least(min(limits))
            if kept is not None:
                sampling = kept.settle(sampling, context.request_id)
            requests = self.requests(context, version, body, prompts, sampling)
            if kept is not None:
                requests = kept.restore(requests)
            streams = await self.submit(context, version, requests, grammar=grammar)
        options = text_options(body, limits[0], turns)
        observer = NO_GAPS if context.is_background else self.observer
        return Answer(streams, prompts, options, version.tokenizer, clock=self.clock, observer=observer, kept=kept)

    async def submit(
        self,
        context: RequestContext,
        version: Version,
        requests: Iterable[RouterRequest],
        *,
        grammar: CheckedGrammar | None = None,
        pooling: Pooling | None = None,
    ) -> list[TokenStream]:
        """Hand the requests of a call to the dispatcher, all or none."""
        streams: list[TokenStream] = []
        try:
            for index, request in enumerate(requests):
                if index % _BATCH_STEP == _BATCH_STEP - 1:
                    await asyncio.sleep(0)  # a large batch does not hold up everybody else
                request.grammar, request.pooling = grammar, pooling
                request.timeout_s, request.allowed_s = self._remaining_s(context), context.timeout_s
                streams.append(version.dispatcher.submit(request) if request.unfinished else TokenStream.ended(request))
        except BaseException:
            for stream in streams:
                stream.abort()
            raise
        return streams

    def _sampling(self, version: Version, body: GenerationBody, limits: Sequence[int]) -> list[SamplingParams]:
        bad_words = bad_word_runs(version.tokenizer, body.bad_words or ())
        how = partial(body.sampling, version.model.defaults, vocab_size=version.model.vocab_size, bad_words=bad_words)
        return [how(seed=self.random.randint(0, _MAX_SEED), max_tokens=limit) for limit in limits]

    def _cache_salt(self, context: RequestContext, body: CallBody) -> bytes:
        """Return the salt for the prompt's KV: the client's own and, unless keys share, its key's."""
        own = (body.cache_salt or "").encode()
        return own if self.shares_prefixes or not context.tenant else context.tenant + own

    def requests(
        self,
        context: RequestContext,
        version: Version,
        body: CallBody,
        prompts: Sequence[PromptText],
        sampling: Sequence[SamplingParams],
    ) -> Iterator[RouterRequest]:
        """Make a call's requests, one by one: each copies its prompt."""
        salt, own_priority = self._cache_salt(context, body), None if context.is_background else body.priority
        objectives = BACKGROUND if context.is_background else self.classes.named(context.request_class)
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            yield RouterRequest(
                f"{context.request_id}-{index}{context.run}",
                prompt.token_ids,
                params,
                n=body.num_choices,
                priority=objectives.priority if own_priority is None else own_priority,
                cache_salt=salt,
                request_class=context.request_class,
                objectives=objectives,
                tenant=tenant_of(context.tenant, body),
                model=version.served_name,
                adapter=version.adapter,
                is_background=context.is_background,
                takes_less=isinstance(body, GenerationBody),
            )

    def reply(self, answer: Answer, form: Form, body: GenerationBody, events: EventFormat = OPENAI_EVENTS) -> Reply:
        """Answer with one JSON body, or as a stream where `body` asks for one."""
        options = body.stream_options
        return Reply(
            answer,
            form,
            stream=bool(body.stream),
            include_usage=options is not None and bool(options.include_usage),
            in_flight=self.in_flight,
            observer=self.observer,
            events=events,
        )
