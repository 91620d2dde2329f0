"""Shipping seen from rank 0: every call reaches the sender of every rank, each on its own transfer thread.

    role ──open, begin_step, on_layer, finish, cancel──> RankShipping ──each──> KVSender of every rank

A follower's engine computes the same step, so its layers are its own: it gets the plans of a step before the step
and calls `LayerShipper.on_layer` itself. Blocks may be reused when every rank has stopped reading them.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...common.batch import GpuEvent
from ...common.kv_spec import KVCacheSpec
from ...wire.grants import GrantInfo
from ...wire.handoff import CancelKV, KVDone, KVOpened, KVRefused, KVRenewed
from ...wire.results import ChoiceTokens
from ..fetch.reader import KVReader
from ..protocol.rank_calls import Calls, Each, Gather, Lane, RankCalls
from .counters import SendCounters
from .plan import ShipPlan
from .sender import KVSender


class _Blocks(NamedTuple):
    """A plan's blocks, once for all layers of the step: in the order of ours, so that neighbours merge into one write.

    A pool that is full gives its blocks in the order in which they are evicted, of a sequence the last one first.
    """

    open_id: int
    local: npt.NDArray[np.int32]
    remote: npt.NDArray[np.int32]
    whole: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]  # ours and theirs, of those that are not thin
    last: bool

    @classmethod
    def from_plan(cls, plan: ShipPlan) -> _Blocks:
        local, remote = np.array(plan.local_blocks, dtype=np.int32), np.array(plan.remote_blocks, dtype=np.int32)
        order = np.argsort(local)
        whole = order[order >= plan.num_thin]
        return cls(plan.open_id, local[order], remote[order], (local[whole], remote[whole]), plan.last)


class LayerShipper:
    """One rank's hook into its engine: tells its sender which pages have become complete.

    On a GPU a layer is told of when its kernels are queued: the sender hears of it once an event behind them has
    passed. `layer_event` sets one up; None where the pages are written by then. Without a shipment there is none.
    """

    def __init__(
        self, thread: Calls, sender: KVSender, spec: KVCacheSpec, layer_event: Callable[[], GpuEvent | None]
    ) -> None:
        self._thread = thread
        self._sender = sender
        self._spec = spec
        self._layer_event = layer_event
        self._blocks: list[_Blocks] = []

    def begin_step(self, plans: list[ShipPlan]) -> None:
        self._blocks = []
        for plan in plans:
            blocks = _Blocks.from_plan(plan)
            if not plan.all_layers:
                if len(blocks.local) or blocks.last:
                    self._blocks.append(blocks)
                continue
            for layer in range(self._spec.num_layers):
                self._ready(blocks, layer, None)  # earlier steps wrote them, and those have ended

    def on_layer(self, layer: int) -> None:
        if not self._blocks:
            return
        event = self._layer_event()
        is_last = layer == self._spec.num_layers - 1
        for blocks in self._blocks:
            self._ready(blocks, layer, event)
            if blocks.last and is_last:
                self._thread.call_after(event, self._sender.layers_done, blocks.open_id)
        if is_last:
            self._blocks = []  # the next step may be another role's

    def _ready(self, blocks: _Blocks, layer: int, event: GpuEvent | None) -> None:
        local, remote = blocks.whole if self._spec.is_windowed(layer) else (blocks.local, blocks.remote)
        if len(local):
            self._thread.call_after(event, self._sender.pages_ready, blocks.open_id, layer, local, remote)


# All that rank 0 has every rank do about shipments and reads.
SENDING = RankCalls(
    {
        KVSender.open: Lane.THREAD,
        KVSender.finish: Lane.BEHIND_PAGES,
        KVSender.cancel: Lane.THREAD,
        KVSender.on_message: Lane.THREAD,
        KVSender.on_peer_lost: Lane.THREAD,
        KVReader.begin: Lane.THREAD,
        KVReader.give_up: Lane.THREAD,
        LayerShipper.begin_step: Lane.AT_ONCE,
    }
)


class RankShipping:
    """Implements `prefill.shipments.Shipping` on rank 0. `broadcast` reaches the followers; None without any."""

    def __init__(
        self,
        thread: Calls,
        sender: KVSender,
        *,
        spec: KVCacheSpec,
        tp_size: int,
        broadcast: Callable[[bytes], None] | None,
        layer_event: Callable[[], GpuEvent | None],
        on_source_free: Callable[[int], None],
    ) -> None:
        self.each = Each(SENDING, thread, broadcast)
        self._sender = sender
        self._layers = LayerShipper(thread, sender, spec, layer_event)
        self._begin_step = self.each.bound(self._layers.begin_step)
        self._on_source_free = on_source_free
        self._free_ranks: Gather[None] = Gather(tp_size)  # by open id: those that read its source blocks no more

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        open_id = secrets.randbits(63)
        self.each(self._sender.open, open_id, request_id, attempt, grant)
        return open_id

    def begin_step(self, plans: list[ShipPlan]) -> None:
        self._begin_step(plans)

    def on_layer(self, layer: int) -> None:
        self._layers.on_layer(layer)

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int = 0) -> None:
        self.each(self._sender.finish, open_id, first_tokens, num_cached_tokens)

    def cancel(self, open_id: int, reason: str) -> None:
        self.each(self._sender.cancel, open_id, reason)

    def on_answer(self, message: KVOpened | KVRefused | KVRenewed | CancelKV | KVDone) -> None:
        """A decode worker's message."""
        self.each(self._sender.on_message, message)

    def on_peer_lost(self, kv_address: str) -> None:
        self.each(self._sender.on_peer_lost, kv_address)

    def counters(self) -> SendCounters:
        return self._sender.counters()

    def on_rank_free(self, open_id: int) -> None:
        """One rank reads the shipment's source blocks no more. The caller holds the worker's lock."""
        if self._free_ranks.add(open_id, None) is not None:
            self._on_source_free(open_id)
