"""A prefill worker's books of its shipments, from their open to their last word.

    opened ─> hold: the task gives its blocks away ─> source_free: they are read no more ─> ended: nothing left to say

The two ends are told apart: blocks are free as soon as everything was written, while the arrival is repeated until
the decode worker has answered. A worker that drains stays until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from ..common.request import BlockId, RequestSpec
from ..kvcache.blocks import BlockPool
from ..transfer.send.counters import SendCounters
from ..transfer.send.plan import ShipPlan
from ..wire.grants import GrantInfo
from ..wire.results import ChoiceTokens


class Shipping(Protocol):
    """The senders of all ranks, as the role sees them."""

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        """Ask the decode worker for the right to write; returns the open id."""
        ...

    def begin_step(self, plans: list[ShipPlan]) -> None:
        """Ship these blocks, which will be complete layer by layer during the step that starts now."""
        ...

    def on_layer(self, layer: int) -> None:
        """Ship this step's pages of `layer`, which are complete."""
        ...

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int = 0) -> None:
        """Every page is complete and the first tokens are known."""
        ...

    def cancel(self, open_id: int, reason: str) -> None:
        """Ship nothing more. Idempotent."""
        ...

    def counters(self) -> SendCounters:
        """Return what rank 0's sender says of itself."""
        ...


@dataclass(slots=True)
class _Open:
    """A shipment that was not reported as ended."""

    router_id: str
    request_id: str
    attempt: int


class Shipments:
    """Owns the source blocks of shipments whose tasks are over."""

    def __init__(self, pool: BlockPool, cancel: Callable[[int, str], None]) -> None:
        self._pool = pool
        self._cancel = cancel
        self._blocks: dict[int, list[BlockId]] = {}  # by open id, while they are read
        self._opens: dict[int, _Open] = {}  # by open id, oldest first

    def __len__(self) -> int:
        return max(len(self._opens), len(self._blocks))

    @property
    def num_blocks(self) -> int:
        """Return how many blocks shipments hold; one that several read counts once."""
        return len(frozenset(chain.from_iterable(self._blocks.values())))

    @property
    def routers(self) -> set[str]:
        return {shipment.router_id for shipment in self._opens.values()}

    def opened(self, open_id: int, router_id: str, spec: RequestSpec) -> None:
        self._blocks[open_id] = []  # the task's, until it gives them away
        self._opens[open_id] = _Open(router_id, spec.request_id, spec.attempt)

    def hold(self, open_id: int, blocks: list[BlockId]) -> bool:
        """Take over a task's blocks. False: the shipment reads nothing any more."""
        if open_id not in self._blocks:
            return False
        self._blocks[open_id] = blocks
        return True

    def source_free(self, open_id: int) -> None:
        """The shipment reads its source blocks no more. Idempotent."""
        self._pool.free(self._blocks.pop(open_id, []))

    def ended(self, open_id: int) -> str | None:
        """The shipment has said its last word: the router that hears of it. None: it has before."""
        shipment = self._opens.pop(open_id, None)
        return shipment.router_id if shipment is not None else None

    def cancel(self, request_id: str, attempt: int, reason: str) -> None:
        """End the request's shipments up to this attempt."""
        for open_id, shipment in list(self._opens.items()):
            if shipment.request_id == request_id and shipment.attempt <= attempt:
                self._cancel(open_id, reason)

    def keep_only(self, router_id: str, live: frozenset[tuple[str, int]], reason: str) -> None:
        """The router's shall end, but those of the (request id, attempt) pairs in `live`."""
        for open_id, shipment in list(self._opens.items()):
            if shipment.router_id == router_id and (shipment.request_id, shipment.attempt) not in live:
                self._cancel(open_id, reason)

    def references(self) -> list[list[BlockId]]:
        return list(self._blocks.values())
