"""Answers that this router computes for clients that do not wait. Each holds its task until it has ended.

start ─> computed ─> ended: the task is gone
                 ├─> left to others, as this router ends
                 └─> put off for RETRY_S, as where the disk has no room for how it ended, or for its tokens

What was computed is told again from its tokens. Where these are not kept, it is not computed again: it has failed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Set
from dataclasses import dataclass

from ..api.middleware import RequestContext
from ..api.reply import Reply
from ..http.in_flight import shutting_down
from ..kept.files import share_of_open_files
from ..state.errors import HttpFailure, StreamError
from .form import Fields
from .states import CANCELLED, BackgroundStates, failed
from .surface import ResponsesSurface
from .task_folder import HeldTask
from .unattended import Sink, compute, told

RETRY_S = 10.0  # until this router looks again at one that it could not end, or not go on with
_FILES_SHARE = 8  # one for so many open files: each has two, or three
# Codes of errors that are none of the answer's: this router ends, another one has it, or serves that model.
LEFT_TO_OTHERS = frozenset(
    {"shutting_down", "router_stopping", "taken_over", "idempotency_key_in_use", "model_not_found"}
)

_NOT_NOW = "not_now"
_TOO_LONG, _NO_ROOM = "the answer is too long to be kept", "the answer could not be kept: ask again"


@dataclass(slots=True)
class Run:
    """One answer while it is computed."""

    held: HeldTask
    reply: Reply
    sink: Sink
    surface: ResponsesSurface
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        self.is_cancelled = True
        self.reply.end(StreamError("the response was cancelled", "cancelled", 409))

    def leave_to_others(self) -> None:
        self.reply.end(shutting_down())

    def put_off(self) -> None:
        self.reply.end(StreamError("its tokens cannot be kept now", _NOT_NOW, 503))


class Runs:
    """`Runs` owns them. Belongs to a loop."""

    def __init__(self, states: BackgroundStates) -> None:
        self.states = states
        self._by_name: dict[str, Run] = {}
        self._not_before_s: dict[str, float] = {}  # of those that were put off, on the loop's clock
        self._max = share_of_open_files(_FILES_SHARE)
        self._is_leaving = False

    @property
    def num_free(self) -> int:
        """Return how many more may be computed."""
        return self._max - len(self._by_name)

    def check_room(self) -> None:
        """Raises OSError where no more may be computed."""
        if self.num_free <= 0:
            raise OSError(errno.EMFILE, f"{len(self._by_name)} are computed at once")

    def get(self, name: str) -> Run | None:
        return self._by_name.get(name)

    def not_now(self) -> Set[str]:
        """Return the names of those that are computed here, and of those that were put off."""
        now_s = asyncio.get_running_loop().time()
        self._not_before_s = {name: at_s for name, at_s in self._not_before_s.items() if at_s > now_s}
        return self._by_name.keys() | self._not_before_s.keys()

    def start(
        self, held: HeldTask, reply: Reply, context: RequestContext, sink: Sink, surface: ResponsesSurface
    ) -> Run:
        run = self._by_name[held.name] = Run(held, reply, sink, surface)
        if self._is_leaving:  # it has come by a connection that may ask once more
            run.leave_to_others()
        run.task = asyncio.create_task(self._compute(run, context))
        return run

    async def leave(self) -> None:
        """Leave all to others, from here on."""
        self._is_leaving = True
        for run in list(self._by_name.values()):
            run.leave_to_others()
        if tasks := [run.task for run in self._by_name.values() if run.task is not None]:
            await asyncio.wait(tasks)

    def end(self, held: HeldTask, change: Fields | None) -> None:
        """Let go of one that has ended, as `BackgroundStates.end` does; put it off where that cannot be kept."""
        if not self.states.end(held, change):
            self.put_off(held)

    def put_off(self, held: HeldTask) -> None:
        """Leave one to others, and to this router in a while: what stands in its way now does so at the next look."""
        self._not_before_s[held.name] = asyncio.get_running_loop().time() + RETRY_S
        held.release()

    async def _compute(self, run: Run, context: RequestContext) -> None:
        try:
            failure = await compute(run.reply, context, run.sink)
        finally:
            del self._by_name[run.held.name]
            if run.sink.events is not None:
                run.sink.events.close()
        self._let_go(run, failure)

    def _let_go(self, run: Run, failure: HttpFailure | None) -> None:
        sink, held = run.sink, run.held
        code, message = told(failure, sink)
        if failure is None and sink.has_answer:
            reason = _TOO_LONG if run.surface.is_too_long else "" if run.reply.is_kept else _NO_ROOM
            self.end(held, failed(500, reason) if reason else None)
        elif run.is_cancelled:
            self.end(held, CANCELLED)
        elif code in LEFT_TO_OTHERS:
            held.release()
        elif code == _NOT_NOW:
            self.put_off(held)
        else:
            self.end(held, failed(sink.status if sink.status >= 400 else 500, message))
