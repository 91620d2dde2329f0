"""The prefill role: tasks in, first tokens out, KV shipped.

    PrefillTask ─> queued ─> first chunk scheduled: open the grant ─> chunks, pages shipped layer by layer
                                                                        │
                     FirstToken to the router <─ last chunk sampled <───┘
                     finish the shipment; blocks are given back once their pages are no longer read

    EmbedTask ─> queued ─> chunks, hidden states added up ─> Embedding to the router: nothing is shipped or sampled

The role is driven under the worker's lock and knows no thread, socket or tensor: the sender is behind `Shipping`,
messages leave through `to_router`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import structlog

from ..common import failpoints
from ..common.adapter import Adapters, find_adapter
from ..common.batch import Batch, BatchRow, RowOutput, StepOutput
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.grammar import Grammars, find_grammar
from ..common.request import RequestSpec, Sequence, why_unserved
from ..common.role_counters import RoleCounters
from ..common.vectors import add
from ..kvcache.blocks import BlockPool, prefix_salt
from ..kvcache.contents import Contents, TokenContents
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.fetch.fetches import Fetches
from ..transfer.protocol.handoff import Endpoint, check_grant
from ..transfer.send.plan import ShipPlan, plan_chunk, plan_hits
from ..wire.fields import Message
from ..wire.grants import GrantInfo
from ..wire.results import ChoiceTokens, TaskRefused, in_pieces, nonfinite_states, nothing_to_choose
from ..wire.tasks import Abort, EmbedTask, FetchFrom, LocalTask, PrefillTask, ReserveKV
from ..wire.workers import LiveRequests
from .scheduler import PrefillScheduler
from .shipments import Shipments, Shipping
from .task import Task, embedding_message, first_token_message, first_tokens

log = structlog.get_logger(__name__)


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
        served_model: str = "",
        cache: PrefixCache | None = None,
        grammars: Grammars | None = None,
        adapters: Adapters | None = None,
        contents: Contents | None = None,
    ) -> None:
        """`own_id`: the worker's name, where it grants blocks as well. `served_model`: what tasks may ask for.

        `grammars`, `adapters` None: those that ask for one are refused. `contents`: reads requests; None: by their
        token ids.
        """
        self.pool = pool
        self._endpoint = endpoint
        self.scheduler = PrefillScheduler(
            pool, clock, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, cache=cache
        )
        self._clock = clock
        self._contents = contents if contents is not None else TokenContents(endpoint.spec)
        self._shipping = shipping
        self._to_router = to_router
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._own_id = own_id
        self._served_model = served_model
        self._grammars = grammars
        self._adapters = adapters
        self.fetches: Fetches | None = None  # None: everything that is not in the cache is computed
        self._tasks: dict[str, Task] = {}  # by request id: the attempt that computes or waits
        self._shipments = Shipments(pool, shipping.cancel)
        self._step_tasks: list[Task] = []
        self._plans: list[ShipPlan] = []
        self.draining = False
        self.is_active = True  # False: nothing new is begun; tasks go on
        self.stale_messages = 0
        self.num_nonfinite_rows = 0

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
                self._keep_only(router_id, frozenset(message.attempts))
            case ReserveKV(spec=spec) | LocalTask(spec=spec):
                self._refuse(router_id, spec, "wrong_role", "this worker prefills")
            case _:
                raise AssertionError(f"unexpected {type(message).__name__}")

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self._keep_only(router_id, frozenset())

    def _keep_only(self, router_id: str, live: frozenset[tuple[str, int]]) -> None:
        for task in list(self._tasks.values()):
            if task.router_id == router_id and (task.spec.request_id, task.spec.attempt) not in live:
                self._end(task, "the router no longer knows the request")
        self._shipments.keep_only(router_id, live, "the router no longer knows the request")

    def _refuse(self, router_id: str, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self._to_router(
            router_id, TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
        )

    def _on_task(self, router_id: str, message: PrefillTask) -> None:
        spec, grant = message.spec, message.grant
        if not self._is_new(spec):
            return
        if (refusal := self._refusal(spec, grant)) is not None:
            self._refuse(router_id, spec, *refusal)
            return
        seq = self._contents.sequence(spec, spec.choices[0])
        if message.sample:
            seq.grammar = find_grammar(spec.grammar, self._grammars)
        seq.pending_choices, seq.samples = spec.choices, message.sample
        seq.is_retained_elsewhere = not message.retains_prefix
        task = self._add(router_id, spec, seq, grant, message.fetch)
        if task is not None and task.open_id is None and not (seq.can_sample and seq.may_begin):
            self._open(task, grant)  # its grant would lapse while its grammar is compiled, or its adapter loaded

    def _on_embed(self, router_id: str, message: EmbedTask) -> None:
        """Take a prompt whose embedding is wanted. Either role may: it needs no other worker."""
        spec = message.spec
        if not self._is_new(spec):
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

    def _is_new(self, spec: RequestSpec) -> bool:
        """End the attempts before this one. False: it is not new, and is dropped itself."""
        known = self._tasks.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            self.stale_messages += 1
            return False
        if known is not None:
            self._end(known, "a newer attempt has begun")
        self._shipments.cancel(spec.request_id, spec.attempt - 1, "a newer attempt has begun")
        return True

    def _add(
        self, router_id: str, spec: RequestSpec, seq: Sequence, grant: GrantInfo | None, fetch: FetchFrom | None
    ) -> Task | None:
        """Queue a prompt, or refuse it where it can never fit."""
        seq.held_adapter = find_adapter(spec.adapter, spec.adapter_path, self._adapters)
        salt = prefix_salt(self._endpoint.spec if grant is None else grant.spec, spec.cache_salt, spec.adapter)
        try:
            prompt = self.scheduler.add(seq, salt, spec.remaining_s)
        except CapacityError as error:
            self._refuse(router_id, spec, "never_fits", str(error))
            return None
        task = self._tasks[spec.request_id] = Task(router_id, spec, grant, prompt)
        if fetch is not None and self.fetches is not None:
            self._fetch(task, fetch, self.fetches)
        return task

    def _fetch(self, task: Task, source: FetchFrom, fetches: Fetches) -> None:
        """Read what lies elsewhere before the prompt is begun. Its grant would lapse meanwhile: it is opened now."""
        seq = task.prompt.seq
        hashes = self.scheduler.reusable_hashes(task.prompt)
        key, spare = _fetch_key(task.spec), seq.is_retained_elsewhere
        seq.is_fetching = fetches.begin(key, hashes, source, lambda: _fetched(seq), spare=spare)
        if seq.is_fetching and task.grant is not None:
            self._open(task, task.grant)

    def _open(self, task: Task, grant: GrantInfo) -> None:
        spec = task.spec
        task.open_id = self._shipping.open(spec.request_id, spec.attempt, grant)
        self._shipments.opened(task.open_id, task.router_id, spec)

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
        if (unserved := self._unserved(spec)) is not None:
            return unserved
        if self.draining:
            return "draining", ""
        return ("expired", "") if spec.remaining_s is not None and spec.remaining_s <= 0 else None

    def _unserved(self, spec: RequestSpec) -> tuple[str, str] | None:
        return why_unserved(
            spec,
            self._served_model,
            follows_grammars=self._grammars is not None,
            applies_adapters=self._adapters is not None,
        )

    def _on_abort(self, message: Abort) -> None:
        if message.choices or message.unless_arrived:
            return  # these are the decode worker's; the prompt is computed for the other choices
        task = self._tasks.get(message.request_id)
        if task is not None and task.spec.attempt <= message.attempt:
            self._end(task, "aborted by the router")
        self._shipments.cancel(message.request_id, message.attempt, "aborted by the router")

    def _end(self, task: Task, reason: str) -> None:
        """Stop working on a task, and shipping it."""
        self._drop(task)
        if task.open_id is not None:
            self._shipping.cancel(task.open_id, reason)

    def _drop(self, task: Task) -> None:
        """Forget a task. Its blocks go when neither the running step nor its shipment uses them."""
        self._tasks.pop(task.spec.request_id, None)
        self.scheduler.remove(task.prompt)
        if self.fetches is not None:
            self.fetches.cancel(_fetch_key(task.spec))
        task.dead = True
        if not task.stepping:
            self._give_away(task)

    def on_source_free(self, open_id: int) -> None:
        """A shipment reads its source blocks no more (every rank said so)."""
        self._shipments.source_free(open_id)
        task = next((t for t in self._tasks.values() if t.open_id == open_id), None)
        if task is not None:
            # It ended before the prompt was computed: the handoff failed. What is computed stays cached for a retry.
            task.open_id = None
            log.debug("prompt_given_up", request_id=task.spec.request_id, reason="its shipment ended")
            self._end(task, "its shipment ended")

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        if not self.scheduler.prompts:
            return None
        for prompt in self.scheduler.expired():
            task = self._tasks[prompt.seq.request_id]
            self._refuse(task.router_id, task.spec, "expired")
            self._end(task, "its deadline has passed")
        for prompt, why in self.scheduler.failed():
            task = self._tasks[prompt.seq.request_id]
            self._refuse(task.router_id, task.spec, *why)
            self._end(task, f"its {why[0]} cannot be had")
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return None
        batch, prompts = scheduled
        self._step_tasks = [self._tasks[prompt.seq.request_id] for prompt in prompts]
        self._plans = []
        for row, task in zip(batch.rows, self._step_tasks, strict=True):
            task.stepping = True
            if task.grant is not None:
                self._plan(task, task.grant, row)
        return batch

    def _plan(self, task: Task, grant: GrantInfo, row: BatchRow) -> None:
        """Note what of a row is shipped, and open its grant with the first one."""
        if task.open_id is None:
            self._open(task, grant)
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
        self.scheduler.observe(output.step_s - output.swap_s, output.num_tokens)
        self.scheduler.cache.observe(batch, output)
        self.scheduler.cache.end()
        for row, task, result in zip(batch.rows, self._step_tasks, output.rows, strict=True):
            task.stepping = False
            if task.dead:
                self._give_away(task)
                continue
            if not result.is_finite:
                self._fail(task, result.grammar_failure)
                continue
            start = row.start
            task.pooled = add(task.pooled, result.pooled)
            done = self.scheduler.complete(task.prompt, row.num_scheduled_tokens)
            self._send_prompt_logprobs(task, start, result)
            if done and task.prompt.seq.pooling is not None:
                self._finish_embedding(task)
            elif done:
                self._finish(task, result)
        self._step_tasks = []

    def _fail(self, task: Task, grammar_failure: str) -> None:
        """Logits that are no distribution end a request; others are not to find its blocks. So does a grammar that
        cannot be followed any further, whose blocks are sound.

        Its router hears it first, and closes the handoff by its Abort: the decode worker's word of a handoff that has
        failed would have it try again.
        """
        seq = task.prompt.seq
        failure = nothing_to_choose(seq, grammar_failure) if seq.pooling is None else nonfinite_states(seq)
        self._to_router(task.router_id, failure)
        if not grammar_failure:
            self.num_nonfinite_rows += 1
            log.warning("prompt_not_finite", request_id=task.spec.request_id, attempt=task.spec.attempt)
            for block in seq.block_table:
                self.pool.forget(block)
        self._drop(task)

    def _give_away(self, task: Task) -> None:
        """The task's blocks belong to its shipment from here on, or to nobody."""
        seq = task.prompt.seq
        if task.open_id is None or not self._shipments.hold(task.open_id, seq.block_table):
            self.pool.free(seq.block_table)
        seq.block_table = []

    def _send_prompt_logprobs(self, task: Task, start: int, result: RowOutput) -> None:
        for message in in_pieces(task.spec, start + 1, result.prompt_logprobs):
            self._to_router(task.router_id, message)

    def _finish(self, task: Task, result: RowOutput) -> None:
        """The prompt is computed: first tokens to the router, the rest of the shipment to its end."""
        del self._tasks[task.spec.request_id]
        assert task.open_id is not None
        self._give_away(task)
        choices: tuple[ChoiceTokens, ...] = ()
        if task.prompt.seq.samples:
            choices = first_tokens(task, result, eos_token_ids=self._eos_token_ids, max_model_len=self._max_model_len)
            self._to_router(task.router_id, first_token_message(task, choices, self._clock.now()))
        # Where every choice ended with its first token nothing has to arrive. The router ends the handoff by its Abort:
        # the decode worker's word of one that was given up might be heard before the token, and it would try again.
        if not (choices and all(choice.finish for choice in choices)):
            self._shipping.finish(task.open_id, choices, task.prompt.seq.num_cached_tokens)

    def _finish_embedding(self, task: Task) -> None:
        """The prompt is computed, and with it the request: its blocks are the prefix cache's."""
        del self._tasks[task.spec.request_id]
        self._give_away(task)
        self._to_router(task.router_id, embedding_message(task, self._clock.now()))

    def tick(self) -> None:
        """Deadlines are the sender's; nothing to do."""

    def router_of(self, request_id: str, attempt: int) -> str | None:
        """Return the router that asked for an attempt whose shipment has just ended."""
        return self._shipments.ended(request_id, attempt)

    @property
    def routers(self) -> set[str]:
        """Return the routers whose prompts are computed or shipped here."""
        return {task.router_id for task in self._tasks.values()} | self._shipments.routers

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
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            stale_messages=self.stale_messages,
            nonfinite_rows=self.num_nonfinite_rows,
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
        assert {task.prompt for task in self._tasks.values()} == set(self.scheduler.prompts)

    def check(self) -> None:
        """Assert that the books agree, where nobody else has blocks of the pool: tasks, prompts and blocks."""
        self.pool.check()
        self.check_tasks()
        held = Counter(block for blocks in self.references() for block in blocks)
        assert all(self.pool.ref_count(block) == held[block] for block in range(self.pool.num_blocks))


def _fetch_key(spec: RequestSpec) -> str:
    return f"task {spec.request_id}"


def _fetched(seq: Sequence) -> None:
    seq.is_fetching = False
