"""The prefill role: tasks in, first tokens out, KV shipped.

    PrefillTask ─> queued ─> first chunk scheduled: open the grant ─> chunks, pages shipped layer by layer
                     └─> waited for half of the grant's time: open it   │
                     FirstToken to the router <─ last chunk sampled <───┘
                     finish the shipment; blocks are given back once their pages are no longer read

    EmbedTask ─> queued ─> chunks, hidden states added up ─> Embedding to the router: nothing is shipped or sampled

The role is driven under the worker's lock and knows no thread, socket or tensor: the sender is behind `Shipping`,
messages leave through `to_router`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..common import failpoints
from ..common.batch import Batch, BatchRow, StepOutput
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.request import RequestSpec, Sequence
from ..common.served import PLAIN, Served, is_expired
from ..kvcache.blocks import BlockPool, prefix_salt
from ..kvcache.contents import Contents, TokenContents
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.fetch.fetches import Fetches
from ..transfer.protocol.handoff import Endpoint, check_grant
from ..transfer.send.plan import ShipPlan, plan_chunk, plan_hits
from ..wire.fields import Message
from ..wire.grants import GrantInfo
from ..wire.results import TaskRefused
from ..wire.role_counters import RoleCounters
from ..wire.tasks import Abort, EmbedTask, FetchFrom, LocalTask, PrefillTask, ReserveKV
from ..wire.workers import LiveRequests
from .results import StepResults
from .scheduler import PrefillScheduler
from .shipments import Shipments, Shipping
from .task import Task
from .tasks import Tasks


class PrefillRole:
    """Prompts and their shipments. All methods but begin_step and on_layer are called with the lock held."""

    name = "prefill"

    def __init__(
        self,
        *,
        pool: BlockPool,
        endpoint: Endpoint,
        clock: Clock,
        shipping: Shipping,
        to_router: Callable[[str, Message], None],
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        own_id: str = "",
        cache: PrefixCache | None = None,
        served: Served = PLAIN,
        contents: Contents | None = None,
    ) -> None:
        """`own_id`: the worker's name, where it grants blocks as well. `contents`: reads requests; None: by their
        token ids.
        """
        self.pool = pool
        self.scheduler = PrefillScheduler(
            pool, clock, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, cache=cache
        )
        self.fetches: Fetches | None = None  # None: everything that is not in the cache is computed
        self._shipments = Shipments(pool, shipping.cancel)
        self._tasks = Tasks(pool, self.scheduler, self._shipments, shipping, lambda: self.fetches)
        self._results = StepResults(
            pool,
            self.scheduler,
            self._tasks,
            shipping,
            to_router,
            clock=clock,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
        )
        self._endpoint = endpoint
        self._contents = contents if contents is not None else TokenContents(endpoint.spec)
        self._shipping = shipping
        self._clock = clock
        self._to_router = to_router
        self._own_id = own_id
        self._served = served
        self._step_tasks: list[Task] = []
        self._plans: list[ShipPlan] = []
        self.draining = False
        self.is_active = True  # False: nothing new is begun; tasks go on

    # --- messages ---------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case PrefillTask():
                self._on_task(router_id, message)
            case EmbedTask():
                self._on_embed(router_id, message)
            case Abort():
                self._on_abort(message)
            case LiveRequests():
                self._tasks.keep_only(router_id, frozenset(message.attempts))
            case ReserveKV(spec=spec) | LocalTask(spec=spec):
                self._refuse(router_id, spec, "wrong_role", "this worker prefills")
            case _:
                raise AssertionError(f"unexpected {type(message).__name__}")

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self._tasks.keep_only(router_id, frozenset())

    def _refuse(self, router_id: str, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self._to_router(
            router_id, TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
        )

    def _on_task(self, router_id: str, message: PrefillTask) -> None:
        spec, grant = message.spec, message.grant
        if not self._tasks.drop_older(spec):
            return
        if (refusal := self._refusal(spec, grant)) is not None:
            self._refuse(router_id, spec, *refusal)
            return
        seq = self._contents.sequence(spec, spec.choices[0])
        seq.grammar = message.first_grammar()
        seq.pending_choices, seq.samples = spec.choices, message.sample
        seq.is_retained_elsewhere = not message.retains_prefix
        self._add(router_id, spec, seq, grant, message.fetch)

    def _on_embed(self, router_id: str, message: EmbedTask) -> None:
        """Take a prompt whose embedding is wanted. Either role may: it needs no other worker."""
        spec = message.spec
        if not self._tasks.drop_older(spec):
            return
        if (refusal := self._common_refusal(spec)) is not None:
            self._refuse(router_id, spec, *refusal)
            return
        seq = self._contents.sequence(spec, spec.choices[0])
        seq.samples, seq.pooling = False, message.pooling
        self._add(router_id, spec, seq, None, message.fetch)

    def adapters_in_use(self) -> tuple[set[str], list[str]]:
        """Return the adapters of prompts that have begun, and those of the others in their order."""
        begun, waiting = set[str](), list[str]()
        for prompt in self.scheduler.prompts:
            if prompt.seq.adapter and prompt.started_s is not None:
                begun.add(prompt.seq.adapter)
            elif prompt.seq.adapter:
                waiting.append(prompt.seq.adapter)
        return begun, waiting

    def _add(
        self, router_id: str, spec: RequestSpec, seq: Sequence, grant: GrantInfo | None, fetch: FetchFrom | None
    ) -> None:
        """Queue a prompt, or refuse it where it can never fit."""
        seq.held_adapter = self._served.adapter(spec)
        salt = prefix_salt(self._endpoint.spec if grant is None else grant.spec, spec.cache_salt, spec.adapter)
        try:
            prompt = self.scheduler.add(seq, salt, spec.remaining_s)
        except CapacityError as error:
            self._refuse(router_id, spec, "never_fits", str(error))
            return
        self._tasks.add(Task(router_id, spec, grant, prompt), fetch)

    def _refusal(self, spec: RequestSpec, grant: GrantInfo) -> tuple[str, str] | None:
        """Say why the task is not begun, and what more there is to say; None: it is."""
        if not self.is_active:
            return "wrong_role", "this worker decodes now"
        if self._own_id and grant.grant_id.worker_id == self._own_id:
            return "wrong_role", "the grant is this worker's own: a prompt is not handed off to where it is computed"
        if (misfit := check_grant(self._endpoint, grant)) is not None:
            return "incompatible", misfit
        return self._common_refusal(spec)

    def _common_refusal(self, spec: RequestSpec) -> tuple[str, str] | None:
        if (unserved := self._served.why_not(spec)) is not None:
            return unserved
        if self.draining:
            return "draining", ""
        return ("expired", "") if is_expired(spec) else None

    def _on_abort(self, message: Abort) -> None:
        if message.choices or message.unless_arrived:
            return  # these are the decode worker's; the prompt is computed for the other choices
        self._tasks.abort(message.request_id, message.attempt)

    def on_source_free(self, open_id: int) -> None:
        """A shipment reads its source blocks no more (every rank said so)."""
        self._tasks.source_free(open_id)

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        if not self.scheduler.prompts:
            return None
        for prompt in self.scheduler.expired():
            task = self._tasks.task_of(prompt)
            self._refuse(task.router_id, task.spec, "expired")
            self._tasks.end(task, "its deadline has passed")
        for prompt, why in self.scheduler.failed():
            task = self._tasks.task_of(prompt)
            self._refuse(task.router_id, task.spec, *why)
            self._tasks.end(task, f"its {why[0]} cannot be had")
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return None
        batch, prompts = scheduled
        self._step_tasks = [self._tasks.task_of(prompt) for prompt in prompts]
        self._plans = []
        for row, task in zip(batch.rows, self._step_tasks, strict=True):
            task.stepping = True
            if task.grant is not None:
                self._plan(task, task.grant, row)
        return batch

    def _plan(self, task: Task, grant: GrantInfo, row: BatchRow) -> None:
        """Note what of a row is shipped, and open its grant with the first one."""
        if task.open_id is None:
            self._tasks.open(task, grant)
        assert task.open_id is not None
        if not task.is_begun:
            task.is_begun = True
            self._plans.append(plan_hits(task.open_id, row.seq, grant))
        self._plans.append(plan_chunk(task.open_id, row.seq, grant, row.num_scheduled_tokens))

    def begin_step(self, batch: Batch) -> None:
        if failpoints.armed:
            failpoints.hit("prefill.chunk")
        self._shipping.begin_step(self._plans)

    def on_layer(self, layer: int) -> None:
        self._shipping.on_layer(layer)

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self._results.take(batch, output, self._step_tasks)
        self._step_tasks = []

    def tick(self) -> None:
        """Look for grants that would lapse while their prompts wait. Other deadlines are the sender's."""
        self._tasks.open_waiting(self._clock.now())

    def router_of(self, open_id: int) -> str | None:
        """Return the router that asked for what a shipment has brought, which has just ended."""
        return self._shipments.ended(open_id)

    @property
    def routers(self) -> set[str]:
        """Return the routers whose prompts are computed or shipped here."""
        return {task.router_id for task in self._tasks} | self._shipments.routers

    @property
    def num_unfinished(self) -> int:
        """Tasks, and shipments that have not said their last word."""
        return len(self._tasks) + len(self._shipments)

    def counters(self) -> RoleCounters:
        scheduler = self.scheduler
        return RoleCounters(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            num_granted_blocks=self._shipments.num_blocks,  # still being read
            num_preemptions=0,  # a prompt that has begun is never preempted
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            stale_messages=self._tasks.stale_messages,
            nonfinite_rows=self._results.num_nonfinite_rows,
        )

    @property
    def is_quiet(self) -> bool:
        """Nothing is left of any request."""
        return not self.num_unfinished and not self._step_tasks and not self.scheduler.prompts

    def references(self) -> list[list[int]]:
        """All references to blocks of the pool that tasks and shipments hold."""
        stepping = [task.prompt.seq.block_table for task in self._step_tasks if task.dead]
        return [prompt.seq.block_table for prompt in self.scheduler.prompts] + stepping + self._shipments.references()

    def check_tasks(self) -> None:
        """Assert that tasks and prompts agree."""
        self._tasks.check()

    def check(self) -> None:
        """Assert that the books agree, where nobody else has blocks of the pool: tasks, prompts and blocks."""
        self.pool.check()
        self.check_tasks()
        held = Counter(block for blocks in self.references() for block in blocks)
        assert all(self.pool.ref_count(block) == held[block] for block in range(self.pool.num_ids))
