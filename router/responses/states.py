"""Background responses while they are under way: the state, the task and, where it streams, the events of each.

begin ─> (its run, at one router after the other) ─> ended: with the answer, or by a change of its state
"""

from __future__ import annotations

import contextlib
import errno

import msgspec
import structlog

from ...common.errors import RequestError
from .conversation import Asked
from .event_files import EventFile, EventFolder
from .form import Fields, failed_event
from .kept import KeptResponses, response_name
from .task_folder import HeldTask, Task, TaskFolder

_UNDER_WAY = frozenset({"queued", "in_progress"})
CANCELLED: Fields = {"status": "cancelled"}
_ANSWERED = frozenset({"completed", "incomplete"})
_TASK_LOST = "what was asked is not kept any more: ask again"


class _Status(msgspec.Struct):
    status: str


_status = msgspec.json.Decoder(_Status).decode


def _is_under_way(response: bytes) -> bool:
    return _status(response).status in _UNDER_WAY


log = structlog.get_logger(__name__)


class BackgroundStates:
    """`BackgroundStates` is one router's view of them."""

    def __init__(self, kept: KeptResponses, tasks: TaskFolder, events: EventFolder) -> None:
        self._kept = kept
        self.tasks = tasks
        self.events = events

    def begin(self, task: Task, state: bytes, events: bytes, asked: Asked) -> tuple[HeldTask, EventFile | None]:
        """Keep and hold a new one. `events` are its first ones; empty: it does not stream. Raises OSError."""
        name = response_name(task.response_id, task.tenant)
        file = self.events.create(name, events) if events else None
        held = None
        try:
            held = self.tasks.create(name, task)
            self._kept.keep_state(task.response_id, task.tenant, state, asked)
        except BaseException:
            if held is not None:
                self.tasks.end(held)
            if file is not None:
                file.close()
                self.events.delete(name)
            raise
        return held, file

    def state(self, response_id: str, tenant: bytes) -> Fields:
        """Raises RequestError (404)."""
        state: Fields = msgspec.json.decode(self._kept.response(response_id, tenant))
        return state

    def is_under_way(self, response_id: str, tenant: bytes) -> bool:
        """Raises RequestError (404)."""
        return _is_under_way(self._kept.response(response_id, tenant))

    def has_to_go_on(self, task: Task, events: EventFile | None) -> bool:
        """Tell whether there is more to compute of it, or to tell of what was computed. Raises OSError."""
        try:
            status = self.state(task.response_id, task.tenant)["status"]
        except RequestError:  # it is not kept any more
            return False
        has_untold = events is not None and not events.has_last
        return status in _UNDER_WAY or (has_untold and status in _ANSWERED)

    def change(self, response_id: str, tenant: bytes, change: Fields) -> Fields:
        """Change the state of one that nobody has ended before. Returns it. Raises OSError, and RequestError (404)."""
        state = self.state(response_id, tenant)
        if state["status"] in _UNDER_WAY:
            state |= change
            self._kept.change_state(response_id, tenant, msgspec.json.encode(state))
        return state

    def settled(self, response_id: str, tenant: bytes) -> bytes:
        """Return one as it is kept, after ending one whose task was lost, as in a machine's crash: it would never end.

        For who does not compute it. Raises RequestError (404).
        """
        name, shown = response_name(response_id, tenant), self._kept.response(response_id, tenant)
        try:
            if _is_under_way(shown) and not self.tasks.has(name):
                state = self.change(response_id, tenant, failed(500, _TASK_LOST))  # unless it has ended between the two
                self._tell_failure(name, state)
                return msgspec.json.encode(state)
        except OSError as error:  # the next one who asks ends it
            log.warning("background_responses", reason=error.strerror or str(error))
        return shown

    def end(self, held: HeldTask, change: Fields | None) -> bool:
        """End the task of one that has ended. Returns false where that cannot be kept now: it is held on.

        `change`: how it has ended, where no answer is kept, and nobody has ended it before; None: with its answer.
        """
        task = held.task
        try:
            with contextlib.suppress(RequestError):  # it is not kept any more
                if change is None and self.is_under_way(task.response_id, task.tenant):
                    raise OSError(errno.EIO, "the answer could not be kept")
                self._tell_failure(held.name, self.change(task.response_id, task.tenant, change or {}))
        except OSError as error:  # it is told again from what is kept, until there is room
            log.warning("background_responses", reason=error.strerror or str(error))
            return False
        self.tasks.end(held)
        return True

    def _tell_failure(self, name: str, state: Fields) -> None:
        """Let the last event be told, where it is not the answer's own."""
        if state["status"] != "failed" or (file := self.events.go_on(name)) is None:
            return
        with contextlib.closing(file):
            if not file.has_last:
                file.add(failed_event(file.num_events, state))


def failed(status: int, message: str) -> Fields:
    """Return what a response says that failed: OpenAI's libraries know few codes."""
    code = "server_error" if status >= 500 else "invalid_prompt"
    return {"status": "failed", "error": {"code": code, "message": message}}
