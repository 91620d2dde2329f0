"""A prefill role and a decode role over one engine and one pool of blocks. Which of them is active may change.

    active     new work of one kind is taken, of the other kind refused ("wrong_role"), from one message to the next;
               prompts to be embedded are taken whichever it is
    started    work of both kinds ends where it is: prompts under way are shipped, reservations arrive and are adopted,
               answers stream on
    steps      while both have work they take turns, the decode role first; a prompt's steps are then cut as its own
               chunks would be, so that no answer stands still

The two know nothing of each other: what they share is the pool, and whoever drives them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from ..common.batch import Batch, StepOutput
from ..common.request import BlockId
from ..decode.role import DecodeRole
from ..kvcache.blocks import BlockPool
from ..prefill.role import PrefillRole
from ..prefill.scheduler import MAX_STEP_S, MIN_STEP_TOKENS
from ..wire.fields import Message
from ..wire.role_counters import RoleCounters
from ..wire.tasks import EmbedTask, LocalTask, PrefillTask, ReserveKV
from ..wire.workers import StepSample

RoleName = Literal["prefill", "decode"]


class RolePair:
    """Both roles as one. All methods but begin_step and on_layer are called with the lock held."""

    def __init__(self, prefill: PrefillRole, decode: DecodeRole, pool: BlockPool, active_role: RoleName) -> None:
        self.prefill = prefill
        self.decode = decode
        self._pool = pool
        self._stepping: PrefillRole | DecodeRole = decode  # had the last turn
        self._was_idle = True
        self.active_role: RoleName = active_role
        self.set_role(active_role)
        # A preempted answer gets the blocks that come free, not the prompts that come.
        prefill.scheduler.reserve = lambda: decode.scheduler.growth_reserve

    def set_role(self, role: RoleName) -> None:
        """Make this role the active one."""
        self.active_role = role
        self.prefill.is_active, self.decode.is_active = role == "prefill", role == "decode"

    def learn(self, samples: Iterable[StepSample]) -> None:
        """Learn how long steps take here, before the first one."""
        for sample in samples:
            tokens, rows = sample.prefill_tokens, sample.decode_rows
            self.decode.scheduler.pace.learn(sample.step_s, num_chunk_tokens=tokens, num_rows=rows)
            if tokens >= MIN_STEP_TOKENS and not rows:
                self.prefill.scheduler.observe(sample.step_s, tokens)

    # --- messages ---------------------------------------------------------------------------------------

    def on_router_message(self, router_id: str, message: Message) -> None:
        match message:
            case PrefillTask() | EmbedTask():
                self.prefill.on_router_message(router_id, message)
            case ReserveKV() | LocalTask():
                self.decode.on_router_message(router_id, message)
            case _:  # about requests, of which either may have some
                self.prefill.on_router_message(router_id, message)
                self.decode.on_router_message(router_id, message)

    def on_router_lost(self, router_id: str) -> None:
        """The router has been away for too long: nobody waits for its requests."""
        self.prefill.on_router_lost(router_id)
        self.decode.on_router_lost(router_id)

    # --- steps ------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        self.prefill.scheduler.max_step_s = self._prefill_step_s()
        prefill_first = self._stepping is self.decode and not self._was_idle
        for role in (self.prefill, self.decode) if prefill_first else (self.decode, self.prefill):
            batch = role.schedule()
            if batch is not None:
                self._stepping, self._was_idle = role, False
                return batch
        self._was_idle = True
        copies = self.decode.scheduler.blocks.cache.idle()
        if copies is not None:
            self._stepping = self.decode  # whose completion knows steps of copies alone
        return copies

    def _prefill_step_s(self) -> float:
        """Return the seconds that a step of prompts may take."""
        decode = self.decode.scheduler
        if not decode.num_running:
            return MAX_STEP_S
        prompts = [prompt.seq.num_uncached_tokens for prompt in self.prefill.scheduler.prompts]
        return min(MAX_STEP_S, decode.pace.room_s(decode.num_running, prompts))

    @property
    def is_step_vain(self) -> bool:
        """Tell whether a step of the decode role computes of which nothing is wanted any more.

        One of the prefill role goes on: its layers are under way to other workers, and what it computed is kept.
        """
        return self.decode.scheduler.is_step_vain

    def begin_step(self, batch: Batch) -> None:
        self._stepping.begin_step(batch)

    def on_layer(self, layer: int) -> None:
        self._stepping.on_layer(layer)

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self._stepping.complete(batch, output)

    def tick(self) -> None:
        self.prefill.tick()
        self.decode.tick()

    # --- what others see --------------------------------------------------------------------------------

    @property
    def stepping(self) -> str:
        """Return the role whose step runs, or ran last."""
        return self._stepping.name

    @property
    def draining(self) -> bool:
        """Nothing new of either kind."""
        return self.decode.draining

    @draining.setter
    def draining(self, on: bool) -> None:
        self.prefill.draining = self.decode.draining = on

    def counters(self) -> RoleCounters:
        """Sum the figures of both roles."""
        return self.prefill.counters() + self.decode.counters()

    @property
    def num_unfinished(self) -> int:
        return self.prefill.num_unfinished + self.decode.num_unfinished

    @property
    def routers(self) -> set[str]:
        """Return the routers that have work here."""
        return self.prefill.routers | self.decode.routers

    @property
    def is_quiet(self) -> bool:
        """Nothing is left of any request."""
        return self.prefill.is_quiet and self.decode.is_quiet

    def references(self) -> list[list[BlockId]]:
        """List the references to blocks of the pool that requests hold."""
        return self.prefill.references() + self.decode.references()

    def check(self, others: Iterable[Iterable[BlockId]] = ()) -> None:
        """Assert that the books of both agree, and that every reference to a block has a holder in one of them.

        `others`: references that neither role holds.
        """
        self.prefill.check_tasks()
        self.decode.check()
        held = Counter(block for blocks in (*self.references(), *others) for block in blocks)
        assert all(self._pool.ref_count(block) == held[block] for block in range(self._pool.num_ids))
