"""The dispatcher tells an observer what happens: metrics and logs live elsewhere."""

from __future__ import annotations

from typing import Protocol

from ...wire.workers import TransferReport
from .outcome import ServiceOutcome
from .request import RouterRequest


class Observer(Protocol):
    """Called on the dispatcher's loop; must neither wait nor call back into the dispatcher."""

    def on_submitted(self, request: RouterRequest) -> None:
        """A request came that workers can hold, whether it is taken or refused: one that they cannot is no load."""
        ...

    def on_finished(self, request: RouterRequest) -> None:
        """The request has reached its one terminal state (`request.status`)."""
        ...

    def on_outcome(self, outcome: ServiceOutcome) -> None:
        """Note the end of a request, held against its objectives."""
        ...

    def on_placed(self, policy: str, reason: str) -> None:
        """A request was sent to workers. `policy`: who decided; `reason`: the rule."""
        ...

    def on_transfer(self, report: TransferReport) -> None:
        """A prefill worker's shipment ended."""
        ...

    def on_fallback(self, kind: str) -> None:
        """A request takes a way that the operator did not plan: "local_prefill"."""
        ...

    def on_retry(self, stage: str, reason: str) -> None:
        """An attempt failed. `stage`: reserve, prefill, transfer, decode."""
        ...

    def on_dropped(self, kind: str) -> None:
        """A message or token was dropped: stale_attempt, unknown_request, duplicate, mismatch, ..."""
        ...

    def on_rejected(self, reason: str) -> None:
        """A request was refused, or sent away from the queue: queue_full, objective, deadline, displaced, late."""
        ...

    def on_poisoned(self) -> None:
        """A request was refused because workers were lost again and again while they computed it."""
        ...

    def on_budget_exhausted(self) -> None:
        """A request failed because too much was retried already."""
        ...

    def on_resumed(self, result: str) -> None:
        """Note how a stream's pause for a lost worker ended: "ok", its next token came; "failed"; "aborted"."""
        ...

    def on_drain(self) -> None:
        """A worker takes nothing new and will leave."""
        ...


class NullObserver:
    """Counts nothing."""

    def on_submitted(self, request: RouterRequest) -> None: ...

    def on_finished(self, request: RouterRequest) -> None: ...

    def on_outcome(self, outcome: ServiceOutcome) -> None: ...

    def on_placed(self, policy: str, reason: str) -> None: ...

    def on_transfer(self, report: TransferReport) -> None: ...

    def on_fallback(self, kind: str) -> None: ...

    def on_retry(self, stage: str, reason: str) -> None: ...

    def on_dropped(self, kind: str) -> None: ...

    def on_rejected(self, reason: str) -> None: ...

    def on_poisoned(self) -> None: ...

    def on_budget_exhausted(self) -> None: ...

    def on_resumed(self, result: str) -> None: ...

    def on_drain(self) -> None: ...
