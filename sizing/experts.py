"""A plan of replicas is made from how often each expert was chosen.

    the expert with most choices for each copy gets one copy more, so many times   ->   copies
    copies go where there is most room, then to the rank with the fewest choices    ->   ranks

Every rank holds equally many experts. The two steps are those of DeepSeek's load balancer for experts (EPLB), of one
level: the ranks of a worker are on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..common.errors import ConfigError
from ..common.imbalance import imbalance
from ..models.parts.expert_plan import ExpertPlan, Held, shares


def plan_experts(taken: Mapping[int, Sequence[int]], num_ranks: int, num_replicas: int) -> ExpertPlan:
    """Make a plan with `num_replicas` copies more in each layer. `taken`: by layer, how often experts were chosen.

    Raises ConfigError where ranks cannot hold equally many, or not so many.
    """
    num_experts = len(next(iter(taken.values())))
    most = num_experts * (num_ranks - 1)
    if num_replicas > most:
        raise ConfigError(f"replicas: {num_replicas} are more than {most}: with these each rank has all experts")
    if over := (num_experts + num_replicas) % num_ranks:
        raise ConfigError(
            f"replicas: {num_experts} experts and {num_replicas} replicas do not share out over {num_ranks} ranks; "
            f"use {num_replicas - over if num_replicas >= over else num_replicas + num_ranks - over}"
        )
    layers = {layer: _held(counts, num_ranks, num_replicas) for layer, counts in taken.items()}
    return ExpertPlan(num_experts, num_ranks, layers)


def planned_imbalance(taken: Mapping[int, Sequence[int]], plan: ExpertPlan) -> float:
    """Return the choices of each layer's busiest rank over those of a mean one, had the plan been in force."""
    return imbalance([_loads(counts, plan.held(layer)) for layer, counts in taken.items()])


def _loads(counts: Sequence[int], held: Held) -> list[float]:
    return [sum(share * count for share, count in zip(row, counts, strict=True)) for row in shares(held, len(counts))]


def _held(counts: Sequence[int], num_ranks: int, num_replicas: int) -> Held:
    copies = [1] * len(counts)
    for _ in range(num_replicas):
        open_ = [expert for expert, count in enumerate(copies) if count < num_ranks]
        copies[max(open_, key=lambda expert: (counts[expert] / copies[expert], -copies[expert], -expert))] += 1
    room = [(len(counts) + num_replicas) // num_ranks] * num_ranks
    loads = [0.0] * num_ranks
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    # Those with several copies first, where there is most room: so there are always as many ranks with room as copies.
    for expert in sorted(range(len(counts)), key=lambda expert: (-copies[expert], -counts[expert], expert)):
        has_copies = copies[expert] > 1
        ranks = sorted(
            (rank for rank in range(num_ranks) if room[rank]),
            key=lambda rank: (-room[rank] if has_copies else 0, loads[rank], rank),
        )
        for rank in ranks[: copies[expert]]:
            held[rank].append(expert)
            room[rank] -= 1
            loads[rank] += counts[expert] / copies[expert]
    return tuple(tuple(sorted(own)) for own in held)
