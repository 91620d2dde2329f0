"""Where a request runs: a pure function of a `PoolView` and of what the request needs.

    decode worker   the least loaded with room for the prompt's blocks and every choice
    prefill worker  the one with the fewest prompt tokens ahead, and about one step of them at most (late binding);
                    None: the decode worker computes the prompt itself

No I/O, no clock, no state: the dispatcher asks again at every event and does what the answer says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ..common.blocks import KVCacheSpec
from .pools import PoolView, WorkerView

# A grant lapses if it is not opened within 2 s: a task is not bound behind more work than this.
MAX_BIND_WAIT_S = 1.5
_BOUND_SHARE_OF_OBJECTIVE = 0.25


class Reason(Enum):
    """Why a placement has, or has not, a prefill worker."""

    HANDOFF = "handoff"
    SHORT_PROMPT = "short_prompt"  # its handoff would cost more than its prefill
    COLOCATED = "colocated"  # no prefill pool is configured
    NO_PREFILL_WORKER = "no_prefill_worker"  # a fallback: none lives that can hold the prompt
    FAILED_HANDOFF = "failed_handoff"  # a fallback: with every pair a handoff has failed
    ALONE = "alone"  # it may kill workers (isolation.py)

    @property
    def is_fallback(self) -> bool:
        return self in (Reason.NO_PREFILL_WORKER, Reason.FAILED_HANDOFF)


class Lack(Enum):
    """What a request that cannot be placed waits for."""

    DECODE_WORKER = "decode_worker"  # none is ready
    PREFILL_WORKER = "prefill_worker"  # none is ready, and the decode workers may not stand in
    DECODE_ROOM = "decode_room"
    PREFILL_ROOM = "prefill_room"
    PAIR = "pair"  # with every pair of ready workers a handoff has failed
    FIT = "fit"  # no worker can ever hold it


@dataclass(slots=True, frozen=True)
class Placement:
    prefill_worker: str | None
    decode_worker: str
    reason: Reason


@dataclass(slots=True, frozen=True)
class Wait:
    """No placement now. `claim`: the decode session whose room is kept for this request from those behind it."""

    lack: Lack
    claim: int | None = None


@dataclass(slots=True, frozen=True)
class Demand:
    """What one request needs, and what it has learned about workers (session numbers)."""

    num_prompt_tokens: int
    num_tokens: int  # prompt and the longest choice's accepted tokens
    max_num_tokens: int  # prompt and the longest answer
    num_choices: int
    busy: frozenset[int] = frozenset()  # said no since their last heartbeat, or kept for an older request
    unfit: frozenset[int] = frozenset()  # can never hold it
    ungranted: frozenset[int] = frozenset()  # decode workers that can only compute it themselves
    failed_pairs: frozenset[tuple[int, int]] = frozenset()  # (prefill, decode)
    computed_on: int | None = None  # the prefill worker that has the prompt's KV in its cache
    knocks: bool = False  # it has waited: a worker that others fill is asked all the same

    def blocks_now(self, spec: KVCacheSpec) -> int:
        """For the prompt, and a first block of its own for each choice after the first."""
        return spec.num_blocks_for(self.num_tokens) + self.num_choices - 1

    def blocks_to_end(self, spec: KVCacheSpec) -> int:
        """Full prompt blocks are shared by the choices, the rest is each one's own."""
        shared = self.num_prompt_tokens // spec.block_size
        return shared + self.num_choices * (spec.num_blocks_for(self.max_num_tokens) - shared)


class RoutingPolicy(Protocol):
    """Decides; never remembers."""

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait: ...

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        """Another prefill worker for a grant that this decode worker has given, or None."""
        ...


class LeastLoaded:
    """The fewest prompt tokens ahead, then the fewest running choices, then the most free blocks."""

    def __init__(
        self,
        *,
        local_prefill: bool = True,
        max_local_prefill_tokens: int = 0,
        expect_prefill: bool = True,
        ttft_objective_s: float | None = None,
    ) -> None:
        """With an objective, little of its time is spent waiting on a worker, where nothing can be refused any more."""
        self._max_bind_wait_s = min(MAX_BIND_WAIT_S, (ttft_objective_s or math.inf) * _BOUND_SHARE_OF_OBJECTIVE)
        self._local_prefill = local_prefill or not expect_prefill
        self._max_local_prefill_tokens = max_local_prefill_tokens
        self._expect_prefill = expect_prefill

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait:
        ready = view.ready("decode")
        if not ready:
            return Wait(Lack.DECODE_WORKER)
        decodes = [worker for worker in ready if fits_decode(worker, demand)]
        if not decodes:
            return Wait(Lack.FIT)
        prefills = view.ready("prefill")
        reason = self._local_reason(view, demand, prefills, decodes)
        if isinstance(reason, Wait):
            return reason
        if reason is Reason.HANDOFF:
            return self._place_pair(view, demand, prefills, decodes)
        roomy = [worker for worker in decodes if has_decode_room(worker, demand) and not _is_behind(worker, demand)]
        if not roomy:
            return _wait_for_room(decodes)
        return Placement(None, min(roomy, key=_decode_load).worker_id, reason)

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        able = [
            worker
            for worker in view.ready("prefill")
            if fits_prefill(worker, demand)
            and has_prefill_room(worker, demand, self._max_bind_wait_s)
            and (worker.session, decode_session) not in demand.failed_pairs
        ]
        return min(able, key=lambda worker: (worker.session != demand.computed_on, _prefill_load(worker)), default=None)

    def _local_reason(
        self, view: PoolView, demand: Demand, prefills: list[WorkerView], decodes: list[WorkerView]
    ) -> Reason | Wait:
        """HANDOFF, or why the prompt is computed on the decode worker instead."""
        if not self._expect_prefill:
            return Reason.COLOCATED
        if self._local_prefill and demand.num_prompt_tokens <= self._max_local_prefill_tokens:
            return Reason.SHORT_PROMPT
        able = [worker for worker in prefills if fits_prefill(worker, demand)]
        if not able:
            if self._local_prefill:
                return Reason.NO_PREFILL_WORKER
            return Wait(Lack.FIT if prefills else Lack.PREFILL_WORKER)
        if _pairs(able, decodes, demand):
            return Reason.HANDOFF
        return Reason.FAILED_HANDOFF if self._local_prefill else Wait(Lack.PAIR)

    def _place_pair(
        self, view: PoolView, demand: Demand, prefills: list[WorkerView], decodes: list[WorkerView]
    ) -> Placement | Wait:
        roomy = [worker for worker in decodes if has_decode_room(worker, demand)]
        if not roomy:
            return _wait_for_room(decodes)
        able = [
            worker
            for worker in prefills
            if fits_prefill(worker, demand) and has_prefill_room(worker, demand, self._max_bind_wait_s)
        ]
        pairs = _pairs(able, roomy, demand)
        if not pairs:
            return Wait(Lack.PREFILL_ROOM if _pairs(prefills, roomy, demand) else Lack.DECODE_ROOM)
        prefill, decode = min(
            pairs,
            key=lambda pair: (
                (pair[0].session, pair[1].session) in view.avoided_pairs,
                pair[0].session != demand.computed_on,
                _prefill_load(pair[0]),
                _decode_load(pair[1]),
            ),
        )
        return Placement(prefill.worker_id, decode.worker_id, Reason.HANDOFF)


def fits_decode(worker: WorkerView, demand: Demand) -> bool:
    """Alone on the worker, the request could run to its end."""
    if worker.session in demand.unfit:
        return False
    return demand.blocks_to_end(worker.hello.spec) <= worker.hello.num_blocks


def fits_prefill(worker: WorkerView, demand: Demand) -> bool:
    blocks = worker.hello.spec.num_blocks_for(demand.num_prompt_tokens)
    return worker.session not in demand.unfit and blocks <= worker.hello.num_blocks


def has_decode_room(worker: WorkerView, demand: Demand) -> bool:
    """A row for each choice, and the blocks for now with one to spare for each choice that runs already."""
    if worker.session in demand.busy:
        return False
    if worker.num_running == 0:
        return True  # nothing of ours is there to wait for: let the worker decide
    if demand.knocks and (worker.num_bound == 0 or worker.num_others):
        return True  # another router may fill it for ever, unless the worker keeps blocks for this request
    if worker.num_running + demand.num_choices > worker.hello.max_num_seqs:
        return False
    return demand.blocks_now(worker.hello.spec) + worker.num_running <= worker.num_free_blocks


def has_prefill_room(worker: WorkerView, demand: Demand, max_wait_s: float) -> bool:
    """About one step of work ahead at most, and that soon done. A short prompt may overtake a long one."""
    if worker.session in demand.busy:
        return False
    if worker.num_bound == 0 and worker.ahead_tokens == 0:
        return True
    budget = worker.hello.max_num_batched_tokens
    if worker.ahead_tokens <= budget or (demand.knocks and worker.num_bound == 0):
        wait_s = worker.ahead_tokens * worker.s_per_token
    elif demand.num_prompt_tokens + worker.unstarted_tokens <= budget:
        wait_s = worker.step_s  # one chunk of the long one
    else:
        return False
    return wait_s <= max_wait_s


def _is_behind(worker: WorkerView, demand: Demand) -> bool:
    """More than a step of prompts waits there: late binding for local prompts. A few short ones may overtake."""
    budget = worker.hello.max_num_batched_tokens
    return worker.ahead_tokens > budget < demand.num_prompt_tokens + worker.unstarted_tokens


def _pairs(
    prefills: list[WorkerView], decodes: list[WorkerView], demand: Demand
) -> list[tuple[WorkerView, WorkerView]]:
    return [
        (prefill, decode)
        for prefill in prefills
        for decode in decodes
        if decode.session not in demand.ungranted and (prefill.session, decode.session) not in demand.failed_pairs
    ]


def _wait_for_room(decodes: list[WorkerView]) -> Wait:
    """Keep the worker that is nearest to having room for this request, else smaller ones could starve it."""
    return Wait(Lack.DECODE_ROOM, max(decodes, key=lambda worker: (worker.num_free_blocks, worker.worker_id)).session)


def _prefill_load(worker: WorkerView) -> tuple[int, int, str]:
    return (worker.ahead_tokens, worker.num_bound, worker.worker_id)


def _decode_load(worker: WorkerView) -> tuple[int, int, int, str]:
    return (worker.num_running, worker.ahead_tokens, -worker.num_free_blocks, worker.worker_id)
