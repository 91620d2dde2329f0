"""One life of a simulated worker: the product's core in virtual time, with a step-time model for an engine.

    router, other workers, ports ─> events ─> WorkerCore ─> Effects ─> events       ticks: ten a second, one when idle

What `worker/worker.py` does with threads and sockets is done here by events. It is a `WorkerLink`, too: the router
sends through it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import msgspec

from ..common.request import BlockId, Sequence
from ..decode.waiting import MAX_WAIT_S
from ..kvcache.frame_pool import block_pool
from ..kvcache.prefix_cache import PrefixCache
from ..kvcache.tiers import TierIndex
from ..transfer.protocol.handoff import Endpoint
from ..wire.codec import DecodeToPrefill, FetcherToLender, LenderToFetcher, PrefillToDecode
from ..wire.fields import Labels, Message
from ..wire.handoff import KVArrived
from ..wire.results import StepTokens
from ..wire.tasks import Abort, LocalTask, ReserveKV
from ..worker.core import WorkerCore
from ..worker.roles import RoleName
from ..worker.status import make_status
from .adapters import SimLoader
from .costs.network import Link, Port
from .engine import Engine
from .held_tokens import HeldTokens
from .jobs import SimDrafts
from .neighbour import Cluster
from .reading import SimReading
from .scenario import Drafts
from .setup import TRANSPORT, VERSION, WorkerSpec, calibration, core_config, hello_of, regions
from .shipping import SimShipping

TICK_S = 0.1
IDLE_TICKS = 10
_ROUTER = ""  # its id
_ROTATION_S = 0.02  # as measured for new transfer agents (docs/architecture.md)


class SimWorker:
    """Implements `worker.effects.Effects` for its core."""

    def __init__(
        self, world: Cluster[SimWorker], spec: WorkerSpec, worker_id: str, role: RoleName, life: int, labels: Labels
    ) -> None:
        kernel = world.kernel
        self.world = world
        self.spec = spec
        self.worker_id = worker_id
        self.address = f"{worker_id}#{life}"
        self.number = self.incarnation = world.next_number()
        self.labels = labels
        self.now = kernel.now
        self.is_dead = False
        self.has_left = False  # its session has ended
        self.began_s = self.wished_s = kernel.now()
        self.receiving = Port()
        self.sending = Port()
        self.pool = block_pool(spec.kv, spec.num_blocks, enable_prefix_caching=spec.prefix_caching)
        self.cache = PrefixCache(self.pool, host=TierIndex(spec.host_blocks), spec=spec.kv)
        self.core = self._make_core(role)
        self.core.roles.learn(calibration(spec))
        random = Random(f"{world.scenario.seed}/{worker_id}/{life}")
        self.engine = Engine(kernel, self.core, spec, world.jobs, random, self._tell_early)
        self._held = HeldTokens()
        self._num_announced = 0
        self._tick_version = 0
        self._was_busy = False

    def _make_core(self, role: RoleName) -> WorkerCore:
        spec, kv = self.spec, self.spec.kv
        config = core_config(spec, self.worker_id, self.incarnation, role, self.address)
        adapters, drafts = spec.fleet.adapters, spec.fleet.drafts
        loader = SimLoader(adapters, self.now, self.after) if adapters.count else None
        if loader is not None:
            loader.wake = self.wake
        endpoint = Endpoint(kv, VERSION, TRANSPORT, config.tp_size)
        block_bytes = spec.fleet.kv_token_bytes * kv.block_size
        self._shipping = SimShipping(self, endpoint, config.transfer, block_bytes=block_bytes, port=self.sending)
        core = WorkerCore(
            config,
            pool=self.pool,
            cache=self.cache,
            clock=self.world.kernel,
            effects=self,
            shipping=self._shipping,
            reading=SimReading(self, kv, block_bytes=block_bytes, port=self.receiving),
            regions=regions(spec, self.address, 0),
            watch_processes=lambda marks: None,
            contents=self.world.contents,
            adapters=loader,
        )
        if drafts is not None and (speculation := core.decode.scheduler.speculation) is not None:
            speculation.make_proposer = partial(self._drafts_of, drafts)
        return core

    def _drafts_of(self, drafts: Drafts, seq: Sequence) -> SimDrafts:
        return SimDrafts(drafts, self.world.jobs[seq.request_id], seq, self.world.scenario.seed)

    def start(self) -> None:
        """Join the router, begin to tick. Workers do not tick in step."""
        self.core.on_router_joined(_ROUTER)
        self.world.joined(self, hello_of(self.spec, self.core.config, self.labels))
        self.announce()
        self.world.kernel.after(TICK_S * ((self.number * 0.6180339887) % 1.0), self._tick, 0)

    # --- events -------------------------------------------------------------------------------------------------

    def after(self, delay_s: float, handler: Callable[..., object], *args: object) -> None:
        self.world.kernel.after(delay_s, self._call, handler, args)

    def _call(self, handler: Callable[..., object], args: tuple[object, ...]) -> None:
        if not self.is_dead:
            self.engine.sync()
            handler(*args)
            self.engine.recheck()

    def _hurry(self) -> None:
        """Work has come: an idle worker's next tick is due within a tenth of a second."""
        if not self._was_busy:
            self._was_busy = True
            self._tick_version += 1
            self.world.kernel.after(TICK_S, self._tick, self._tick_version)

    def _tick(self, version: int) -> None:
        if not self.is_dead and version == self._tick_version:
            self._call(self._on_tick, (version,))

    def _on_tick(self, version: int) -> None:
        num_announced = self._num_announced
        self.core.tick()
        if self.core.has_drained:
            self.world.leave(self)
            return
        self._was_busy = self.core.is_busy or bool(self.core.lending)
        if not self._was_busy and self._num_announced == num_announced:
            self.announce()  # an idle worker is not looked at more often
        self.world.kernel.after(TICK_S if self._was_busy else TICK_S * IDLE_TICKS, self._tick, version)

    def flush(self) -> None:
        """Tell what it has streamed: a worker that is killed loses everything else."""
        self.engine.split()
        held = self._held.flush()
        if held is not None:
            self._tell(held)

    # --- the router ---------------------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Take a message from the router."""
        self.after(self.world.scenario.message_s, self._on_router_message, message)

    def drop(self, reason: str) -> None:
        """The router ended the session: this life is of no use to it."""
        self.world.dropped(self, reason)

    def _on_router_message(self, message: Message) -> None:
        if isinstance(message, Abort):
            self.engine.split()  # it has what the answer has by now
            self._held.forget(message.request_id)
        self.core.on_router_message(_ROUTER, message)
        if isinstance(message, ReserveKV) and self.core.decode.num_waiting_reservations:
            self.after(MAX_WAIT_S, self.engine.end_jump)  # it is answered with the next step
        if isinstance(message, ReserveKV | LocalTask) or self.core.is_busy:
            self._hurry()

    def to_router(self, router_id: str, message: Message) -> None:
        if not isinstance(message, StepTokens):
            self._tell(message)
        elif (told := self._held.pass_on(message, is_adoption=self.engine.is_scheduling)) is not None:
            self._tell(told)

    def _tell_early(self, sequences: list[Sequence]) -> None:
        """Tell tokens that the core has not heard of yet."""
        told = [told for seq in sequences if (told := self._held.tell_early(seq)) is not None]
        if told:
            self._tell(StepTokens(updates=tuple(told)))

    def _tell(self, message: Message) -> None:
        if not self.is_dead:
            self.world.kernel.after(self.world.scenario.message_s, self.world.on_message, self, message)

    def announce(self) -> None:
        self._num_announced += 1
        status = make_status(self.core, _ROUTER, self.engine.figures())
        ahead = self.engine.num_ahead_tokens
        self._tell(msgspec.structs.replace(status, decode_context=status.decode_context + ahead) if ahead else status)

    def leaving(self) -> Callable[[], object]:
        return lambda: None  # what is said has left

    # --- other workers ------------------------------------------------------------------------------------------

    def next_number(self) -> int:
        return self.world.next_number()

    def path_to(self, address: str) -> tuple[Link, Port]:
        other = self.world.at(address)
        return (self.world.link(self, other), other.receiving) if other is not None else (self.world.no_link, Port())

    def path_from(self, address: str) -> tuple[Link, Port]:
        other = self.world.at(address)
        return (self.world.link(other, self), other.sending) if other is not None else (self.world.no_link, Port())

    def to_target(self, kv_address: str, message: Message) -> None:
        self.world.kernel.after(self.world.scenario.message_s, self._deliver, kv_address, message)

    def _deliver(self, kv_address: str, message: Message) -> None:
        target = self.world.at(kv_address)
        if target is None:
            self._call(self.on_peer_lost, (kv_address,))
        else:
            target._call(target.on_peer_message, (self.address, message))

    def to_peer(self, session: str, message: Message) -> None:
        other = self.world.at(session)
        if other is not None:
            other.after(self.world.scenario.message_s, other.on_answer, message)

    def on_peer_message(self, session: str, message: PrefillToDecode | FetcherToLender) -> None:
        self.core.on_peer_message(session, message)
        self._hurry()

    def on_answer(self, message: DecodeToPrefill | LenderToFetcher) -> None:
        if isinstance(message, LenderToFetcher):
            self.core.on_fetch_answer(message)
        else:
            self._shipping.on_answer(message)

    def notify(self, kv_address: str, message: KVArrived) -> None:
        target = self.world.at(kv_address)
        if target is not None:
            target._call(target.core.on_arrived, (0, message))

    def on_peer_lost(self, address: str) -> None:
        """Note that a worker is gone, and with it the connections in both directions."""
        self.core.on_peer_lost(address)
        self._shipping.on_target_lost(address)
        self.core.on_target_lost(address)

    # --- engine and agents --------------------------------------------------------------------------------------

    def stop_step(self) -> None:
        self.engine.stop()

    def wake(self) -> None:
        self.engine.wake()

    @property
    def step_s(self) -> tuple[float, float]:
        return self.now(), self.engine.step_end_s

    def rotate(self, generation: int) -> None:
        self.after(_ROTATION_S, self.core.on_rotated, regions(self.spec, self.address, generation))

    def watch(self, on: bool) -> None:
        """Progress costs nothing here."""

    def sum_loan(self, fetch_id: int, blocks: tuple[BlockId, ...], num_thin: int) -> None:
        raise AssertionError("no checksums are made")

    # --- what others see ----------------------------------------------------------------------------------------

    @property
    def role(self) -> RoleName:
        return self.core.roles.active_role

    @property
    def draining(self) -> bool:
        return self.core.is_draining

    @property
    def num_unfinished(self) -> int:
        return self.core.num_unfinished
