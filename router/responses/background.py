"""Responses for clients that do not wait: `background: true`, a state at once, and the answer when it is asked for.

    POST ─> admitted ─> its state, `in_progress` ─> computed by a task of this router ─> completed, incomplete, failed
                             GET shows it, from any router  <─────────────┘                  or cancelled
    with `stream`: its events go to a file, which POST and GET follow (`event_stream.py`)

The answer is kept as one with an Idempotency-Key is: when its router ends, however it ends, the next one that looks
goes on with it behind the last token that was computed, and the last event that was told. Those that are computed here
are `runs.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial

import msgspec
import structlog
from fastapi import Request
from starlette.responses import Response
from starlette.types import Scope

from ...common.errors import CapacityError, RequestError
from ..api.body import WholeBody
from ..api.generation import Api
from ..api.json_answers import Json
from ..api.middleware import RequestContext, context_of, enter, leave, log_fault, send_part
from ..api.reply import Reply
from ..state.classes import CLASS_HEADER, TIMEOUT_HEADER
from ..state.errors import STORAGE_UNAVAILABLE, StreamError, clip, failure_of
from ..state.request import RUN_MARK
from .event_files import comes_within
from .event_stream import EventStream
from .kept import RESPONSE_PREFIX, KeptResponses, response_name
from .runs import LEFT_TO_OTHERS, Runs
from .states import CANCELLED, BackgroundStates, failed
from .surface import PATH, ResponsesSurface
from .task_folder import HeldTask, Task
from .unattended import Sink, compute

LOOK_EVERY_S = 0.25  # for tasks of a router that has ended, and for who wants one cancelled
CANCEL_WITHIN_S = 5.0
_GROWS_WITHIN_S = 0.05  # events of another router's run are looked for again
_LOST = "the beginning of the answer is not kept any more"
_HEADERS = tuple(name.encode() for name in (CLASS_HEADER, TIMEOUT_HEADER))

log = structlog.get_logger(__name__)


class BackgroundResponses:
    """`BackgroundResponses` begins them, shows them to clients, and takes over those of others. Belongs to a loop."""

    def __init__(self, api: Api, kept: KeptResponses, states: BackgroundStates | None) -> None:
        """`states`: None, where there is no folder for them, and nothing is computed so."""
        self._api = api
        self._kept = kept
        self._runs = None if states is None else Runs(states)
        self._leaving = asyncio.Event()

    @property
    def are_possible(self) -> bool:
        return self._runs is not None

    async def begin(self, scope: Scope, reply: Reply, surface: ResponsesSurface) -> Response:
        """Take over an answer that was admitted. Returns its state, for the client, or its events as they come.

        Raises StreamError (503) where it cannot be kept, RequestError (413) where it is too long for that.
        """
        assert self._runs is not None
        context, sink, state = context_of(scope), Sink(), surface.begun
        headers = tuple((name, context.headers[name]) for name in _HEADERS if name in context.headers)
        task = Task(str(state["id"]), context.tenant, surface.asked, headers)
        own = replace(context, send=sink.send, write=partial(send_part, sink.send), chunk_encoder=None)
        context.allowance = None  # it is the run's
        encoded = msgspec.json.encode(state)
        try:
            self._runs.check_room()
            asked = surface.what_is_asked(task.response_id)
            held, sink.events = self._runs.states.begin(task, encoded, surface.first_events, asked)
        except (OSError, RequestError) as error:
            reply.end(StreamError("it cannot be kept", "not_kept", 503))
            await compute(reply, own, sink)
            if isinstance(error, RequestError):
                raise
            text = f"background: the response cannot be kept: {error.strerror or error}"
            raise StreamError(text, "not_kept", 503) from error
        self._runs.start(held, reply, own, sink, surface)
        if sink.events is not None:
            return self.follow(task.response_id, task.tenant, -1)
        return Json(encoded)

    def shown(self, response_id: str, tenant: bytes) -> bytes:
        """Return a response as it is kept; ended before, if nobody can go on with it. Raises RequestError (404)."""
        if self._runs is None or self._runs.get(response_name(response_id, tenant)) is not None:
            return self._kept.response(response_id, tenant)
        return self._runs.states.settled(response_id, tenant)

    def follow(self, response_id: str, tenant: bytes, after: int) -> Response:
        """Return the events of a response behind this one, as they come; -1: all.

        Raises RequestError (404; 400 for one that does not stream), StreamError (503).
        """
        self.shown(response_id, tenant)
        name, runs = response_name(response_id, tenant), self._runs
        try:
            reader = None if runs is None else runs.states.events.reader(name, after)
        except OSError as error:
            raise StreamError(f"its events cannot be read: {error.strerror or error}", "not_kept", 503) from error
        if runs is None or reader is None:
            text = "stream: only a background response that was begun with 'stream' has events that are kept"
            raise RequestError(text, param="stream", code="unsupported_value")

        async def grows() -> None:
            run = runs.get(name)
            if run is not None and run.sink.events is not None:
                await run.sink.events.grows(LOOK_EVERY_S)
            else:
                await asyncio.sleep(_GROWS_WITHIN_S)

        def is_over() -> bool:
            if runs.get(name) is not None or runs.states.tasks.has(name):
                return False
            with contextlib.suppress(RequestError, OSError):  # it is not kept any more, or cannot be read now
                self.shown(response_id, tenant)
            return True

        return EventStream(reader, is_over, grows, self._api.in_flight)

    def forget(self, response_id: str, tenant: bytes) -> None:
        """Forget the events of a response that has ended."""
        if self._runs is not None:
            self._runs.states.events.delete(response_name(response_id, tenant))

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
        while self._runs is not None and self._runs.states.is_under_way(response_id, tenant):
            if loop.time() > until_s:
                raise StreamError("whoever computes the response has not ended it", "cancellation_pending", 503)
            if has_looked:
                await asyncio.sleep(LOOK_EVERY_S / 2)
            has_looked = True
            try:
                await self._try_to_stop(self._runs, response_id, tenant)
            except OSError as error:
                raise StreamError(f"it cannot be kept: {error.strerror or error}", "not_kept", 503) from error

    async def _try_to_stop(self, runs: Runs, response_id: str, tenant: bytes) -> None:
        name, tasks = response_name(response_id, tenant), runs.states.tasks
        if (run := runs.get(name)) is not None and run.task is not None:
            run.cancel()
            await asyncio.wait([run.task])
        elif (held := tasks.take(name)) is not None:
            runs.end(held, CANCELLED)
        elif tasks.has(name):
            tasks.ask_to_cancel(name)
        else:  # it has ended meanwhile, or its file was lost
            runs.states.change(response_id, tenant, CANCELLED)

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Look for tasks that nobody computes while the block runs. What is under way at its end is left to others."""
        if self._runs is None:
            yield
            return
        looking = asyncio.create_task(self._look(self._runs))
        try:
            yield
        finally:
            self._leaving.set()
            await asyncio.wait([looking])  # not cancelled: what it holds would be held until this process ends
            await self._runs.leave()

    # --- those of others --------------------------------------------------------------------------------------

    async def _look(self, runs: Runs) -> None:
        reason = ""  # why nobody could look the last time: told once
        while not await comes_within(self._leaving, LOOK_EVERY_S):
            try:
                room = 0 if self._api.catalogue.ready() else runs.num_free
                cancelled, free = await asyncio.to_thread(runs.states.tasks.look, runs.not_now(), room)
                for name in cancelled:
                    if (run := runs.get(name)) is not None:
                        run.cancel()
                for held in free:
                    await self._go_on(runs, held)
                reason = ""
            except OSError as error:
                before, reason = reason, error.strerror or str(error)
                if reason != before:
                    log.warning("background_responses", reason=reason)
            except Exception:  # whatever it is, this router looks again
                log.exception("background_responses_failed")

    async def _go_on(self, runs: Runs, held: HeldTask) -> None:
        """Compute what another router has begun, unless it has ended, or is too old to be kept."""
        events, has_begun = None, False
        try:
            events = await asyncio.to_thread(runs.states.events.go_on, held.name)
            if runs.states.has_to_go_on(held.task, events):
                has_begun = await self._begin_again(runs, held, Sink(events))
            else:
                runs.end(held, {})
        except OSError as error:  # nobody can say now
            log.warning("background_responses", reason=error.strerror or str(error))
            runs.put_off(held)
        except Exception:  # whatever it is, others are looked at: nobody else would
            log.exception("background_response_failed", response_id=held.task.response_id)
            runs.put_off(held)
        finally:
            if events is not None and not has_begun:
                events.close()

    async def _begin_again(self, runs: Runs, held: HeldTask, sink: Sink) -> bool:
        """Return whether its run has begun; else it has ended, or is left to others."""
        task = held.task
        request_id = task.response_id.removeprefix(RESPONSE_PREFIX)
        body = WholeBody(task.body)
        headers = {**dict(task.headers), **body.headers}
        write = partial(send_part, sink.send)
        now_s = self._api.clock.now()
        context = RequestContext(
            request_id,
            request_id,
            now_s,
            sink.send,
            write,
            headers=headers,
            tenant=task.tenant,
            # To a worker, whatever another router asks for under a name that it knows is the same attempt.
            run=f"{RUN_MARK}{secrets.token_hex(4)}",
        )
        scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": [*headers.items()]}
        enter(scope, context)
        num_told = 0 if sink.events is None else sink.events.num_events
        surface = ResponsesSurface(self._kept, task.tenant, request_id, goes_on=True, num_told=num_told)
        try:
            reply = await self._api.chat(Request(scope, body), surface)
        except CapacityError:  # nothing is free now: it waits for the next look
            held.release()
        except Exception as error:
            log_fault(error, request_id)
            failure = failure_of(error)
            if failure.code in LEFT_TO_OTHERS:
                held.release()
            elif failure.code == STORAGE_UNAVAILABLE:  # what it goes on behind cannot be read now
                runs.put_off(held)
            else:
                is_lost = failure.code == "answer_not_kept"
                runs.end(held, failed(500, _LOST) if is_lost else failed(failure.status, failure.message))
        else:
            log.info("background_response_goes_on", request_id=request_id)
            if sink.events is not None:
                sink.events.add_missing(surface.first_events)
            run = runs.start(held, reply, context, sink, surface)
            if not reply.is_kept:  # nobody could say what it goes on behind, nor would it be kept to its end
                run.put_off()
            return True
        finally:
            leave(scope)
        if context.allowance is not None:
            context.allowance.leave()
        return False
