"""A step's results: tokens go to their sequences and to the routers, choices are forked from their prompt, answers end.

Logits that are no distribution end the request that they belong to. Its blocks are not kept for others: what is not
finite in them would end these, too.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.batch import Batch, BatchRow, RowOutput, Run, StepOutput
from ..common.request import FinishReason, SampledToken, Sequence, finish_reason
from ..common.served import Served
from ..kvcache.contents import Contents
from ..wire.fields import Message
from ..wire.results import ChoiceTokens, in_pieces, nothing_to_choose
from .outbox import Outbox
from .requests import RunningRequests
from .running import RunningRequest
from .scheduler import DecodeScheduler


class StepResults:
    """Takes in finished steps."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        requests: RunningRequests,
        outbox: Outbox,
        to_router: Callable[[str, Message], None],
        *,
        contents: Contents,
        served: Served,
        eos_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._scheduler = scheduler
        self._requests = requests
        self._outbox = outbox
        self._to_router = to_router
        self._contents = contents
        self._served = served
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self.num_nonfinite_rows = 0

    def take(self, batch: Batch, output: StepOutput) -> None:
        starts = [row.start for row in batch.rows]
        sampled = [row.samples for row in batch.rows]
        if not output.is_stopped:
            self._scheduler.observe(batch, output)
        postponed = {place for place, result in enumerate(output.rows) if result.is_postponed}
        alive = self._scheduler.complete(batch, postponed)
        failed = {
            row.seq.request_id: result.grammar_failure
            for row, result in zip(batch.rows, output.rows, strict=True)
            if not result.is_finite
        }
        for row, start, samples, result, here in zip(batch.rows, starts, sampled, output.rows, alive, strict=True):
            self.num_nonfinite_rows += not result.is_finite and not result.grammar_failure
            if not here or result.is_postponed:
                continue
            if row.seq.request_id in failed:
                self._fail(row.seq, failed[row.seq.request_id])
                continue
            if result.prompt_logprobs:
                self._send_prompt_logprobs(row, start, result)
            if samples:
                self._on_sampled(row.seq, result)

    def _fail(self, seq: Sequence, grammar_failure: str) -> None:
        """End the request that the row was of, with all its choices."""
        request = self._requests.get(seq.request_id)
        if request is None:  # it had another row in this step
            return
        if not grammar_failure:
            for one in request.sequences.values():
                self._scheduler.blocks.known.unpublish(one)
        self._to_router(request.router_id, nothing_to_choose(seq, grammar_failure))
        self._requests.end(request)

    def _send_prompt_logprobs(self, row: BatchRow, start: int, result: RowOutput) -> None:
        request = self._requests.request_of(row.seq)
        for message in in_pieces(request.spec, start + 1, result.prompt_logprobs):
            self._to_router(request.router_id, message)

    def _on_sampled(self, seq: Sequence, result: RowOutput) -> None:
        request = self._requests.request_of(seq)
        if not seq.pending_choices:
            self._on_run(request, seq, result.runs[0], result.forced)
            return
        choices, seq.pending_choices = seq.pending_choices, ()
        request.num_cached_tokens = seq.num_cached_tokens
        if (grammar := request.grammar) is not None and seq.grammar is not grammar:  # the mask of first tokens
            if not grammar.is_ready:
                grammar = request.grammar = self._served.grammar(request.spec, is_awaited=True)
            seq.grammar, seq.matcher = grammar, None
        runs = {choice: run for choice, run in zip(choices, result.runs, strict=True) if choice not in request.dropped}
        for choice, run in runs.items():
            if choice != seq.choice:
                child = self._contents.sequence(request.spec, choice, [run[0].token_id])
                child.grammar, child.held_adapter = seq.grammar, seq.held_adapter
                request.sequences[choice] = child
                self._scheduler.fork(seq, child)
        for choice, run in runs.items():
            self._on_run(request, request.sequences[choice], run, result.forced)
        if seq.choice in request.dropped:
            self._requests.remove(request, seq)

    def _on_run(self, request: RunningRequest, seq: Sequence, run: Run, forced: tuple[int, ...] = ()) -> None:
        """Queue a run, and what must follow it, for the router, up to where the sequence ends."""
        if len(seq.token_ids) == seq.num_computed_tokens:  # a fork has its first token already
            seq.token_ids.append(run[0].token_id)
        first, num_taken, reason = seq.num_output_tokens - 1, 1, self._finish_reason(seq, run[0])
        if reason is None and len(run) > 1:
            num_taken += self._extend(seq, run)
        while reason is None and num_taken < len(run):
            token = run[num_taken]
            seq.token_ids.append(token.token_id)
            num_taken, reason = num_taken + 1, self._finish_reason(seq, token)
        if num_taken > 1:
            self._scheduler.accept(seq, num_taken - 1)
        run = run[:num_taken]
        for token_id in forced[: self._scheduler.room_for(seq, len(forced))] if forced and reason is None else ():
            token = SampledToken(token_id)
            seq.token_ids.append(token_id)
            run, reason = (*run, token), self._finish_reason(seq, token)
            if reason is not None:
                break
        self._outbox.add(request, ChoiceTokens(seq.choice, first, run, reason))
        if reason is not None:
            self._requests.remove(request, seq)

    def _extend(self, seq: Sequence, run: Run) -> int:
        """Take what comes after a run's first token at once, as far as none of it can be the last; say how many."""
        sampling, ends = seq.sampling, self._eos_token_ids.union(seq.sampling.stop_token_ids)
        room = min(sampling.max_tokens - seq.num_output_tokens, self._max_model_len - seq.num_tokens)
        token_ids = [token.token_id for token in run[1:room]]
        if not ends.isdisjoint(token_ids):
            del token_ids[next(place for place, token_id in enumerate(token_ids) if token_id in ends) :]
        seq.token_ids.extend(token_ids)
        return len(token_ids)

    def _finish_reason(self, seq: Sequence, last: SampledToken) -> FinishReason | None:
        """Say why the sequence ends with its last token; None: it goes on."""
        num_tokens = len(seq.token_ids)
        return finish_reason(
            seq.sampling,
            last.token_id,
            num_output_tokens=num_tokens - seq.num_prompt_tokens,
            num_tokens=num_tokens,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
            ends_by_grammar=seq.ends_by_grammar,
        )
