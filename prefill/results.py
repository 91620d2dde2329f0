"""A step's results: prompts go on, first tokens and embeddings to the routers, shipments to their end.

Logits that are no distribution end the request that they belong to, and its blocks are not kept for others.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from ..common.batch import Batch, RowOutput, StepOutput
from ..common.clock import Clock
from ..common.vectors import add
from ..kvcache.blocks import BlockPool
from ..wire.fields import Message
from ..wire.results import ChoiceTokens, in_pieces, nonfinite_states, nothing_to_choose
from .scheduler import PrefillScheduler
from .shipments import Shipping
from .task import Task, embedding_message, first_token_message, first_tokens
from .tasks import Tasks

log = structlog.get_logger(__name__)


class StepResults:
    """Takes in finished steps."""

    def __init__(
        self,
        pool: BlockPool,
        scheduler: PrefillScheduler,
        tasks: Tasks,
        shipping: Shipping,
        to_router: Callable[[str, Message], None],
        *,
        clock: Clock,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._pool = pool
        self._scheduler = scheduler
        self._tasks = tasks
        self._shipping = shipping
        self._to_router = to_router
        self._clock = clock
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self.num_nonfinite_rows = 0

    def take(self, batch: Batch, output: StepOutput, tasks: list[Task]) -> None:
        """`tasks`: of the batch's rows."""
        self._scheduler.observe(output.step_s - output.swap_s, output.num_tokens)
        self._scheduler.cache.observe(batch, output)
        self._scheduler.cache.end()
        for row, task, result in zip(batch.rows, tasks, output.rows, strict=True):
            task.stepping = False
            if task.dead:
                self._tasks.give_away(task)
                continue
            if not result.is_finite:
                self._fail(task, result.grammar_failure)
                continue
            start = row.start
            task.pooled = add(task.pooled, result.pooled)
            done = self._scheduler.complete(task.prompt, row.num_scheduled_tokens)
            self._send_prompt_logprobs(task, start, result)
            if done and task.prompt.seq.pooling is not None:
                self._finish_embedding(task)
            elif done:
                self._finish(task, result)

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
                self._pool.forget(block)
        self._tasks.drop(task)

    def _send_prompt_logprobs(self, task: Task, start: int, result: RowOutput) -> None:
        for message in in_pieces(task.spec, start + 1, result.prompt_logprobs):
            self._to_router(task.router_id, message)

    def _finish(self, task: Task, result: RowOutput) -> None:
        """The prompt is computed: first tokens to the router, the rest of the shipment to its end."""
        assert task.open_id is not None
        self._tasks.done(task)
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
        self._tasks.done(task)
        self._to_router(task.router_id, embedding_message(task, self._clock.now()))
