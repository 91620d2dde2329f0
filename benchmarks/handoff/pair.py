"""Both ends of a measured handoff for one shape, and the three things that are measured of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import NamedTuple

import torch

from kvferry.benchmarks.handoff.cases import BLOCK_SIZE, SPECS, Handover, Table, arrange
from kvferry.benchmarks.handoff.copies import Copies
from kvferry.benchmarks.handoff.orders import (
    Begin,
    Books,
    DecodeProcess,
    Held,
    Ready,
    Reserve,
    Reserved,
    Take,
    Taken,
    Usage,
    Used,
)
from kvferry.benchmarks.handoff.pages import checksum
from kvferry.benchmarks.handoff.prefill import HandoffTimes, Pace, PrefillEnd
from kvferry.benchmarks.handoff.report import IdleResult, PacedResult, Round, SizeResult
from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.kvcache.blocks import BlockPool
from kvferry.tools.load.cores import CoreWatch
from kvferry.transfer.backends.host_memory import PageArea
from kvferry.wire.grants import GrantInfo

_POOL_SHARE = 0.8  # of the pool, taken by the largest prompt: scattered blocks have somewhere to be


@dataclass(slots=True, frozen=True)
class Plan:
    """What is measured, of every shape."""

    shapes: tuple[str, ...]
    block_counts: tuple[int, ...]
    tables: tuple[Table, ...]
    num_rounds: int
    max_bytes: int
    paced_tokens: int
    chunk_tokens: int
    ttft_s: float
    num_paced: int
    idle_s: float
    backend: str
    device: str
    seed: int = 0

    def sizes(self, spec: KVCacheSpec) -> list[int]:
        return [count for count in self.block_counts if count * spec.block_bytes() <= self.max_bytes]

    def too_large(self, spec: KVCacheSpec) -> list[int]:
        return [count for count in self.block_counts if count * spec.block_bytes() > self.max_bytes]

    @property
    def num_results(self) -> int:
        """Count the sizes and the paced prompts that are measured."""
        specs = [SPECS[shape] for shape in self.shapes]
        return sum(len(self.sizes(spec)) * len(self.tables) + self.has_paced(spec) for spec in specs)

    @property
    def paced_blocks(self) -> int:
        return -(-self.paced_tokens // BLOCK_SIZE)

    def has_paced(self, spec: KVCacheSpec) -> bool:
        return self.num_paced > 0 and self.paced_blocks * spec.block_bytes() <= self.max_bytes

    def max_blocks(self, spec: KVCacheSpec) -> int:
        """Of a prompt. Raises ConfigError where there is none."""
        counts = self.sizes(spec) + ([self.paced_blocks] if self.has_paced(spec) else [])
        if not counts:
            raise ConfigError(f"--max-bytes {self.max_bytes:,}: no prompt of {spec.model} is that small")
        return max(counts)


class _Prompt(NamedTuple):
    """A granted prompt and its blocks on our side."""

    request_id: str
    grant: GrantInfo
    blocks: list[int]


class Pair:
    """Both ends for one shape."""

    def __init__(self, plan: Plan, spec: KVCacheSpec, child: DecodeProcess) -> None:
        max_blocks = plan.max_blocks(spec)
        self._plan, self._spec, self._child = plan, spec, child
        self._num_blocks = int(max_blocks / _POOL_SHARE) + 1
        self._rng = random.Random(plan.seed)
        self._pool = BlockPool(self._num_blocks, BLOCK_SIZE)
        self._num_requests = 0
        begin = Begin(spec=spec, num_blocks=self._num_blocks, backend=plan.backend, device=plan.device)
        ready = child.ask(begin, Ready)
        self._prefill = PrefillEnd(spec, self._num_blocks, plan.backend, plan.device)
        num_pages = self._num_blocks * spec.num_layers
        self._here = PageArea(self._prefill.pages.data_ptr(), spec.page_bytes(), num_pages)
        self._there = PageArea(ready.region.base_addr, spec.page_bytes(), num_pages)
        self._copies = Copies(self._prefill.pages, max_blocks * spec.block_bytes(), ready.mark)

    def _reserve(self, num_blocks: int, table: Table, *, clear: bool = False) -> _Prompt:
        """A grant, and blocks of our own for the prompt."""
        self._num_requests += 1
        request_id = f"r-{self._num_requests}"
        order = Reserve(
            request_id=request_id,
            num_tokens=num_blocks * BLOCK_SIZE,
            table=table,
            seed=self._rng.randrange(2**31),
            clear=clear,
        )
        grant = self._child.ask(order, Reserved).grant
        arrange(self._pool, table, self._rng)
        blocks = self._pool.allocate(num_blocks)
        self._pool.free(blocks)
        return _Prompt(request_id, grant, blocks)

    def _hand_over(self, prompt: _Prompt, pace: Pace | None = None, *, verify: bool = False) -> HandoffTimes:
        times = self._prefill.ship(prompt.request_id, prompt.grant, prompt.blocks, pace)
        taken = self._child.ask(Take(with_checksum=verify), Taken)
        if verify and taken.checksum != checksum(self._prefill.pages, prompt.blocks):
            raise ConfigError(f"{self._spec.model}, {len(prompt.blocks)} blocks: other bytes arrived than were sent")
        return times

    def measure_size(self, num_blocks: int, table: Table) -> SizeResult:
        num_bytes = num_blocks * self._spec.block_bytes()
        rounds: list[Round] = []
        for number in range(self._plan.num_rounds + 1):
            prompt = self._reserve(num_blocks, table, clear=number == 0)
            handover = Handover.of(self._spec, prompt.blocks, prompt.grant.block_ids, self._num_blocks)
            writes = handover.runs(self._here, self._there)
            # Who comes second finds page tables and caches warm: they take turns.
            writev_s = self._copies.writev_s(writes) if number % 2 else None
            times = self._hand_over(prompt, verify=number == 0)
            if not number % 2:
                writev_s = self._copies.writev_s(writes)
            rounds.append(Round(times, writev_s, self._copies.plain_s(num_bytes)))
        return SizeResult(
            shape=self._spec.model,
            num_blocks=num_blocks,
            table=table,
            num_bytes=num_bytes,
            num_pieces=sum(len(ours) for ours, _ in writes),
            connect_s=self._prefill.backend.connect_s,
            rounds=tuple(rounds[1:]),
        )

    def measure_paced(self, table: Table) -> PacedResult:
        plan = self._plan
        chunk_blocks = max(1, plan.chunk_tokens // BLOCK_SIZE)
        num_chunks = -(-plan.paced_blocks // chunk_blocks)
        pace = Pace(chunk_blocks, plan.ttft_s / (num_chunks * self._spec.num_layers), _Work(plan.device))
        prompts = [self._hand_over(self._reserve(plan.paced_blocks, table), pace) for _ in range(plan.num_paced)]
        return PacedResult(self._spec.model, plan.paced_tokens, table, plan.ttft_s, tuple(prompts))

    def measure_idle(self) -> list[IdleResult]:
        idle = self._idle("idle")
        prompt = self._reserve(1, "contiguous")
        open_id = self._prefill.open(prompt.request_id, prompt.grant)
        waiting = self._idle("a handoff is open")
        self._prefill.cancel(open_id)
        while self._child.ask(Books(), Held).num_live:
            sleep(0.001)
        return [idle, waiting]

    def _idle(self, state: str) -> IdleResult:
        start_s, ours_s, theirs_s = perf_counter(), process_time(), self._child.ask(Usage(), Used).cpu_s
        sleep(self._plan.idle_s)
        used_s = self._child.ask(Usage(), Used).cpu_s - theirs_s
        elapsed_s = perf_counter() - start_s
        return IdleResult(state, round((process_time() - ours_s) / elapsed_s, 4), round(used_s / elapsed_s, 4))

    def close(self) -> None:
        self._copies.close()
        self._prefill.close()


class _Work:
    """Keeps the calling thread computing until a time, as an engine's would be."""

    def __init__(self, device: str) -> None:
        self._matrix = torch.rand(128, 128)
        self._waits = device != "cpu"  # for its GPU: nobody computes here

    def __call__(self, until_s: float) -> None:
        while (left_s := until_s - perf_counter()) > 0:
            if self._waits:
                sleep(left_s)
            else:
                torch.mm(self._matrix, self._matrix)


@contextmanager
def open_pair(plan: Plan, spec: KVCacheSpec) -> Iterator[tuple[Pair, CoreWatch]]:
    """The pair, and a watch over who uses the cores."""
    plan.max_blocks(spec)  # else nothing is to be started
    child = DecodeProcess()
    try:
        pair = Pair(plan, spec, child)
        try:
            yield pair, CoreWatch(lambda: [child.pid])
        finally:
            pair.close()
    finally:
        child.close()
