"""The way from a fleet as it is to one that is wanted: roles change first, then workers are added; removals come last.

Who changes or leaves is the emptiest; who leaves, one that is not there yet before all others.
"""

from __future__ import annotations

from collections.abc import Iterable

from .scale_types import POOLS, Bounds, Counts, Member, MemberState, Pool, ScaleDecision, ScaleForecast

_WAYS: tuple[tuple[Pool, Pool], ...] = (("prefill", "decode"), ("decode", "prefill"))  # from, to


def counts_of(members: Iterable[Member]) -> Counts:
    """Return how many of these each pool has."""
    pools = [member.pool for member in members]
    return Counts(pools.count("prefill"), pools.count("decode"))


def lend(wanted: Counts, have: Counts, lately: Counts, bounds: dict[Pool, Bounds], fleet: list[Member]) -> Counts:
    """Let a pool with more than it needed `lately`, with headroom, give to one that lacks."""
    for gives, lacks in _WAYS:
        missing = wanted.in_pool(lacks) - have.in_pool(lacks)
        least = max(lately.in_pool(gives), bounds[gives].at_least)
        spare = min(have.in_pool(gives) - least, len(_flippable(fleet, gives)))
        count = min(missing, spare)
        if count > 0:
            left = min(wanted.in_pool(gives), have.in_pool(gives) - count)
            wanted = Counts(wanted.prefill, left) if gives == "decode" else Counts(left, wanted.decode)
    return wanted


def way_to(wanted: Counts, have: Counts, fleet: list[Member], forecast: ScaleForecast, why: str) -> ScaleDecision:
    """Return the way from the fleet as it is to the wanted one."""
    flips: list[tuple[str, Pool]] = []
    removals: list[str] = []
    missing = {pool: wanted.in_pool(pool) - have.in_pool(pool) for pool in POOLS}
    for gives, takes in _WAYS:
        able = _flippable(fleet, gives)[: max(0, min(-missing[gives], missing[takes]))]
        flips += [(member.worker_id, takes) for member in able[: _num_spared(fleet, gives, wanted)]]
        missing[gives] += len(able)
        missing[takes] -= len(able)
    flipped = {worker_id for worker_id, _ in flips}
    for pool in POOLS:
        own = [m for m in fleet if m.pool == pool and m.worker_id not in flipped]
        own.sort(key=lambda m: (m.state is not MemberState.PENDING, m.load, m.worker_id))
        removals += [member.worker_id for member in own[: max(0, -missing[pool])]]
    return ScaleDecision(
        wanted.prefill,
        wanted.decode,
        why,
        tuple(flips),
        tuple(removals),
        Counts(max(0, missing["prefill"]), max(0, missing["decode"])),
        forecast,
    )


def _flippable(fleet: Iterable[Member], pool: Pool) -> list[Member]:
    """Return the workers that may change their role, the emptiest first."""
    able = [m for m in fleet if m.pool == pool and m.can_change_role and m.state is MemberState.READY]
    return sorted(able, key=lambda member: (member.load, member.worker_id))


def _num_spared(fleet: Iterable[Member], pool: Pool, wanted: Counts) -> int:
    """Return how many the pool can give and keep one that takes work: who could change waits while others start."""
    num_ready = sum(member.pool == pool and member.state is MemberState.READY for member in fleet)
    return num_ready - min(1, wanted.in_pool(pool))
