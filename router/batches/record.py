"""A batch's record: what `batch.json` says, and the states that it goes through.

validating ──> in_progress ──> finalizing ──> completed
    │   │          │   │   │        │
    │   │          │   └───┼────────┼──────> expired      its window is over: what was answered is in its files
    │   └──────────┴───────┼> cancelling ──> cancelled    likewise
    └──────────────────────┴───────────────> failed       its input is wrong, and no line was asked; or it is gone
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from ...common.errors import InvalidTransition
from .usage import BatchUsage


class BatchStatus(StrEnum):
    VALIDATING = "validating"  # it was created
    IN_PROGRESS = "in_progress"  # its lines are well formed, and are asked
    FINALIZING = "finalizing"  # every line has an answer; its files are being written
    COMPLETED = "completed"  # its files are there
    FAILED = "failed"  # its input is wrong, `errors` says where; or gone, and what was answered is in its files
    EXPIRED = "expired"  # its window was over before every line had an answer
    CANCELLING = "cancelling"  # its owner wants no more; its files are being written
    CANCELLED = "cancelled"  # what was answered before that is in its files


_S = BatchStatus
_NEXT: dict[BatchStatus, frozenset[BatchStatus]] = {
    _S.VALIDATING: frozenset({_S.IN_PROGRESS, _S.FAILED, _S.CANCELLING, _S.EXPIRED}),
    _S.IN_PROGRESS: frozenset({_S.FINALIZING, _S.FAILED, _S.CANCELLING, _S.EXPIRED}),
    _S.FINALIZING: frozenset({_S.COMPLETED}),
    _S.CANCELLING: frozenset({_S.CANCELLED}),
    _S.COMPLETED: frozenset(),
    _S.FAILED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.CANCELLED: frozenset(),
}
ENDED = frozenset(status for status, following in _NEXT.items() if not following)
CANCELLABLE = frozenset(status for status, following in _NEXT.items() if _S.CANCELLING in following)
_ASKED = ("endpoint", "input_file_id", "completion_window", "metadata", "output_lifetime_s")  # by its request
_STAMPS = [status for status in BatchStatus if status is not _S.VALIDATING]


class InputFault(msgspec.Struct):
    """Something wrong with an input file, in OpenAI's form. Lines count from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchRecord(msgspec.Struct, kw_only=True):
    """One batch. Times are seconds since 1970."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    created_at: int
    created_ns: int  # orders batches of one second
    expires_at: int
    output_lifetime_s: float | None = None
    model: str | None = None  # that the router served which took it: one with other models leaves it alone
    taken_by: str = ""  # that router's life: it knows better than others which models there are
    status: BatchStatus = BatchStatus.VALIDATING
    stamps: dict[BatchStatus, int] = msgspec.field(default_factory=dict)  # when each state was reached
    errors: list[InputFault] = []  # or, while it has not ended, what its lines wait for
    total: int = 0  # lines
    completed: int = 0
    failed: int = 0
    usage: BatchUsage | None = None  # of the lines that have an answer; None: not counted
    output_file_id: str | None = None
    error_file_id: str | None = None

    def asks_like(self, other: BatchRecord) -> bool:
        """Tell whether the same request makes both."""
        return all(getattr(self, name) == getattr(other, name) for name in _ASKED)

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def advance(self, to: BatchStatus, now_s: float) -> None:
        """The one way to change `status`."""
        if to not in _NEXT[self.status]:
            raise InvalidTransition(f"batch {self.id}: {self.status} -> {to}")
        self.status = to
        self.stamps[to] = int(now_s)

    def shown(self, cancel_asked_s: float | None = None) -> dict[str, object]:
        """Return OpenAI's object. `cancel_asked_s`: when somebody asked to cancel it: its runner may not know yet."""
        status, stamps = self.status, dict(self.stamps)
        if cancel_asked_s is not None and status in CANCELLABLE:
            status = BatchStatus.CANCELLING
            stamps[status] = int(cancel_asked_s)
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": msgspec.to_builtins(self.errors)} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{each}_at": stamps.get(each) for each in _STAMPS},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "usage": self.usage.shown() if self.usage is not None else None,
            "metadata": self.metadata,
        }
