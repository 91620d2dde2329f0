"""The agent that a rank writes and reads through, and its replacement where nothing else ends what it still does.

    is_due ─> nothing new is posted ─> no write of a shipment is under way ─> replace ─> connections begin anew

What failed of it may go on to copy, into a decode worker's memory (`closings.py`) or into our own
(`../fetch/reader.py`). Both share the agent, so it goes when either of them needs its end.
"""

from __future__ import annotations

import structlog

from ...common.errors import TransferError
from ..backends.base import TransferBackend
from ..fetch.reader import KVReader
from .closings import Closings
from .writes import Writes

log = structlog.get_logger(__name__)


class OutgoingAgent:
    """One source rank's. Driven by its transfer thread alone."""

    def __init__(
        self, backend: TransferBackend, writes: Writes, closings: Closings, reader: KVReader | None, *, rank: int
    ) -> None:
        """`reader` None: there are no reads."""
        self._backend = backend
        self._writes = writes
        self._closings = closings
        self._reader = reader
        self._rank = rank
        self._generation = 0

    def is_due(self, now: float) -> bool:
        """Tell whether the agent is to go once no write of a shipment is under way: until then none is posted."""
        return self._closings.wants_new_agent(now) or (self._reader is not None and self._reader.wants_new_agent(now))

    def replace(self, now: float) -> bool:
        """Everything that ours still does ends with it, and all connections. False: there is none yet, try again."""
        self._generation += 1
        self._writes.clear()
        try:
            self._backend.rotate(self._generation)
        except TransferError as error:
            self._closings.try_later(now)
            log.warning("transfer_agent_not_replaced", rank=self._rank, reason=str(error))
            return False
        finally:
            if self._reader is not None:
                self._reader.agent_replaced(now)
        self._closings.detached(now)
        return True
