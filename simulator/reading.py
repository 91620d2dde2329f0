"""A simulated worker's reads from others, as times on two ports."""

from __future__ import annotations

from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId
from ..transfer.protocol.rank_messages import ReadOutcome
from ..wire.grants import RegionInfo
from .costs.network import Port
from .neighbour import Neighbour


class SimReading:
    """Implements `transfer.fetch.ranks.Reading` for all ranks of a worker. Its port receives."""

    def __init__(self, worker: Neighbour, spec: KVCacheSpec, *, block_bytes: int, port: Port) -> None:
        self._worker = worker
        self._spec = spec
        self._block_bytes = block_bytes
        self._port = port

    def read(
        self,
        fetch_id: int,
        kv_address: str,
        ranks: tuple[RegionInfo, ...],
        ours: tuple[BlockId, ...],
        theirs: tuple[BlockId, ...],
        num_thin: int,
        wants_sums: bool,
    ) -> None:
        worker, now = self._worker, self._worker.now()
        link, sending = worker.path_from(kv_address)
        num_pages = self._spec.num_pages(len(ours), num_thin)
        seconds = self._block_bytes * num_pages // self._spec.num_layers / link.bytes_per_s
        end_s = max(sending.carry(now, seconds), self._port.carry(now, seconds)) + link.latency_s
        worker.after(end_s - now, self._end, fetch_id)

    def _end(self, fetch_id: int) -> None:
        self._worker.core.on_read(0, fetch_id, ReadOutcome.DONE, b"")

    def give_up(self, fetch_id: int) -> None:
        """Wait for what is on its way: `read` says when it is here."""
