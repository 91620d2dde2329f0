"""Responses for clients that do not wait: `background: true`, a state at once, and the answer when it is asked for.

    POST ─> admitted ─> its state, `in_progress` ─> computed by a task of this router ─> completed, incomplete, failed
                             GET shows it, from any router  <─────────────┘                  or cancelled

The answer is kept as one with an Idempotency-Key is: when its router ends, however it ends, the next one that looks
goes on with it behind the last token that was computed.
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
from starlette.types import Scope

from ...common.errors import CapacityError, RequestError
from ..api.body import WholeBody
from ..api.generation import Api
from ..api.middleware import RequestContext, context_of, enter, leave, send_part
from ..api.reply import Reply
from ..kept.files import share_of_open_files
from ..state.classes import CLASS_HEADER, TIMEOUT_HEADER
from ..state.errors import StreamError, clip, failure_of
from .form import Fields
from .kept import RESPONSE_PREFIX, KeptResponses, response_name
from .surface import PATH, ResponsesSurface
from .task_folder import HeldTask, Task, TaskFolder
from .unattended import Sink, compute, told

LOOK_EVERY_S = 0.25  # for tasks of a router that has ended, and for who wants one cancelled
CANCEL_WITHIN_S = 5.0
_FILES_SHARE = 6  # one for so many open files: each has two
# Codes of errors that are none of the answer's: this router ends, another one has it, or serves that model.
_LEFT_TO_OTHERS = frozenset(
    {"shutting_down", "router_stopping", "taken_over", "idempotency_key_in_use", "model_not_found"}
)
_UNDER_WAY = frozenset({"queued", "in_progress"})
_HEADERS = tuple(name.encode() for name in (CLASS_HEADER, TIMEOUT_HEADER))

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Run:
    held: HeldTask
    reply: Reply
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        self.is_cancelled = True
        self.reply.end(StreamError("the response was cancelled", "cancelled", 409))

    def leave_to_others(self) -> None:
        self.reply.end(StreamError("the server is shutting down", "shutting_down", 503))


class BackgroundResponses:
    """`BackgroundResponses` owns those that this router computes. Belongs to its loop."""

    def __init__(self, api: Api, kept: KeptResponses, folder: TaskFolder | None) -> None:
        """`folder`: None, where there is none, and nothing is computed so."""
        self._api = api
        self._kept = kept
        self._folder = folder
        self._runs: dict[str, _Run] = {}  # by name
        self._max_runs = share_of_open_files(_FILES_SHARE)
        self._is_leaving = False

    @property
    def are_possible(self) -> bool:
        return self._folder is not None

    async def begin(self, scope: Scope, reply: Reply, surface: ResponsesSurface) -> bytes:
        """Take over an answer that was admitted. Returns its state, for the client.

        Raises StreamError (503) where it cannot be kept.
        """
        context, sink, state = context_of(scope), Sink(), surface.begun
        headers = tuple((name, context.headers[name]) for name in _HEADERS if name in context.headers)
        task = Task(str(state["id"]), context.tenant, surface.asked, headers)
        own = replace(context, send=sink.send, write=partial(send_part, sink.send), chunk_encoder=None)
        context.allowance = None  # it is the run's
        encoded = msgspec.json.encode(state)
        try:
            held = self._hold(task, encoded)
        except OSError as error:
            reply.end(StreamError("it cannot be kept", "not_kept", 503))
            await compute(reply, own, sink)
            text = f"background: the response cannot be kept: {error.strerror or error}"
            raise StreamError(text, "not_kept", 503) from error
        self._start(held, reply, own, sink)
        return encoded

    def _hold(self, task: Task, state: bytes) -> HeldTask:
        assert self._folder is not None
        if len(self._runs) >= self._max_runs:
            raise OSError(errno.EMFILE, f"{len(self._runs)} are computed at once")
        held = self._folder.create(response_name(task.response_id, task.tenant), task)
        try:
            self._kept.keep_state(task.response_id, task.tenant, state)
        except BaseException:
            self._folder.end(held)
            raise
        return held

    async def cancel(self, response_id: str, tenant: bytes) -> bytes:
        """Return the response once nobody computes it. Raises RequestError (404; 400 for one that is no such)."""
        await self.stop(response_id, tenant)
        if not self._state(response_id, tenant)["background"]:
            text = f"the response {clip(response_id)} is not a background response"
            raise RequestError(text, param="response_id", code="response_not_cancellable")
        return self._kept.response(response_id, tenant)

    async def stop(self, response_id: str, tenant: bytes) -> None:
        """Return once nobody computes it. Raises RequestError (404), StreamError (503) where it goes on."""
        loop, has_looked = asyncio.get_running_loop(), False
        until_s = loop.time() + CANCEL_WITHIN_S
        while self._folder is not None and self._state(response_id, tenant)["status"] in _UNDER_WAY:
            if loop.time() > until_s:
                raise StreamError("whoever computes the response has not ended it", "cancellation_pending", 503)
            if has_looked:
                await asyncio.sleep(LOOK_EVERY_S / 2)
            has_looked = True
            try:
                await self._try_to_stop(self._folder, response_id, tenant)
            except OSError as error:
                raise StreamError(f"it cannot be kept: {error.strerror or error}", "not_kept", 503) from error

    async def _try_to_stop(self, folder: TaskFolder, response_id: str, tenant: bytes) -> None:
        name = response_name(response_id, tenant)
        cancelled: Fields = {"status": "cancelled"}
        if (run := self._runs.get(name)) is not None and run.task is not None:
            run.cancel()
            await asyncio.wait([run.task])
        elif (held := folder.take(name)) is not None:
            self._end(held, cancelled)
        elif folder.has(name):
            folder.ask_to_cancel(name)
        elif self._state(response_id, tenant)["status"] in _UNDER_WAY:  # its file was lost
            self._change(response_id, tenant, cancelled)

    @contextlib.asynccontextmanager
    async def keeping(self) -> AsyncIterator[None]:
        """Look for tasks that nobody computes while the block runs. What is under way at its end is left to others."""
        looking = asyncio.create_task(self._look(self._folder)) if self._folder is not None else None
        try:
            yield
        finally:
            if looking is not None:
                looking.cancel()
                await asyncio.wait([looking])
            self._is_leaving = True
            for run in list(self._runs.values()):
                run.leave_to_others()
            if tasks := [run.task for run in self._runs.values() if run.task is not None]:
                await asyncio.wait(tasks)

    # --- one of them ------------------------------------------------------------------------------------------

    def _start(self, held: HeldTask, reply: Reply, context: RequestContext, sink: Sink) -> None:
        run = self._runs[held.name] = _Run(held, reply)
        if self._is_leaving:  # it has come by a connection that may ask once more
            run.leave_to_others()
        run.task = asyncio.create_task(self._compute(run, context, sink))

    async def _compute(self, run: _Run, context: RequestContext, sink: Sink) -> None:
        try:
            failure = await compute(run.reply, context, sink)
        finally:
            del self._runs[run.held.name]
        code, message = told(failure, sink)
        if failure is None and sink.status == 200:
            self._end(run.held, _failed(500, "the answer is too long to be kept"), unless_kept=True)  # by its form
        elif run.is_cancelled:
            self._end(run.held, {"status": "cancelled"})
        elif code in _LEFT_TO_OTHERS:
            run.held.release()
        else:
            self._end(run.held, _failed(sink.status or 500, message))

    def _end(self, held: HeldTask, change: Fields, *, unless_kept: bool = False) -> None:
        """Keep how it has ended, other than with an answer. `unless_kept`: an answer may be there."""
        assert self._folder is not None
        task = held.task
        try:
            with contextlib.suppress(RequestError):  # it is not kept any more
                if not unless_kept or self._is_under_way(task):
                    self._change(task.response_id, task.tenant, change)
        except OSError as error:
            log.warning("background_responses", reason=error.strerror or str(error))
            held.release()  # told again from what is kept, until there is room
        else:
            self._folder.end(held)

    def _is_under_way(self, task: Task) -> bool:
        try:
            return self._state(task.response_id, task.tenant)["status"] in _UNDER_WAY
        except RequestError:
            return False

    def _change(self, response_id: str, tenant: bytes, change: Fields) -> None:
        state = self._state(response_id, tenant) | change
        self._kept.keep_state(response_id, tenant, msgspec.json.encode(state))

    def _state(self, response_id: str, tenant: bytes) -> Fields:
        state: Fields = msgspec.json.decode(self._kept.response(response_id, tenant))
        return state

    # --- those of others --------------------------------------------------------------------------------------

    async def _look(self, folder: TaskFolder) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                room = 0 if self._api.catalogue.ready() else self._max_runs - len(self._runs)
                cancelled, free = await asyncio.to_thread(folder.look, frozenset(self._runs), room)
                for name in cancelled:
                    if (run := self._runs.get(name)) is not None:
                        run.cancel()
                for held in free:
                    await self._go_on(held)
            except OSError as error:
                log.warning("background_responses", reason=error.strerror or str(error))

    async def _go_on(self, held: HeldTask) -> None:
        """Compute what another router has begun, unless it has ended, or is too old to be kept."""
        task, sink = held.task, Sink()
        try:
            if not self._is_under_way(task):
                self._end(held, {}, unless_kept=True)
                return
        except OSError:  # nobody can say now: the next look may
            held.release()
            return
        request_id = task.response_id.removeprefix(RESPONSE_PREFIX)
        body = WholeBody(task.body)
        headers = {**dict(task.headers), **body.headers}
        write = partial(send_part, sink.send)
        now_s = self._api.clock.now()
        context = RequestContext(request_id, request_id, now_s, sink.send, write, headers=headers, tenant=task.tenant)
        scope: Scope = {"type": "http", "method": "POST", "path": PATH, "headers": [*headers.items()]}
        enter(scope, context)
        try:
            surface = ResponsesSurface(self._kept, task.tenant, request_id, goes_on=True)
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
                self._end(held, _failed(failure.status, failure.message))
        else:
            log.info("background_response_goes_on", request_id=request_id)
            self._start(held, reply, context, sink)
            return
        finally:
            leave(scope)
        if context.allowance is not None:
            context.allowance.leave()


def _failed(status: int, message: str) -> Fields:
    """Return what a response says that failed: OpenAI's libraries know few codes."""
    code = "server_error" if status >= 500 else "invalid_prompt"
    return {"status": "failed", "error": {"code": code, "message": message}}
