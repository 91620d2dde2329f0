"""The prefill role: tasks in, first tokens out, KV shipped.

    PrefillTask ─> queued ─> first chunk scheduled: open the grant ─> chunks, pages shipped layer by layer
                                                                        │
                     FirstToken to the router <─ last chunk sampled <───┘
                     finish the shipment; blocks are given back once their pages are no longer read

The role is driven under the worker's lock and knows no thread, socket or tensor: the sender is behind `Shipping`,
messages leave through `to_router`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..common.batch import Batch, RowOutput, StepOutput
from ..common.blocks import BlockPool, prefix_salt
from ..common.clock import Clock
from ..common.errors import CapacityError
from ..common.messages import (
    Abort,
    ChoiceTokens,
    FirstToken,
    GrantInfo,
    LiveRequests,
    LocalTask,
    Message,
    PrefillTask,
    ReserveKV,
    TaskRefused,
    in_pieces,
)
from ..common.request import FinishReason, RequestSpec, Sequence, finish_reason
from ..transfer.handoff import Endpoint, check_grant
from .scheduler import PrefillScheduler, Prompt
from .shipper import ShipPlan, plan_chunk, plan_hits


class Shipping(Protocol):
    """The senders of all ranks, as the role sees them."""

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        """Ask the decode worker for the right to write; returns the open id."""
        ...

    def begin_step(self, plans: list[ShipPlan]) -> None:
        """These blocks will be complete layer by layer during the step that starts now."""
        ...

    def on_layer(self, layer: int) -> None:
        """This step's pages of `layer` are complete."""
        ...

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...]) -> None:
        """Every page is complete and the first tokens are known."""
        ...

    def cancel(self, open_id: int, reason: str) -> None:
        """Ship nothing more. Idempotent."""
        ...


@dataclass(slots=True, eq=False)
class _Task:
    """One attempt at a request on this worker."""

    router_id: str
    spec: RequestSpec
    grant: GrantInfo
    prompt: Prompt
    open_id: int | None = None  # the shipment, once its first chunk was scheduled
    stepping: bool = False  # its row is in the step that computes now
    dead: bool = False  # aborted meanwhile


class PrefillRole:
    """Implements `common.loop.Steps`. All methods but begin_step and on_layer are called with the lock held."""

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
    ) -> None:
        self.pool = pool
        self._endpoint = endpoint
        self.scheduler = PrefillScheduler(
            pool, clock, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        )
        self._clock = clock
        self._shipping = shipping
        self._to_router = to_router
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._tasks: dict[str, _Task] = {}  # by request id: the attempt that computes or waits
        self._shipments: dict[int, list[int]] = {}  # open id -> source blocks held until they are no longer read
        self._reports: dict[tuple[str, int], str] = {}  # (request id, attempt) of a shipment -> router
        self._step_tasks: list[_Task] = []
        self._plans: list[ShipPlan] = []
        self.draining = False
        self.stale_messages = 0

    # --- messages ---------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case PrefillTask():
                self._on_task(router_id, message)
            case Abort():
                self._on_abort(message)
            case LiveRequests():
                self._keep_only(router_id, frozenset(message.live))
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

    def _refuse(self, router_id: str, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self._to_router(
            router_id, TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
        )

    def _on_task(self, router_id: str, message: PrefillTask) -> None:
        spec, grant = message.spec, message.grant
        known = self._tasks.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            self.stale_messages += 1
            return
        if known is not None:
            self._end(known, "a newer attempt has begun")
        misfit = check_grant(self._endpoint, grant)
        if self.draining or misfit is not None:
            self._refuse(router_id, spec, "incompatible" if misfit else "draining", misfit or "")
            return
        seq = Sequence.of(spec, spec.choices[0])
        seq.pending_choices, seq.samples = spec.choices, message.sample
        try:
            prompt = self.scheduler.add(seq, prefix_salt(grant.spec, spec.cache_salt))
        except CapacityError as error:
            self._refuse(router_id, spec, "never_fits", str(error))
            return
        self._tasks[spec.request_id] = _Task(router_id, spec, grant, prompt)

    def _on_abort(self, message: Abort) -> None:
        task = self._tasks.get(message.request_id)
        if task is None or task.spec.attempt > message.attempt or message.choices:
            return  # single choices end on the decode worker; the prompt is computed for the others
        self._end(task, "aborted by the router")

    def _end(self, task: _Task, reason: str) -> None:
        """Stop working on a task. Its blocks go when neither the running step nor its shipment uses them."""
        self._tasks.pop(task.spec.request_id, None)
        self.scheduler.remove(task.prompt)
        task.dead = True
        if not task.stepping:
            self._give_away(task)
        if task.open_id is not None:
            self._shipping.cancel(task.open_id, reason)

    def _free(self, seq: Sequence) -> None:
        self.pool.free(seq.block_table)
        seq.block_table = []

    def on_source_free(self, open_id: int) -> None:
        """A shipment reads its source blocks no more (every rank said so)."""
        task = next((t for t in self._tasks.values() if t.open_id == open_id), None)
        if task is None:
            blocks = self._shipments.pop(open_id, None)
            if blocks is not None:
                self.pool.free(blocks)
            return
        # It ended before the prompt was computed: the handoff failed. What is computed stays cached for a retry.
        del self._shipments[open_id]
        task.open_id = None
        self._end(task, "its shipment ended")

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return None
        batch, prompts = scheduled
        self._step_tasks = [self._tasks[prompt.seq.request_id] for prompt in prompts]
        self._plans = []
        for row, task in zip(batch.rows, self._step_tasks, strict=True):
            task.stepping = True
            if task.open_id is None:
                spec = task.spec
                task.open_id = self._shipping.open(spec.request_id, spec.attempt, task.grant)
                self._reports[spec.request_id, spec.attempt] = task.router_id
                self._shipments[task.open_id] = []  # filled when the task gives its blocks away
                self._plans.append(plan_hits(task.open_id, row.seq, task.grant))
            self._plans.append(plan_chunk(task.open_id, row.seq, task.grant, row.num_scheduled_tokens))
        return batch

    def begin_step(self, batch: Batch) -> None:
        self._shipping.begin_step(self._plans)

    def on_layer(self, layer: int) -> None:
        self._shipping.on_layer(layer)

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self.scheduler.observe(output.step_s, output.num_tokens)
        for row, task, result in zip(batch.rows, self._step_tasks, output.rows, strict=True):
            task.stepping = False
            if task.dead:
                self._give_away(task)
                continue
            start = row.start
            done = self.scheduler.complete(task.prompt, row.num_scheduled_tokens)
            self._send_prompt_logprobs(task, start, result)
            if done:
                self._finish(task, result)
        self._step_tasks = []

    def _give_away(self, task: _Task) -> None:
        """The task's blocks belong to its shipment from here on, or to nobody."""
        seq = task.prompt.seq
        if task.open_id is not None and task.open_id in self._shipments:
            self._shipments[task.open_id] = seq.block_table
            seq.block_table = []
        else:
            self._free(seq)

    def _send_prompt_logprobs(self, task: _Task, start: int, result: RowOutput) -> None:
        for message in in_pieces(task.spec, start + 1, result.prompt_logprobs):
            self._to_router(task.router_id, message)

    def _finish(self, task: _Task, result: RowOutput) -> None:
        """The prompt is computed: first tokens to the router, the rest of the shipment to its end."""
        del self._tasks[task.spec.request_id]
        assert task.open_id is not None
        self._give_away(task)
        choices: tuple[ChoiceTokens, ...] = ()
        if task.prompt.seq.samples:
            choices = self._first_tokens(task, result)
            self._to_router(task.router_id, self._first_token_message(task, choices))
        if choices and all(choice.finish for choice in choices):
            self._shipping.cancel(task.open_id, "every choice ended with its first token")
        else:
            self._shipping.finish(task.open_id, choices)

    def _first_tokens(self, task: _Task, result: RowOutput) -> tuple[ChoiceTokens, ...]:
        seq = task.prompt.seq
        choices = []
        for choice, token in zip(task.spec.choices, result.tokens, strict=True):
            reason: FinishReason | None = finish_reason(
                seq.sampling,
                token.token_id,
                num_output_tokens=1,
                num_tokens=seq.num_prompt_tokens + 1,
                eos_token_ids=self._eos_token_ids,
                max_model_len=self._max_model_len,
            )
            choices.append(ChoiceTokens(choice, 0, (token,), reason))
        return tuple(choices)

    def _first_token_message(self, task: _Task, choices: tuple[ChoiceTokens, ...]) -> FirstToken:
        prompt = task.prompt
        started = prompt.started_s if prompt.started_s is not None else prompt.received_s
        return FirstToken(
            request_id=task.spec.request_id,
            attempt=task.spec.attempt,
            choices=choices,
            num_cached_tokens=prompt.seq.num_cached_tokens,
            prefill_s=max(0.0, self._clock.now() - started),
            queue_s=max(0.0, started - prompt.received_s),
        )

    def tick(self) -> None:
        """Deadlines are the sender's; nothing to do."""

    def router_of(self, request_id: str, attempt: int) -> str | None:
        """Who asked for an attempt whose shipment has just ended."""
        return self._reports.pop((request_id, attempt), None)

    @property
    def prefix_queries(self) -> int:
        return self.scheduler.prefix_queries

    @property
    def prefix_hits(self) -> int:
        return self.scheduler.prefix_hits

    @property
    def num_unfinished(self) -> int:
        return len(self._tasks) + len(self._shipments)

    @property
    def num_granted_blocks(self) -> int:
        """Blocks of shipments that are still being read."""
        return sum(map(len, self._shipments.values()))
