"""The decode role: reservations and arrivals in, tokens out.

    ReserveKV ─> Grant ─> ... the prefill worker writes ... ─> arrived ─> adopted ─┐
    LocalTask ────────────────────────────> waiting ─> prompt computed here ───────┴─> running ─> finished

Each step's new tokens go out in one message per router. Adoption repeats the prefill worker's first token, so the
stream is gapless even if the prefill worker's own message was lost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from ..common.batch import Batch, BatchRow, RowOutput, StepOutput
from ..common.blocks import BlockPool, KVCacheSpec
from ..common.errors import CapacityError
from ..common.messages import (
    Abort,
    ChoiceTokens,
    LiveRequests,
    LocalTask,
    Message,
    PrefillTask,
    RequestTokens,
    ReserveKV,
    StepTokens,
    TaskRefused,
    in_pieces,
)
from ..common.request import FinishReason, RequestSpec, SampledToken, Sequence, finish_reason
from ..transfer.receiver import KVReceiver, Reservation
from .scheduler import DecodeScheduler


@dataclass(slots=True, eq=False)
class _Live:
    """A request that decodes (or computes its prompt) here."""

    router_id: str
    spec: RequestSpec
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by choice; unfinished ones
    dropped: set[int] = field(default_factory=set)  # choices that ended before their prompt was computed
    num_cached_tokens: int = 0


class DecodeRole:
    """Implements `common.loop.Steps`. All methods but begin_step and on_layer are called with the lock held."""

    name = "decode"

    def __init__(
        self,
        *,
        pool: BlockPool,
        spec: KVCacheSpec,
        receiver: KVReceiver,
        to_router: Callable[[str, Message], None],
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self.pool = pool
        self.receiver = receiver
        self.scheduler = DecodeScheduler(
            pool, spec, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        )
        self._to_router = to_router
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._live: dict[str, _Live] = {}
        self._updates: dict[str, dict[str, list[ChoiceTokens]]] = defaultdict(lambda: defaultdict(list))
        # Choices that ended while their prompt was still on its way, by (request id, attempt).
        self._ended_early: dict[tuple[str, int], set[int]] = defaultdict(set)
        self._stale_messages = 0

    # --- messages ---------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case ReserveKV():
                self._on_reserve(router_id, message)
            case LocalTask(spec=spec):
                self._on_local(router_id, spec)
            case Abort():
                self._on_abort(router_id, message)
            case LiveRequests():
                self._keep_only(router_id, frozenset(message.live))
                self.receiver.keep_only(router_id, frozenset(message.live))
            case PrefillTask(spec=spec):
                self._refuse(router_id, spec, "wrong_role", "this worker decodes")
            case _:
                raise AssertionError(f"unexpected {type(message).__name__}")

    def _on_reserve(self, router_id: str, message: ReserveKV) -> None:
        spec = message.spec
        if not self._drop_older(spec):
            return
        answer = self.receiver.reserve(
            spec,
            router_id,
            max_local_tokens=message.max_local_tokens,
            growth_reserve=self.scheduler.growth_reserve,
        )
        self._to_router(router_id, answer)

    def _on_local(self, router_id: str, spec: RequestSpec) -> None:
        if not self._drop_older(spec):
            return
        self.receiver.abort(spec.request_id, spec.attempt)
        if self.receiver.draining:
            self._refuse(router_id, spec, "draining")
            return
        live = _Live(router_id, spec)
        try:
            for seq in self._prompt_sequences(spec):
                self.scheduler.add(seq)
                live.sequences[seq.choice] = seq
        except CapacityError as error:
            for seq in live.sequences.values():
                self.scheduler.remove(seq)
            self._refuse(router_id, spec, "never_fits", str(error))
            return
        self._live[spec.request_id] = live

    def _prompt_sequences(self, spec: RequestSpec) -> list[Sequence]:
        """A fresh request computes its prompt once for all choices; resumed choices go each their own way."""
        if spec.is_resume:
            return [
                Sequence.of(spec, choice, spec.output_token_ids(index)) for index, choice in enumerate(spec.choices)
            ]
        first = Sequence.of(spec, spec.choices[0])
        first.pending_choices = spec.choices
        return [first]

    def _refuse(self, router_id: str, spec: RequestSpec, reason: str, detail: str = "") -> None:
        self._to_router(
            router_id, TaskRefused(request_id=spec.request_id, attempt=spec.attempt, reason=reason, detail=detail)
        )

    def _drop_older(self, spec: RequestSpec) -> bool:
        """A new attempt ends the one before it. False: it is not new, and is dropped itself."""
        live = self._live.get(spec.request_id)
        if live is not None and live.spec.attempt >= spec.attempt:
            self._stale_messages += 1
            return False
        if live is not None:
            self._end(live)
        return True

    def _on_abort(self, router_id: str, message: Abort) -> None:
        live = self._live.get(message.request_id)
        if live is not None and live.spec.attempt <= message.attempt:
            if message.unless_arrived:
                return  # its KV has arrived: it goes on, and the router learns so from its tokens
            for choice in message.choices:
                self._drop_choice(live, choice)
            if not message.choices or not live.sequences or live.dropped >= set(live.spec.choices):
                self._end(live)
            return
        if message.choices:
            if self.receiver.holds(message.request_id):
                self._ended_early[message.request_id, message.attempt].update(message.choices)
        else:
            self.receiver.abort(
                message.request_id, message.attempt, unless_arrived=message.unless_arrived, router_id=router_id
            )

    def _drop_choice(self, live: _Live, choice: int) -> None:
        if any(seq.pending_choices for seq in live.sequences.values()):
            live.dropped.add(choice)  # forgotten when the prompt is done
        elif choice in live.sequences:
            self.scheduler.remove(live.sequences.pop(choice))

    def _end(self, live: _Live) -> None:
        del self._live[live.spec.request_id]
        for seq in live.sequences.values():
            self.scheduler.remove(seq)
        live.sequences.clear()

    def _keep_only(self, router_id: str, keep: frozenset[tuple[str, int]]) -> None:
        for live in list(self._live.values()):
            if live.router_id == router_id and (live.spec.request_id, live.spec.attempt) not in keep:
                self._end(live)

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self._keep_only(router_id, frozenset())
        self.receiver.on_router_lost(router_id)

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        while self.receiver.arrived and self.scheduler.has_row:
            self._adopt(self.receiver.arrived[0])
        batch = self.scheduler.schedule()
        self._flush()
        return batch

    def _adopt(self, reservation: Reservation) -> None:
        """The KV of a prompt is here: its choices join the running batch."""
        blocks, copies = self.receiver.adopt(reservation)
        spec = reservation.spec
        live = _Live(reservation.router_id, spec)
        self._live[spec.request_id] = live
        first = {choice.choice: choice for choice in reservation.first_tokens}
        ended = self._ended_early.pop((spec.request_id, spec.attempt), set())
        sequences = []
        for index, choice in enumerate(spec.choices):
            if choice in ended:
                continue
            outputs = spec.output_token_ids(index)
            if choice in first:
                outputs = [token.token_id for token in first[choice].tokens]
                self._updates[live.router_id][spec.request_id].append(first[choice])
            if choice not in first or first[choice].finish is None:
                sequences.append(Sequence.of(spec, choice, outputs))
        self._place(live, sequences, blocks, copies)

    def _place(self, live: _Live, sequences: list[Sequence], blocks: list[int], copies: list[int]) -> None:
        """Hand a prompt's blocks to its sequences: full ones shared, each its own copy of a partial last one."""
        num_tokens = live.spec.num_prompt_tokens
        num_full, partial = divmod(num_tokens, self.pool.block_size)
        for index, seq in enumerate(sequences):
            live.sequences[seq.choice] = seq
            if index > 0:
                self.pool.pin(blocks[:num_full])
            table = list(blocks[:num_full])
            if partial:
                last = blocks[num_full] if index == 0 else copies.pop()
                if index > 0:
                    self.scheduler.copy_block(blocks[num_full], last)
                table.append(last)
            seq.block_table = table
            if seq.num_output_tokens == 0:  # nothing sampled yet: its prompt's last token is fed once more
                self.pool.free(table)
                seq.block_table = []
                self.scheduler.add(seq)
                continue
            seq.num_computed_tokens = num_tokens
            seq.num_published_blocks = num_full
            self.scheduler.adopt(seq)
        self.pool.free(copies)
        if not sequences:
            self.pool.free(blocks)

    def begin_step(self, batch: Batch) -> None:
        """Nothing is shipped from here."""

    def on_layer(self, layer: int) -> None:
        """Nothing is shipped from here."""

    def complete(self, batch: Batch, output: StepOutput) -> None:
        starts = [row.start for row in batch.rows]
        sampled = [row.samples for row in batch.rows]
        alive = self.scheduler.complete(batch)
        for row, start, samples, result, here in zip(batch.rows, starts, sampled, output.rows, alive, strict=True):
            if not here:
                continue
            self._send_prompt_logprobs(row, start, result)
            if samples:
                self._on_sampled(row.seq, result)
        self._flush()

    def _send_prompt_logprobs(self, row: BatchRow, start: int, result: RowOutput) -> None:
        live = self._live[row.seq.request_id]
        for message in in_pieces(live.spec, start + 1, result.prompt_logprobs):
            self._to_router(live.router_id, message)

    def _on_sampled(self, seq: Sequence, result: RowOutput) -> None:
        live = self._live[seq.request_id]
        if not seq.pending_choices:
            seq.token_ids.append(result.tokens[0].token_id)
            self._after_token(live, seq, result.tokens[0])
            return
        choices, seq.pending_choices = seq.pending_choices, ()
        live.num_cached_tokens = seq.num_cached_tokens
        children = []
        for choice, token in zip(choices, result.tokens, strict=True):
            if choice in live.dropped:
                continue
            if choice == seq.choice:
                children.append((seq, token))
                continue
            child = Sequence.of(live.spec, choice)
            live.sequences[choice] = child
            child.token_ids.append(token.token_id)
            self.scheduler.fork(seq, child)
            children.append((child, token))
        for child, token in children:
            if child is seq:
                child.token_ids.append(token.token_id)
            self._after_token(live, child, token)
        if seq.choice in live.dropped and seq.choice in live.sequences:
            self.scheduler.remove(live.sequences.pop(seq.choice))

    def _after_token(self, live: _Live, seq: Sequence, token: SampledToken) -> None:
        """Queue the token for the router; end the sequence where it ends."""
        reason: FinishReason | None = finish_reason(
            seq.sampling,
            token.token_id,
            num_output_tokens=seq.num_output_tokens,
            num_tokens=seq.num_tokens,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
        )
        update = ChoiceTokens(seq.choice, seq.num_output_tokens - 1, (token,), reason)
        self._updates[live.router_id][seq.request_id].append(update)
        if reason is not None:
            del live.sequences[seq.choice]
            self.scheduler.remove(seq)

    def _flush(self) -> None:
        """One message per router with everything that is new."""
        for router_id, requests in self._updates.items():
            updates = []
            for request_id, choices in requests.items():
                live = self._live.get(request_id)
                if live is None:
                    continue
                updates.append(RequestTokens(request_id, live.spec.attempt, tuple(choices), live.num_cached_tokens))
                if not live.sequences:
                    del self._live[request_id]
            if updates:
                self._to_router(router_id, StepTokens(updates=tuple(updates)))
        self._updates.clear()

    def tick(self) -> None:
        self.receiver.tick()
        for key in [key for key in self._ended_early if not self.receiver.holds(key[0])]:
            del self._ended_early[key]

    @property
    def draining(self) -> bool:
        """No new reservations and prompts."""
        return self.receiver.draining

    @draining.setter
    def draining(self, on: bool) -> None:
        self.receiver.draining = on

    @property
    def stale_messages(self) -> int:
        return self._stale_messages + self.receiver.stale_messages

    @property
    def prefix_queries(self) -> int:
        return self.scheduler.prefix_queries + self.receiver.prefix_queries

    @property
    def prefix_hits(self) -> int:
        return self.scheduler.prefix_hits + self.receiver.prefix_hits

    @property
    def num_unfinished(self) -> int:
        return len(self._live)

    @property
    def num_granted_blocks(self) -> int:
        """Blocks of reservations that are not adopted yet."""
        return self.receiver.num_granted_blocks
