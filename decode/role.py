"""The decode role: reservations and arrivals in, tokens out.

    ReserveKV ─> Grant ─> ... the prefill worker writes ... ─> arrived ─> adopted ─┐
    LocalTask ────────────────────────────> waiting ─> prompt computed here ───────┴─> running ─> finished

Each step's new tokens go out in one message per router. Adoption repeats the prefill worker's first token, so the
stream is gapless even if the prefill worker's own message was lost.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

from ..common import failpoints
from ..common.batch import Batch, StepOutput
from ..common.clock import Clock
from ..common.config import SpeculativeConfig
from ..common.kv_spec import KVCacheSpec
from ..common.served import PLAIN, Served
from ..kvcache.blocks import BlockPool
from ..kvcache.contents import Contents, TokenContents
from ..kvcache.prefix_cache import PrefixCache
from ..transfer.fetch.fetches import Fetches
from ..transfer.receive.receiver import KVReceiver
from ..wire.fields import Message
from ..wire.results import WorkerFailure
from ..wire.role_counters import RoleCounters
from .adoption import Adoption
from .intake import Intake
from .local import LocalRequests
from .outbox import Outbox
from .promises import Promises
from .requests import RunningRequests
from .results import StepResults
from .scheduler import DecodeScheduler
from .speculation import Speculation
from .waiting import WaitingReservations


class DecodeRole:
    """Answers and their arrival. All methods but begin_step and on_layer are called with the lock held."""

    name = "decode"

    def __init__(
        self,
        *,
        pool: BlockPool,
        spec: KVCacheSpec,
        receiver: KVReceiver,
        clock: Clock,
        to_router: Callable[[str, Message], None],
        eos_token_ids: frozenset[int],
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        num_swap_blocks: int = 0,
        tpot_objective_s: float | None = None,
        cache: PrefixCache | None = None,
        leaving: Callable[[], Callable[[], object]] | None = None,
        served: Served = PLAIN,
        speculative: SpeculativeConfig | None = None,
        keeps_states: bool = False,
        contents: Contents | None = None,
    ) -> None:
        """`leaving()` returns what waits until all that was sent has left this process; None: it leaves at once.

        `speculative` None: no token is drafted. `keeps_states`: some of the model's layers do. `contents`: reads
        requests; None: by their token ids.
        """
        self.pool = pool
        self.receiver = receiver
        speculation = None
        if speculative is not None:
            speculation = Speculation(
                speculative, max_model_len, block_size=spec.block_size, keeps_states=keeps_states, clock=clock
            )
        self.scheduler = DecodeScheduler(
            pool,
            spec,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            num_swap_blocks=num_swap_blocks,
            tpot_objective_s=tpot_objective_s,
            cache=cache,
            speculation=speculation,
        )
        self._clock = clock
        self._to_router = to_router
        contents = contents if contents is not None else TokenContents(spec)
        self.fetches: Fetches | None = None  # None: everything that is not in the cache is computed
        self._outbox = Outbox(to_router)
        self._requests = RunningRequests(self.scheduler, self._outbox)
        self._results = StepResults(
            self.scheduler,
            self._requests,
            self._outbox,
            to_router,
            contents=contents,
            served=served,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
        )
        self._leaving = leaving
        self._wait_left: Callable[[], object] | None = None
        self._adoption = Adoption(receiver, self.scheduler, self._requests, self._outbox, clock, contents, served)
        waiting = WaitingReservations(receiver, pool, spec, clock, contents, lambda: self.scheduler.growth_reserve)
        self._promises = Promises(receiver, waiting, self._adoption, to_router)
        local = LocalRequests(
            self.scheduler,
            self._requests,
            lambda: self.fetches,
            clock=clock,
            contents=contents,
            served=served,
        )
        self._intake = Intake(self._requests, self._promises, local, receiver, to_router, served)

    # --- messages ---------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        self._intake.take(router_id, message)

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self._intake.keep_only(router_id, frozenset())

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        self._drop_expired()
        has_adopted = self._adoption.adopt_arrived()
        self._drop_failed()
        batch = self.scheduler.schedule()
        self._end_misfits()
        self._promises.retry()
        self._outbox.flush()
        # A worker that is lost in its first step with a request must have said that it has it: else nobody would find
        # out which request it is that ends workers.
        self._wait_left = self._leaving() if has_adopted and self._leaving is not None else None
        if batch is not None and self._leaving is not None and _has_costly_grammar(batch):
            batch.wait_left = self._wait_left or self._leaving()
        return batch

    def _drop_expired(self) -> None:
        """Refuse what is beyond its deadline: its router has given it up, or will at once."""
        for request in self._requests.expired(self._clock.now()):
            self._intake.refuse(request.router_id, request.spec, "expired")
            self._requests.end(request)

    def _drop_failed(self) -> None:
        """Refuse what follows a grammar that cannot be compiled, or has an adapter that cannot be loaded."""
        for request, why in self._requests.failed():
            self._intake.refuse(request.router_id, request.spec, *why)
            self._requests.end(request)

    def adapters_in_use(self) -> tuple[set[str], list[str]]:
        """Return the adapters of sequences that have a row, and those of all other requests, promised ones last."""
        begun = {seq.adapter for seq in self.scheduler.queues.running if seq.adapter}
        rest = (spec.adapter for spec in self._promises.specs() if spec.adapter)
        return begun, [*self._requests.adapters(), *rest]

    def _end_misfits(self) -> None:
        """Sequences that outgrew the whole pool would wait for ever."""
        while self.scheduler.queues.misfits:
            seq = self.scheduler.queues.misfits[0]
            request = self._requests.request_of(seq)
            reason = f"{seq.num_tokens} tokens of choice {seq.choice} do not fit into {self.pool.num_blocks} blocks"
            self._to_router(
                request.router_id,
                WorkerFailure(request_id=seq.request_id, attempt=seq.attempt, reason=reason),
            )
            self._requests.end(request)

    def begin_step(self, batch: Batch) -> None:
        """Nothing is shipped from here."""
        if self._wait_left is not None:
            self._wait_left()
        if failpoints.armed:
            failpoints.hit("decode.step", chain.from_iterable(row.seq.token_ids for row in batch.rows))

    def on_layer(self, layer: int) -> None:
        """Nothing is shipped from here."""

    def complete(self, batch: Batch, output: StepOutput) -> None:
        if failpoints.armed:
            failpoints.hit("decode.stepped")
        self._results.take(batch, output)
        self._outbox.flush()

    def tick(self) -> None:
        self._promises.tick()

    # --- what others see ----------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """No new reservations and prompts."""
        return self.receiver.draining

    @draining.setter
    def draining(self, on: bool) -> None:
        self.receiver.draining = on
        if on:
            self._promises.give_up_unopened()
        self._promises.retry()

    @property
    def is_active(self) -> bool:
        """False: nothing new is begun. What was reserved still arrives and is adopted, what runs goes on."""
        return self.receiver.is_active

    @is_active.setter
    def is_active(self, on: bool) -> None:
        self.receiver.is_active = on
        self._promises.retry()

    @property
    def routers(self) -> set[str]:
        """Return the routers that have a request here, or are promised room for one."""
        return self._requests.routers | self._promises.routers

    @property
    def num_waiting_reservations(self) -> int:
        """Count the requests that wait for blocks to be promised to them."""
        return self._promises.num_waiting

    def counters(self) -> RoleCounters:
        scheduler, receiver = self.scheduler, self.receiver
        return RoleCounters(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.waiting_tokens,
            num_granted_blocks=receiver.reservations.num_granted_blocks,  # not adopted yet
            num_preemptions=scheduler.num_preemptions,
            prefix_queries=scheduler.blocks.prefix_queries + receiver.counters.prefix_queries,
            prefix_hits=scheduler.blocks.prefix_hits + receiver.counters.prefix_hits,
            stale_messages=self._requests.stale_messages + receiver.counters.stale_messages,
            nonfinite_rows=self._results.num_nonfinite_rows,
        )

    @property
    def num_unfinished(self) -> int:
        """Requests, handoffs under way among them. What lies in quarantine does not count: our end fences it."""
        return len(self._requests) + self._promises.num_unfinished

    def references(self) -> list[list[int]]:
        """All references to blocks of the pool that sequences, copies and reservations hold."""
        return self.scheduler.references() + self._promises.references()

    @property
    def is_quiet(self) -> bool:
        """Nothing is left of any request but what is remembered of those that ended, which is bounded."""
        books_are_empty = not len(self._requests) and self._promises.is_empty and self._outbox.is_empty
        return books_are_empty and self.scheduler.is_quiet

    def check(self) -> None:
        """Assert that the books agree: reservations, sequences, blocks and slots."""
        self.receiver.check()
        self.scheduler.check()
        self._requests.check()


def _has_costly_grammar(batch: Batch) -> bool:
    return any(row.seq.grammar is not None and row.seq.grammar.is_costly for row in batch.rows)
