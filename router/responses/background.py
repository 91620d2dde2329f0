"""Responses for clients that do not wait: `background: true`, a state at once, and the answer when it is asked for.

    POST ─> admitted ─> its state, `in_progress` ─> computed by a task of this router ─> completed, incomplete, failed
                             GET shows it, from any router  <─────────────┘                  or cancelled
    with `stream`: its events go to a file, which POST and GET follow (`event_stream.py`)

The answer is kept as one with an Idempotency-Key is: when its router ends, however it ends, the next one that looks
goes on with it behind the last token that was computed, and the last event that was told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Scope

from ...common.errors import CapacityError, RequestError
from ..api.body import WholeBody
from ..api.generation import Api
from ..api.middleware import RequestContext, context_of, enter, leave, send_part
from ..api.reply import Reply
from ..kept.files import share_of_open_files
from ..state.classes import CLASS_HEADER, TIMEOUT_HEADER
from ..state.errors import StreamError, clip, failure_of
from .event_files import EventFile, comes_within
from .event_stream import EventStream
from .kept import RESPONSE_PREFIX, KeptResponses, response_name
from .states import CANCELLED, BackgroundStates, failed
from .surface import PATH, ResponsesSurface
from .task_folder import HeldTask, Task
from .unattended import Sink, compute, told

LOOK_EVERY_S = 0.25  # for tasks of a router that has ended, and for who wants one cancelled
CANCEL_WITHIN_S = 5.0
_GROWS_WITHIN_S = 0.05  # events of another router's run are looked for again
_FILES_SHARE = 8  # one for so many open files: each has two, or three
# Codes of errors that are none of the answer's: this router ends, another one has it, or serves that model.
_LEFT_TO_OTHERS = frozenset(
    {"shutting_down", "router_stopping", "taken_over", "idempotency_key_in_use", "model_not_found"}
)
_LOST = "the beginning of the answer is not kept any more"
_HEADERS = tuple(name.encode() for name in (CLASS_HEADER, TIMEOUT_HEADER))

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Run:
    held: HeldTask
    reply: Reply
    sink: Sink
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        self.is_cancelled = True
        self.reply.end(StreamError("the response was cancelled", "cancelled", 409))

    def leave_to_others(self) -> None:
        self.reply.end(StreamError("the server is shutting down", "shutting_down", 503))


class BackgroundResponses:
    """`BackgroundResponses` owns those that this router computes. Belongs to its loop."""

    def __init__(self, api: Api, kept: KeptResponses, states: BackgroundStates | None) -> None:
        """`states`: None, where there is no folder for them, and nothing is computed so."""
        self._api = api
        self._kept = kept
        self._states = states
        self._runs: dict[str, _Run] = {}  # by name
        self._max_runs = share_of_open_files(_FILES_SHARE)
        self._leaving = asyncio.Event()

    @property
    def are_possible(self) -> bool:
        return self._states is not None

    async def begin(self, scope: Scope, reply: Reply, surface: ResponsesSurface) -> Response:
        """Take over an answer that was admitted. Returns its state, for the client, or its events as they come.

        Raises StreamError (503) where it cannot be kept.
        """
        context, sink, state = context_of(scope), Sink(), surface.begun
        headers = tuple((name, context.headers[name]) for name in _HEADERS if name in context.headers)
        task = Task(str(state["id"]), context.tenant, surface.asked, headers)
        own = replace(context, send=sink.send, write=partial(send_part, sink.send), chunk_encoder=None)
        context.allowance = None  # it is the run's
        encoded = msgspec.json.encode(state)
        try:
            held, sink.events = self._hold(task, encoded, surface)
        except OSError as error:
            reply.end(StreamError("it cannot be kept", "not_kept", 503))
            await compute(reply, own, sink)
            text = f"background: the response cannot be kept: {error.strerror or error}"
            raise StreamError(text, "not_kept", 503) from error
        self._start(held, reply, own, sink)
        if sink.events is not None:
            return self.follow(task.response_id, task.tenant, -1)
        return Response(encoded, media_type="application/json")

    def _hold(self, task: Task, state: bytes, surface: ResponsesSurface) -> tuple[HeldTask, EventFile | None]:
        assert self._states is not None
        if len(self._runs) >= self._max_runs:
            raise OSError(errno.EMFILE, f"{len(self._runs)} are computed at once")
        return self._states.begin(task, state, surface.first_events, surface.what_is_asked(task.response_id))

    def follow(self, response_id: str, tenant: bytes, after: int) -> Response:
        """Return the events of a response behind this one, as they come; -1: all.

        Raises RequestError (404; 400 for one that does not stream), StreamError (503).
        """
        self._kept.response(response_id, tenant)
        name, states = response_name(response_id, tenant), self._states
        try:
            reader = None if states is None else states.events.reader(name, after)
        except OSError as error:
            raise StreamError(f"its events cannot be read: {error.strerror or error}", "not_kept", 503) from error
        if states is None or reader is None:
            text = "stream: only a background response that was begun with 'stream' has events that are kept"
            raise RequestError(text, param="stream", code="unsupported_value")
        tasks = states.tasks

        async def grows() -> None:
            run = self._runs.get(name)
            if run is not None and run.sink.events is not None:
                await run.sink.events.grows(LOOK_EVERY_S)
            else:
                await asyncio.sleep(_GROWS_WITHIN_S)

        return EventStream(reader, lambda: not tasks.has(name), grows, self._api.in_flight)

    def forget(self, response_id: str, tenant: bytes) -> None:
        """Forget the events of a response that has ended."""
        if self._states is not None:
            self._states.events.delete(response_name(response_id, tenant))

    async def cancel(self, response_id: str, tenant: bytes) -> bytes:
        """Return the response once nobody computes it. Raises RequestError (404; 400 for one that is no such)."""
        await self.stop(response_id, tenant)
        response = self._kept.response(response_id, tenant)
        if not msgspec.json.decode(response)["background"]:
            text = f"the response {clip(response_id)} is not a background response"
            raise RequestError(text, param="response_id", code="response_not_cancellable")
        return response

    async def stop(self, response_id: str, tenant: bytes) -> None:
        """Return once nobody computes it. Raises RequestError (404), StreamError (503) where it goes on."""
        loop, has_looked = asyncio.get_running_loop(), False
        until_s = loop.time() + CANCEL_WITHIN_S
        while self._states is not None and self._states.is_under_way(response_id, tenant):
            if loop.time() > until_s:
                raise StreamError("whoever computes the response has not ended it", "cancellation_pending", 503)
            if has_looked:
                await asyncio.sleep(LOOK_EVERY_S / 2)
            has_looked = True
            try:
                await self._try_to_stop(self._states, response_id, tenant)
            except OSError as error:
                raise StreamError(f"it cannot be kept: {error.strerror or error}", "not_kept", 503) from error

    async def _try_to_stop(self, states: BackgroundStates, response_id: str, tenant: bytes) -> None:
        name, tasks = response_name(response_id, tenant), states.tasks
        if (run := self._runs.get(name)) is not None and run.task is not None:
            run.cancel()
            await asyncio.wait([run.task])
        elif (held := tasks.take(name)) is not None:
            states.end(held, CANCELLED)
        elif tasks.has(name):
            tasks.ask_to_cancel(name)
        else:  # it has ended meanwhile, or its file was lost
            states.change(response_id, tenant, CANCELLED)

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Look for tasks that nobody computes while the block runs. What is under way at its end is left to others."""
        looking = asyncio.create_task(self._look(self._states)) if self._states is not None else None
        try:
            yield
        finally:
            self._leaving.set()
            if looking is not None:
                await asyncio.wait([looking])  # not cancelled: what it holds would be held until this process ends
            for run in list(self._runs.values()):
                run.leave_to_others()
            if tasks := [run.task for run in self._runs.values() if run.task is not None]:
                await asyncio.wait(tasks)

    # --- one of them ------------------------------------------------------------------------------------------

    def _start(self, held: HeldTask, reply: Reply, context: RequestContext, sink: Sink) -> _Run:
        run = self._runs[held.name] = _Run(held, reply, sink)
        if self._leaving.is_set():  # it has come by a connection that may ask once more
            run.leave_to_others()
        run.task = asyncio.create_task(self._compute(run, context))
        return run

    async def _compute(self, run: _Run, context: RequestContext) -> None:
        assert self._states is not None
        sink, held = run.sink, run.held
        try:
            failure = await compute(run.reply, context, sink)
        finally:
            del self._runs[held.name]
            if sink.events is not None:
                sink.events.close()
        code, message = told(failure, sink)
        if failure is None and sink.has_answer:
            self._states.end(held, failed(500, "the answer is too long to be kept"))  # else its form has kept it
        elif run.is_cancelled:
            self._states.end(held, CANCELLED)
        elif code in _LEFT_TO_OTHERS:
            held.release()
        else:
            self._states.end(held, failed(sink.status if sink.status >= 400 else 500, message))

    # --- those of others --------------------------------------------------------------------------------------

    async def _look(self, states: BackgroundStates) -> None:
        while not await comes_within(self._leaving, LOOK_EVERY_S):
            try:
                room = 0 if self._api.catalogue.ready() else self._max_runs - len(self._runs)
                cancelled, free = await asyncio.to_thread(states.tasks.look, frozenset(self._runs), room)
                for name in cancelled:
                    if (run := self._runs.get(name)) is not None:
                        run.cancel()
                for held in free:
                    await self._go_on(states, held)
            except OSError as error:
                log.warning("background_responses", reason=error.strerror or str(error))

    async def _go_on(self, states: BackgroundStates, held: HeldTask) -> None:
        """Compute what another router has begun, unless it has ended, or is too old to be kept."""
        try:
            events = await asyncio.to_thread(states.events.go_on, held.name)
        except OSError:  # nobody can say now: the next look may
            held.release()
            return
        has_begun = False
        try:
            if states.has_to_go_on(held.task, events):
                has_begun = await self._begin_again(states, held, Sink(events))
            else:
                states.end(held, {})
        except OSError:
            held.release()
        finally:
            if events is not None and not has_begun:
                events.close()

    async def _begin_again(self, states: BackgroundStates, held: HeldTask, sink: Sink) -> bool:
        """Return whether its run has begun; else it has ended, or is left to others."""
        task = held.task
        request_id = task.response_id.removeprefix(RESPONSE_PREFIX)
        body = WholeBody(task.body)
        headers = {**dict(task.headers), **body.headers}
        write = partial(send_part, sink.send)
        now_s = self._api.clock.now()
        context = RequestContext(request_id, request_id, now_s, sink.send, write, headers=headers, tenant=task.tenant)
        scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": [*headers.items()]}
        enter(scope, context)
        num_told = 0 if sink.events is None else sink.events.num_events
        surface = ResponsesSurface(self._kept, task.tenant, request_id, goes_on=True, num_told=num_told)
        try:
            reply = await self._api.chat(Request(scope, body), surface)
        except CapacityError:  # nothing is free now: it waits for the next look
            held.release()
        except Exception as error:
            if not isinstance(error, (RequestError, StreamError)):
                log.exception("request_error", request_id=request_id)
            failure = failure_of(error)
            if failure.code in _LEFT_TO_OTHERS:
                held.release()
            else:
                message = _LOST if failure.code == "answer_not_kept" else failure.message
                states.end(held, failed(failure.status, message))
        else:
            log.info("background_response_goes_on", request_id=request_id)
            run = self._start(held, reply, context, sink)
            if surface.key is not None and surface.key.after and not reply.is_kept:
                run.leave_to_others()  # nobody could say which events it goes on behind
            return True
        finally:
            leave(scope)
        if context.allowance is not None:
            context.allowance.leave()
        return False
