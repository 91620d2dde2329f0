"""A worker's ranks hold whole experts: as an even split gives them, or as a plan of the operator's does.

An expert that several ranks hold is *replicated*: each of them computes it for a share of the tokens. A plan's file:

    {"ranks": 2, "experts": 4, "layers": {"0": [[0, 1, 3], [1, 2, 3]]}}     each rank's experts, in these layers
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import ConfigError

Held = tuple[tuple[int, ...], ...]  # of one layer: each rank's experts, in order
_MAX_BYTES = 64 << 20  # of a file: far more than any model's plan takes


@dataclass(slots=True, frozen=True)
class ExpertPlan:
    """An `ExpertPlan` says which experts each rank holds, layers that it does not name being split evenly, and how rows
    come to them: every rank has all, or they are exchanged.
    """

    num_experts: int
    num_ranks: int
    layers: Mapping[int, Held] = field(default_factory=dict)
    is_exchanged: bool = False  # rows are sent to their experts' ranks; of no file

    def held(self, layer: int) -> Held:
        return self.layers.get(layer) or even_split(self.num_experts, self.num_ranks)

    @property
    def name(self) -> str:
        """Name how sums over the ranks are split: equal names, equal sums."""
        split = f"ep {hashlib.sha256(self.text().encode()).hexdigest()[:16]}" if self.layers else "ep"
        return f"{split} exchanged" if self.is_exchanged else split

    def fullest(self, sparse_layers: Sequence[bool]) -> dict[int, tuple[int, ...]]:
        """Return by sparse layer what the rank holds that holds most."""
        held = {layer: self.held(layer) for layer, is_sparse in enumerate(sparse_layers) if is_sparse}
        rank = max(range(self.num_ranks), key=lambda rank: sum(len(each[rank]) for each in held.values()))
        return {layer: each[rank] for layer, each in held.items()}

    def text(self) -> str:
        """Return the file of this plan."""
        head = f'{{"ranks": {self.num_ranks}, "experts": {self.num_experts}, "layers": {{\n'
        lines = [f'  "{layer}": {json.dumps(held)}' for layer, held in sorted(self.layers.items())]
        return head + ",\n".join(lines) + "\n}}\n"


def even_split(num_experts: int, num_ranks: int) -> Held:
    """Give each rank as many neighbours."""
    count = num_experts // num_ranks
    return tuple(tuple(range(rank * count, (rank + 1) * count)) for rank in range(num_ranks))


def copies_of(held: Held) -> Counter[int]:
    """Count the ranks that hold each expert."""
    return Counter(expert for own in held for expert in own)


def shares(held: Held, num_experts: int) -> list[list[float]]:
    """Return for each rank and expert which share of the expert's tokens the rank computes."""
    copies = copies_of(held)
    return [[1 / copies[expert] if expert in own else 0.0 for expert in range(num_experts)] for own in map(set, held)]


def read_plan(path: Path, *, num_ranks: int, num_experts: int, sparse_layers: Collection[int]) -> ExpertPlan:
    """Read and check a plan for a worker of so many ranks. Raises ConfigError, saying what is wrong where."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"expert_plan: {path} is larger than {_MAX_BYTES >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"expert_plan: {path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.keys() != {"ranks", "experts", "layers"}:
        raise ConfigError(f"expert_plan: {path} is no plan: it needs ranks, experts and layers, and nothing else")
    for key, count, what in (
        ("ranks", num_ranks, "tensor_parallel_size is"),
        ("experts", num_experts, "the model's layers have"),
    ):
        if found[key] != count:
            raise ConfigError(f"expert_plan: {path} is for {found[key]} {key}, {what} {count}")
    if not isinstance(found["layers"], dict):
        raise ConfigError(f"expert_plan: {path}: layers: not by number")
    known = {str(layer): layer for layer in sparse_layers}
    layers = {}
    for name, held in found["layers"].items():
        if name not in known:
            raise ConfigError(f"expert_plan: {path}: layer {name[:32]}: the model has no experts there")
        if why := _wrong(held, num_ranks, num_experts):
            raise ConfigError(f"expert_plan: {path}: layer {name}: {why}")
        layers[known[name]] = tuple(tuple(sorted(own)) for own in held)
    return ExpertPlan(num_experts, num_ranks, layers)


def _wrong(held: object, num_ranks: int, num_experts: int) -> str:
    """Return what is wrong with a layer's lists; empty: nothing."""
    if not isinstance(held, list) or len(held) != num_ranks or not all(isinstance(own, list) for own in held):
        return f"it needs a list of experts for each of {num_ranks} ranks"
    for rank, own in enumerate(held):
        if not own:
            return f"rank {rank} holds none"
        seen: set[int] = set()
        for expert in own:
            if type(expert) is not int or not 0 <= expert < num_experts:
                return f"rank {rank}: {str(expert)[:32]} is no expert from 0 to {num_experts - 1}"
            if expert in seen:
                return f"rank {rank}: expert {expert} stands there twice"
            seen.add(expert)
    missing = sorted(set(range(num_experts)) - {expert for own in held for expert in own})
    return f"no rank holds expert {missing[0]}" if missing else ""
