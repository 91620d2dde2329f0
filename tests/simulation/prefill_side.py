"""A worker's prefill side: tasks, the transfer thread's turns, and connections to decode workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry.common.batch import GpuEvent
from kvferry.common.messages import Message, TransferReport
from kvferry.prefill.role import PrefillRole
from kvferry.transfer.protocol.handoff import Endpoint
from kvferry.transfer.send.ranks import RankShipping
from kvferry.transfer.send.sender import KVSender
from kvferry.transfer.send.shipment import Shipment

from .network import Dial, End
from .oracle import EOS
from .sessions import VERSION

if TYPE_CHECKING:
    from .workers import Worker
    from .world import World

_POLL_S = 0.02  # of a transfer thread that waits for something that will not wake it


class PrefillSide:
    """The sender's end of handoffs, and the transfer thread: what `worker/prefill_side.py` is in a process."""

    def __init__(self, world: World, worker: Worker) -> None:
        scenario, parts = world.scenario, world.parts
        self._world = world
        self._worker = worker
        self._process = worker.process
        self.sender: KVSender = parts.sender(
            rank=0,
            tp_size=1,
            worker_id=worker.place,
            incarnation=worker.incarnation,
            version=VERSION,
            backend=worker.outgoing,
            spec=scenario.spec,
            num_blocks=worker.pool.num_blocks,
            clock=worker.clock,
            config=scenario.transfer,
            to_peer=self._to_decode,
            report=self._on_report,
            source_free=self._on_rank_free,
            max_in_flight_bytes=scenario.max_in_flight_bytes,
            max_write_bytes=scenario.max_write_bytes,
            processes=(world.mark_of(worker.process),),
        )
        self._post = self.sender._writes.post
        self.sender._writes.post = self._post_named  # type: ignore[method-assign, assignment]
        self._shipping = RankShipping(
            self,
            self.sender,
            num_layers=scenario.spec.num_layers,
            tp_size=1,
            broadcast=None,
            layer_event=lambda: None,
            on_source_free=self._on_source_free,
        )
        self.role: PrefillRole = parts.prefill_role(
            pool=worker.pool,
            endpoint=Endpoint(scenario.spec, VERSION, worker.outgoing.name, 1),
            clock=worker.clock,
            shipping=self._shipping,
            to_router=worker.to_router,
            eos_token_ids=frozenset({EOS}),
            max_model_len=scenario.max_model_len,
            max_num_batched_tokens=scenario.max_num_batched_tokens,
            max_num_seqs=scenario.max_num_seqs,
            own_id=worker.place,
            cache=worker.cache,
        )
        worker.outgoing.poke = self.poke
        self._links: dict[str, End | list[Message]] = {}  # by handoff address; a list while it is being opened
        self._calls: list[tuple[Callable[..., object], tuple[object, ...]]] = []
        self._turn_at_s = float("inf")

    def _post_named(self, shipment: Shipment, *args: Any) -> None:
        """Tell the agent for which open the write is, so that its landing can be judged."""
        self._worker.outgoing.writing = (shipment.grant.grant_id, shipment.open_id)
        self._post(shipment, *args)

    # --- the transfer thread --------------------------------------------------------------------------------

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Implements `shipping.Calls`."""
        self._calls.append((function, args))
        self.poke()

    def call_after(self, event: GpuEvent | None, function: Callable[..., object], *args: object) -> None:
        self.call(function, *args)

    def poke(self) -> None:
        """The thread has something to do."""
        self._plan_turn(self._world.scenario.turn_s)

    def _plan_turn(self, delay_s: float) -> None:
        due = self._world.kernel.now + delay_s
        if due < self._turn_at_s:
            self._turn_at_s = due
            self._process.after(delay_s, self._turn, due)

    def _turn(self, due: float) -> None:
        if due != self._turn_at_s:
            return  # an earlier one was planned after this one
        self._turn_at_s = float("inf")
        calls, self._calls = self._calls, []
        for function, args in calls:
            function(*args)
        wait_s = self.sender.step()
        if wait_s is not None:
            self._plan_turn(max(wait_s, _POLL_S))

    def _on_report(self, report: TransferReport) -> None:
        router_id = self.role.router_of(report.request_id, report.attempt)
        if router_id is not None:
            self._worker.to_router(router_id, report)

    def _on_rank_free(self, open_id: int) -> None:
        self._shipping.on_rank_free(open_id)

    def _on_source_free(self, open_id: int) -> None:
        self.role.on_source_free(open_id)
        self._worker.after_change()

    @property
    def num_unfinished(self) -> int:
        return self.role.num_unfinished + self.sender.num_unfinished

    # --- connections to decode workers ----------------------------------------------------------------------

    def _to_decode(self, kv_address: str, message: Message) -> None:
        link = self._links.get(kv_address)
        if isinstance(link, End):
            link.send(message)
        elif link is not None:
            link.append(message)
        else:
            self._links[kv_address] = [message]
            decode = self._world.addresses[kv_address]
            Dial(
                self._world.network,
                self._world.network.path(self._worker.place, decode.place),
                self._process,
                decode.process,
                lambda end: decode.decode.accept(end, self._worker.place),
                lambda end: self._on_link(kv_address, end),
                lambda: self._on_link_lost(kv_address),
            )

    def _on_link(self, kv_address: str, end: End) -> None:
        waiting = self._links[kv_address]
        assert isinstance(waiting, list)
        self._links[kv_address] = end
        end.on_message = self._shipping.on_answer  # type: ignore[assignment]
        end.on_closed = lambda: self._on_link_lost(kv_address)
        for message in waiting:
            end.send(message)

    def _on_link_lost(self, kv_address: str) -> None:
        del self._links[kv_address]
        self._shipping.on_peer_lost(kv_address)

    @property
    def has_handoffs(self) -> bool:
        """Shipments that have not ended."""
        return self.sender.num_unfinished > 0
