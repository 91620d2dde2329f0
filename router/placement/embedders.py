"""A prompt that is embedded needs one worker, to its end: what every policy chooses from.

prefill workers       where there is a pool of them
decode workers        without such a pool, and where none of it is there, if they may stand in
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..state.demand import Demand, Lack, Reason, Wait
from ..state.views import PoolView, WorkerView
from .policy import fits_prefill, fitting_workers, has_decode_room, has_prefill_room, roomy_workers


class Embedders(NamedTuple):
    """Workers that have room for the prompt, at least one, and why it goes to them."""

    workers: list[WorkerView]
    reason: Reason


def embedders(
    view: PoolView,
    demand: Demand,
    max_wait_s: float,
    expects_prefill: bool,
    *,
    stands_in: bool,
    near: Callable[[str], list[WorkerView]] | None = None,
) -> Embedders | Wait:
    """Return the workers to choose from, or what the prompt waits for.

    `stands_in`: decode workers may do the work of prefill workers. `near`: the ready workers of a role that are looked
    at first; None: all of them.
    """

    def fitting_of(role: str) -> list[WorkerView]:
        return fitting_workers(view, role, near(role) if near is not None else (), fits_prefill, demand)

    fitting = fitting_of("prefill") if expects_prefill else []
    reason = Reason.EMBEDDING
    if not fitting and (stands_in or not expects_prefill):
        fitting = fitting_of("decode")
        reason = Reason.NO_PREFILL_WORKER if expects_prefill else Reason.COLOCATED
    if not fitting:
        has_prefills = expects_prefill and view.num_ready("prefill") > 0
        return Wait(_lack(view, has_prefills=has_prefills, expects_prefill=expects_prefill, stands_in=stands_in))

    def has_room_among_answers(worker: WorkerView, demand: Demand) -> bool:
        return has_decode_room(worker, demand) and has_prefill_room(worker, demand, max_wait_s)

    if fitting[0].role == "decode":
        roomy = roomy_workers(view, fitting, demand, fits_prefill, has_room_among_answers)
    else:
        roomy = [worker for worker in fitting if has_prefill_room(worker, demand, max_wait_s)]
    return Embedders(roomy, reason) if roomy else Wait(Lack.PREFILL_ROOM)


def _lack(view: PoolView, *, has_prefills: bool, expects_prefill: bool, stands_in: bool) -> Lack:
    if has_prefills or ((stands_in or not expects_prefill) and view.num_ready("decode")):
        return Lack.FIT
    return Lack.PREFILL_WORKER if expects_prefill else Lack.DECODE_WORKER
