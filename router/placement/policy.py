"""Where a request runs: a function of a `PoolView` and of what the request needs. The policies are in `policies/`.

No I/O and no clock: the dispatcher asks again at every event and does what the answer says. What every policy has to
respect is here: who can hold a request at all, who has room for it now, and how little is bound ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from ...kvcache.blocks import KVCacheSpec
from ..state.objectives import NO_OBJECTIVES, Objectives
from ..state.views import PoolView, WorkerView

# A grant lapses if it is not opened within 2 s: a task is not bound behind more work than this.
MAX_BIND_WAIT_S = 1.5
BOUND_SHARE_OF_OBJECTIVE = 0.25


class Reason(Enum):
    """Why a placement has, or has not, a prefill worker."""

    HANDOFF = "handoff"
    SHORT_PROMPT = "short_prompt"  # its handoff would cost more than its prefill
    COLOCATED = "colocated"  # no prefill pool is configured
    NO_PREFILL_WORKER = "no_prefill_worker"  # a fallback: none lives that can hold the prompt
    FAILED_HANDOFF = "failed_handoff"  # a fallback: with every pair a handoff has failed
    ALONE = "alone"  # it may kill workers (isolation.py)
    SOONER = "sooner"  # its first token comes sooner so, and the streams there keep their pace

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
class Prediction:
    """What a policy expects of a placement."""

    ttft_s: float  # from the placement on
    tpot_s: float
    prefill_s: float = 0.0  # of the first, computing the prompt
    wait_s: float = 0.0  # of the first, for prompts ahead
    cached_tokens: int = 0
    bare_s: float = 0.0  # of the first, the steps that compute the prompt, with what they do for streams beside it


@dataclass(slots=True, frozen=True)
class Placement:
    prefill_worker: str | None
    decode_worker: str
    reason: Reason
    fetch_from: str | None = None  # a worker from which whoever computes the prompt reads its beginning
    prediction: Prediction | None = field(default=None, compare=False)


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
    cached: Mapping[int, int] = field(default_factory=dict)  # session: tokens of the prompt's beginning that it holds
    objectives: Objectives = NO_OBJECTIVES
    ttft_limit_s: float | None = None  # of its objectives, for a prompt as long as this
    waited_s: float = 0.0  # since it came
    expected_output: int = 0  # tokens of each choice
    may_miss: bool = False  # its first token comes too late whatever is done, or it has got one: no hurry for it

    def blocks_now(self, spec: KVCacheSpec) -> int:
        """For the prompt, and a first block of its own for each choice after the first."""
        return spec.num_blocks_for(self.num_tokens) + self.num_choices - 1

    def blocks_to_end(self, spec: KVCacheSpec) -> int:
        """Full prompt blocks are shared by the choices, the rest is each one's own."""
        shared = self.num_prompt_tokens // spec.block_size
        return shared + self.num_choices * (spec.num_blocks_for(self.max_num_tokens) - shared)


class RoutingPolicy(Protocol):
    """Decides. What it remembers, if anything, is its own business."""

    name: str
    predicts: bool  # it asks the predictor; the queue is then in order of predicted due times

    def place(self, view: PoolView, demand: Demand) -> Placement | Wait: ...

    def prefill_for(self, view: PoolView, demand: Demand, decode_session: int) -> WorkerView | None:
        """Another prefill worker for a grant that this decode worker has given, or None."""
        ...


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


def is_behind(worker: WorkerView, demand: Demand, budget: int | None = None) -> bool:
    """More prompt tokens than `budget`, or than a step takes, wait there: late binding for local prompts. A few short
    ones may overtake.
    """
    budget = worker.hello.max_num_batched_tokens if budget is None else budget
    return worker.ahead_tokens > budget < demand.num_prompt_tokens + worker.unstarted_tokens


def has_pair(prefills: list[WorkerView], decodes: list[WorkerView], demand: Demand) -> bool:
    """Of these, some may hand the request over."""
    return any(may_hand_over(prefill, decode, demand) for prefill in prefills for decode in decodes)


def may_hand_over(prefill: WorkerView, decode: WorkerView, demand: Demand) -> bool:
    return decode.session not in demand.ungranted and (prefill.session, decode.session) not in demand.failed_pairs


def pairs_of(
    prefills: list[WorkerView], decodes: list[WorkerView], demand: Demand
) -> list[tuple[WorkerView, WorkerView]]:
    return [(prefill, decode) for prefill in prefills for decode in decodes if may_hand_over(prefill, decode, demand)]


def wait_for_room(decodes: list[WorkerView]) -> Wait:
    """Keep the worker that is nearest to having room for this request, else smaller ones could starve it."""
    return Wait(Lack.DECODE_ROOM, max(decodes, key=lambda worker: (worker.num_free_blocks, worker.worker_id)).session)
