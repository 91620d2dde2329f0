"""The prefill half of a simulated worker: the real scheduler, and what `prefill.role` does around it.

PrefillTask ─> queued ─> first chunk: the grant is opened ─> chunks, shipped while they are computed
                          FirstToken to the router <─ last chunk ─> the rest of the shipment ─> arrived
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ..common.batch import Batch, StepOutput
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.kv_spec import KVCacheSpec
from ..common.messages import (
    Abort,
    ChoiceTokens,
    FirstToken,
    GrantInfo,
    Message,
    PrefillTask,
    TaskRefused,
    TransferReport,
)
from ..common.request import FinishReason, RequestSpec
from ..kvcache.blocks import BlockPool
from ..kvcache.prefix_cache import PrefixCache
from ..prefill.scheduler import PrefillScheduler, Prompt
from .costs.network import Link, Port
from .fetches import SimFetches
from .jobs import TOKEN, Job
from .reservations import Reservation


class Peers(Protocol):
    """The other workers, as a shipment meets them."""

    def open(self, grant: GrantInfo, request_id: str) -> tuple[Reservation, Link, Port] | None:
        """Begin to ship. None: the decode worker is gone, or has given up the grant."""
        ...

    def arrive(self, reservation: Reservation, num_first_tokens: int, num_bytes: int) -> None: ...

    def at(self, time_s: float, handler: Callable[..., None], *args: object) -> None:
        """Call back then, unless this worker is dead by that time."""
        ...


@dataclass(slots=True, eq=False)
class Shipment:
    reservation: Reservation
    link: Link
    port: Port  # of the receiver
    began_s: float
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Task:
    """One attempt at a prompt."""

    spec: RequestSpec
    job: Job
    grant: GrantInfo
    prompt: Prompt
    samples: bool
    shipment: Shipment | None = None
    has_begun: bool = False
    stepping: bool = False
    dead: bool = False


@dataclass(slots=True)
class _Flow:
    """The pages that one step ships."""

    ends_s: dict[str, float] = field(default_factory=dict)  # by request id: when its bytes of this step are across


class PrefillPart:
    """Books of tasks and shipments. The engine asks it for batches."""

    def __init__(
        self,
        pool: BlockPool,
        spec: KVCacheSpec,
        clock: Clock,
        job_of: Callable[[str], Job],
        to_router: Callable[[Message], None],
        peers: Peers,
        *,
        sending: Port,
        fetches: SimFetches,
        cache: PrefixCache,
        token_bytes: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self.scheduler = PrefillScheduler(
            pool, clock, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, cache=cache
        )
        self.draining = False
        self.num_bytes = 0  # shipped, since start
        self._pool = pool
        self._spec = spec
        self._clock = clock
        self._job_of = job_of
        self._to_router = to_router
        self._peers = peers
        self._token_bytes = token_bytes
        self._port = sending
        self._fetches = fetches
        self._tasks: dict[str, Task] = {}  # by request id
        self._num_shipping = 0  # computed, and not across yet
        self._step_tasks: list[Task] = []
        self._flow = _Flow()

    @property
    def num_unfinished(self) -> int:
        return len(self._tasks) + self._num_shipping

    # --- messages -------------------------------------------------------------------------------------------

    def on_task(self, message: PrefillTask) -> None:
        spec = message.spec
        known = self._tasks.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            return
        if known is not None:
            self._end(known)
        if self.draining:
            self.refuse(spec, "draining")
            return
        job = self._job_of(spec.request_id)
        seq = job.sequence(spec)
        seq.pending_choices, seq.samples = spec.choices, message.sample
        seq.is_retained_elsewhere = not message.retains_prefix
        try:
            prompt = self.scheduler.add(seq, b"", spec.remaining_s)
        except CapacityError as error:
            self.refuse(spec, "never_fits", str(error))
            return
        task = self._tasks[spec.request_id] = Task(spec, job, message.grant, prompt, message.sample)
        if message.fetch is not None and self._fetches.begin(seq, message.fetch):
            self._open(task)  # its grant would lapse meanwhile

    def refuse(self, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self._to_router(TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail))

    def on_abort(self, message: Abort) -> None:
        task = self._tasks.get(message.request_id)
        if task is not None and task.spec.attempt <= message.attempt and not message.unless_arrived:
            self._end(task)

    def _end(self, task: Task) -> None:
        """End a task; its blocks go when the running step does not use them."""
        del self._tasks[task.spec.request_id]
        self.scheduler.remove(task.prompt)
        task.dead = True
        if not task.stepping:
            self._give_back(task)

    def _give_back(self, task: Task) -> None:
        seq = task.prompt.seq
        self.scheduler.cache.cancel(seq.block_table)
        self._pool.free(seq.block_table)
        seq.block_table = []

    # --- steps ----------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        for prompt in self.scheduler.expired():
            task = self._tasks[prompt.seq.request_id]
            self.refuse(task.spec, "expired")
            self._end(task)
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return None
        batch, prompts = scheduled
        self._step_tasks = [self._tasks[prompt.seq.request_id] for prompt in prompts]
        for task in self._step_tasks:
            task.stepping = True
            if task.shipment is None:
                self._open(task)
            if not task.has_begun:
                self._ship_hits(task)
        return batch

    def _open(self, task: Task) -> None:
        opened = self._peers.open(task.grant, task.spec.request_id)
        if opened is None:  # what is computed stays cached for the next attempt; the router knows of the grant's end
            self._end(task)
            return
        reservation, link, port = opened
        now = self._clock.now()
        task.shipment = Shipment(reservation, link, port, now)

    def _ship_hits(self, task: Task) -> None:
        """Ship what the prefix cache had and the decode worker has not."""
        task.has_begun, shipment = True, task.shipment
        hits = max(0, task.prompt.seq.num_cached_tokens - task.grant.num_computed_tokens)
        if hits and shipment is not None:
            seconds = self._count(shipment, hits)
            shipment.port.carry(self._port.carry(self._clock.now(), seconds) - seconds, seconds)

    def _count(self, shipment: Shipment, num_tokens: int) -> float:
        num_bytes = num_tokens * self._token_bytes
        shipment.num_bytes += num_bytes
        self.num_bytes += num_bytes
        return num_bytes / shipment.link.bytes_per_s

    def begin_step(self, batch: Batch, end_s: float) -> None:
        """The step's time is known: when is what it ships across?"""
        begin_s, layers = self._clock.now(), self._spec.num_layers
        self._flow = _Flow()
        shipped = []
        total_s = 0.0
        for row, task in zip(batch.rows, self._step_tasks, strict=True):
            if task.shipment is None or task.dead:
                continue
            num_tokens = max(0, row.end - max(row.start, task.grant.num_computed_tokens))
            seconds = self._count(task.shipment, num_tokens)
            total_s += seconds
            shipped.append((task, seconds))
        if not shipped:
            return
        sent_s = self._port.stream(begin_s, end_s, total_s, layers)
        for task, seconds in shipped:
            shipment = task.shipment
            assert shipment is not None
            received_s = shipment.port.stream(begin_s, end_s, seconds, layers)
            self._flow.ends_s[task.spec.request_id] = max(sent_s, received_s) + shipment.link.latency_s

    def complete(self, batch: Batch, step_s: float, swap_s: float) -> None:
        self.scheduler.observe(step_s - swap_s, batch.num_tokens)
        self.scheduler.cache.observe(batch, StepOutput([], step_s, batch.num_tokens, swap_s))
        self.scheduler.cache.end()
        tasks, self._step_tasks = self._step_tasks, []
        for row, task in zip(batch.rows, tasks, strict=True):
            task.stepping = False
            if task.dead:
                self._give_back(task)
            elif self.scheduler.complete(task.prompt, row.num_scheduled_tokens):
                self._finish(task)

    def _finish(self, task: Task) -> None:
        """The prompt is computed: the first token goes to the router, the rest of its KV to the decode worker."""
        spec, prompt, now = task.spec, task.prompt, self._clock.now()
        del self._tasks[spec.request_id]
        is_over = task.samples and task.job.num_output_tokens <= 1
        if task.samples:
            started_s = prompt.started_s if prompt.started_s is not None else prompt.received_s
            reason = FinishReason.STOP if is_over else None
            self._to_router(
                FirstToken(
                    request_id=spec.request_id,
                    attempt=spec.attempt,
                    choices=(ChoiceTokens(0, 0, (TOKEN,), reason),),
                    num_cached_tokens=prompt.seq.num_cached_tokens,
                    prefill_s=now - started_s,
                    queue_s=started_s - prompt.received_s,
                )
            )
        if is_over:
            self._give_back(task)
            return
        self._num_shipping += 1
        self._peers.at(self._flow.ends_s[spec.request_id], self._across, task, now)

    def _across(self, task: Task, computed_s: float) -> None:
        self._num_shipping -= 1
        self._give_back(task)
        shipment, now = task.shipment, self._clock.now()
        assert shipment is not None
        self._peers.arrive(shipment.reservation, int(task.samples), shipment.num_bytes)
        self._to_router(
            TransferReport(
                request_id=task.spec.request_id,
                attempt=task.spec.attempt,
                decode_worker=task.grant.grant_id.worker_id,
                num_bytes=shipment.num_bytes,
                num_blocks=self._spec.num_blocks_for(task.job.num_prompt_tokens - task.grant.num_computed_tokens),
                transfer_s=now - shipment.began_s,
                exposed_s=now - computed_s,
                clean=True,
            )
        )
