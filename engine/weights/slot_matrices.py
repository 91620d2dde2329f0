"""`SlotMatrices` stand beside a linear whose modules can be adapted: a pair of them for each module and slot.

`ExpertMatrices` do so beside a linear of an expert, where nothing is set aside before an adapter has something for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A rank's share of one module in a linear: `rows` of what the linear yields."""

    module: str
    shape: tuple[int, int]  # of the whole module: outputs, inputs
    rows: slice
    outputs: tuple[slice, ...]  # of the module, as they stand in `rows`
    first_input: int = 0

    @property
    def num_outputs(self) -> int:
        """Count this rank's outputs."""
        count: int = self.rows.stop - self.rows.start
        return count


@dataclass(frozen=True, slots=True)
class Pair:
    """One part's share of an adapter, on the host, in the model's type and the form of its `SlotMatrices`."""

    down: Tensor  # A [rank, inputs]
    up: Tensor  # B [outputs, rank], scaled


def scaled(matrix: Tensor, scale: float) -> Tensor:
    """Return a matrix times a number: in float32, if it is another than 1."""
    return matrix if scale == 1.0 else matrix.float() * scale


class AdapterWeights(dict[str, Pair]):
    """`AdapterWeights` are a rank's share of an adapter on the host, by module."""

    def __init__(self, *pairs: Mapping[str, Pair]) -> None:
        super().__init__(*pairs)
        self.experts: Sequence[ExpertMatrices] = ()  # of linears of experts that it adapts, which read these very pairs
        self.stacked: dict[str, dict[int, Pair]] = {}  # such pairs of all experts at once, by a stack's name and part


class SlotMatrices(Protocol):
    """One linear's matrices of all slots, in the form that products are made of."""

    parts: tuple[LinearPart, ...]

    def hold(self, weights: AdapterWeights, ranks: Mapping[str, int]) -> None:
        """Make room in `weights` for those of this linear's parts that have a rank."""
        ...

    def write(self, target: Tensor, matrix: Tensor, scale: float) -> None:
        """Write `scale` times a matrix of any type to its place in a pair."""
        ...

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Take what `weights` has for this linear's parts; zeros, or a rank of 0, for the others."""
        ...

    def clear(self, slot: int) -> None:
        """Hold no adapter's memory for a slot any longer."""
        ...

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add to [num_tokens, outputs] what the step's adapters make of [num_tokens, inputs]. Returns y."""
        ...


class Place(NamedTuple):
    """A `Place` says where a module's matrices go on this rank."""

    part: LinearPart
    num_inputs: int  # this rank's
    matrices: SlotMatrices


class ExpertMatrices(SlotMatrices, Protocol):
    """An expert's linear has them from the first adapter on that adapts it. A slot points to what the host holds."""

    def num_values(self, ranks: Mapping[str, int]) -> int:
        """Count the values that `hold` takes."""
        ...
