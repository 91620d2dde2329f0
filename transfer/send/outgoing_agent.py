"""The agent that a rank writes and reads through, and its replacement where nothing else ends what it still does.

    is_due ─> nothing new is posted ─> no write of a shipment is under way ─> replace ─> connections begin anew

What failed of it may go on to copy, into a decode worker's memory (`closings.py`) or into our own
(`../fetch/reader.py`). Both share the agent, so it goes when either of them needs its end, and both have that as soon
as it is gone. So has what is left of connections that failed (`../backends/peers.py`). Where no new one can be made, as
while an interface is down, it is due again every second until there is one, whether or not anybody needs anything of
it. Where the new one lacks a network device it is due ever more rarely, until one has it.
"""

from __future__ import annotations

import structlog

from ...common.errors import TransferError
from ..backends.base import TransferBackend
from ..backends.peers import Peers
from ..backends.reach import Repair
from ..fetch.reader import KVReader
from .closings import Closings
from .writes import Writes

RETRY_S = 1.0  # after a try that left us without an agent

log = structlog.get_logger(__name__)


class OutgoingAgent:
    """One source rank's. Driven by its transfer thread alone."""

    def __init__(
        self,
        backend: TransferBackend,
        peers: Peers,
        writes: Writes,
        closings: Closings,
        reader: KVReader | None,
        *,
        rank: int,
    ) -> None:
        """`reader` None: there are no reads."""
        self._backend = backend
        self._peers = peers
        self._writes = writes
        self._closings = closings
        self._reader = reader
        self._rank = rank
        self._generation = 0
        self._repair = Repair()
        self._retry_at: float | None = None  # there is no agent, and one is to be made then; None: there is one

    def is_due(self, now: float) -> bool:
        """Tell whether the agent is to go once no write of a shipment is under way: until then none is posted."""
        if self._retry_at is not None:
            return now >= self._retry_at
        if self._peers.wants_new_agent or self._closings.wants_new_agent(now) or self._repair.is_due(now):
            return True
        return self._reader is not None and self._reader.wants_new_agent(now)

    @property
    def next_call_at(self) -> float | None:
        """Return when the agent is due by itself, if it will be."""
        return self._repair.at if self._retry_at is None else self._retry_at

    def replace(self, now: float) -> str | None:
        """End all that ours still does, and its connections. Say why there is no new one; None: it is there."""
        self._generation += 1
        self._writes.clear()
        reason = self._rotate(now)
        self._closings.detached(now)
        if self._reader is not None:
            self._reader.agent_replaced(now)
        return reason

    def _rotate(self, now: float) -> str | None:
        was_missing = self._retry_at is not None
        try:
            self._backend.rotate(self._generation)
        except TransferError as error:
            self._retry_at = now + RETRY_S
            tell = log.debug if was_missing else log.warning  # one line for an outage, however long it lasts
            tell("transfer_agent_not_replaced", rank=self._rank, reason=str(error), retried_every_s=RETRY_S)
            return str(error)
        self._retry_at = None
        self._repair.replaced(now, are_whole=not self._backend.lacks_devices)
        if was_missing:
            log.info("transfer_agent_is_back", rank=self._rank)
        return None
