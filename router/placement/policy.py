"""A policy says where a request runs: a function of a `PoolView` and of what the request needs.

No I/O and no clock: the dispatcher asks again at every event and does what the answer says. What every policy has to
respect is here: who can hold a request at all, who has room for it now, and how little is bound ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from ...common.kv_spec import growth_blocks
from ..state.demand import Demand, Lack, Placement, Wait
from ..state.views import PoolView, WorkerView

# A grant lapses if it is not opened within 2 s, so a task is not bound behind more work than this: nearer to 2 s grants
# lapse where a worker is slower than predicted, and with less, workers run out of work between two decisions.
MAX_BIND_WAIT_S = 1.5
_MAX_FAR = 6  # decode workers looked at where none nearby has room; more cost a placement time
BOUND_SHARE_OF_OBJECTIVE = 0.25  # of the TTFT objective, for waiting on a worker; larger binds requests earlier


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


def fitting_workers(
    view: PoolView, role: str, near: Sequence[WorkerView], fits: Callable[[WorkerView, Demand], bool], demand: Demand
) -> list[WorkerView]:
    """Return the workers that could hold the request: of those nearby, or of all ready ones where none of them can."""
    nearest = [worker for worker in near if fits(worker, demand)]
    return nearest or [worker for worker in view.ready(role) if fits(worker, demand)]


def has_decode_room(worker: WorkerView, demand: Demand) -> bool:
    """A row for each choice, and the blocks for now beside those that the choices which run need to grow."""
    if worker.session in demand.busy:
        return False
    if worker.num_running == 0:
        return True  # nothing of ours is there to wait for: let the worker decide
    if demand.queue_if_full and (worker.num_bound == 0 or worker.num_others):
        return True  # another router may fill it for ever, unless the worker keeps blocks for this request
    if worker.num_running + demand.num_choices > worker.hello.max_num_seqs:
        return False
    spec = worker.hello.spec
    return demand.blocks_now(spec) + growth_blocks(worker.num_running, spec.block_size) <= worker.num_free_blocks


def roomy_workers(
    view: PoolView,
    fitting: Sequence[WorkerView],
    demand: Demand,
    fits: Callable[[WorkerView, Demand], bool] = fits_decode,
    has_room: Callable[[WorkerView, Demand], bool] = has_decode_room,
) -> list[WorkerView]:
    """Return the decode workers with room: of `fitting`, or of all ready ones where none of them has any.

    `fits`, `has_room`: as it counts for this request, at least what `has_decode_room` does.

    Those with the fewest rows may each hold a long context. Of the others the first few that have room are enough, and
    where nobody has so many blocks free nobody is asked: a placement costs as much among a thousand.
    """
    roomy = [worker for worker in fitting if has_room(worker, demand)]
    if roomy or not fitting or demand.blocks_now(fitting[0].hello.spec) > view.most_room:
        return roomy
    found = (one for one in view.ready("decode") if has_room(one, demand) and fits(one, demand))
    return list(islice(found, _MAX_FAR))


def has_prefill_room(worker: WorkerView, demand: Demand, max_wait_s: float) -> bool:
    """About one step of work ahead at most, and that soon done. A short prompt may overtake a long one."""
    if worker.session in demand.busy:
        return False
    if worker.num_bound == 0 and worker.ahead_tokens == 0:
        return True
    budget = worker.hello.max_num_batched_tokens
    if worker.ahead_tokens <= budget or (demand.queue_if_full and worker.num_bound == 0):
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
    """Return whether some prefill worker may hand the request over to some decode worker."""
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
