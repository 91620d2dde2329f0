"""Adapters beside a rank's linears: memory for a number of them, and what each adds to its rows of a step.

    y[rows] += (x[rows] A^T) B^T      A [rank, inputs], B [outputs, rank] with the adapter's scale in it

Slots are allocated once, at the largest rank, so that loading is a copy. A linear that is fused of several modules has
a pair of matrices for each of them. Of a module that ranks share, A is cut like the inputs and B like the outputs: what
a rank adds belongs into the sum over the ranks that there is anyway. Rows without an adapter are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...common.adapter import NO_ADAPTER
from ...common.errors import ConfigError
from ...models.adapter import AdaptedModule, check_pair

if TYPE_CHECKING:
    from .layers import Linear

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RANK_STEP = 16  # ranks are computed in whole ones of it, with zeros behind: products of few different shapes


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A rank's share of one module in a linear: `rows` of what the linear yields."""

    module: str
    shape: tuple[int, int]  # of the whole module: outputs, inputs
    rows: slice
    first_output: int
    first_input: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One part's share of an adapter, on the host, in the model's type."""

    down: Tensor  # A [rank, inputs]
    up: Tensor  # B [outputs, rank], scaled

    @property
    def num_bytes(self) -> int:
        return self.down.nbytes + self.up.nbytes


AdapterWeights = Mapping[str, Pair]  # by module


@dataclass(frozen=True, slots=True)
class Group:
    """Tokens of one adapter among those of a product."""

    slot: int
    tokens: slice | Tensor  # packed tokens, int64


class SlotMatrices(Protocol):
    """One linear's matrices of all slots, in the form that products are made of."""

    parts: tuple[LinearPart, ...]

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Copy in what `weights` has for this linear's parts; zeros, or a rank of 0, for the others."""
        ...

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """Add to [num_tokens, outputs] what the step's adapters make of [num_tokens, inputs]. Returns y."""
        ...

    @property
    def num_bytes(self) -> int: ...


class LinearAdapters:
    """Implements `SlotMatrices` in torch."""

    def __init__(self, linear: Linear, step: StepGroups, *, num_slots: int, max_rank: int, device: torch.device):
        self.parts = tuple(linear.parts_of_rank())
        self._step = step
        dtype, num_inputs = linear.weight.dtype, linear.weight.num_inputs
        sizes = [part.rows.stop - part.rows.start for part in self.parts]
        self.down = [torch.zeros(num_slots, max_rank, num_inputs, dtype=dtype, device=device) for _ in sizes]
        self.up = [torch.zeros(num_slots, size, max_rank, dtype=dtype, device=device) for size in sizes]
        self.ranks = [[0] * num_slots for _ in sizes]  # 0: this part is not adapted

    def put(self, slot: int, weights: AdapterWeights) -> None:
        for index, part in enumerate(self.parts):
            pair = weights.get(part.module)
            if pair is None:
                self.ranks[index][slot] = 0
                continue
            rank = len(pair.down)
            padded = min(-(-rank // _RANK_STEP) * _RANK_STEP, self.down[index].shape[1])
            down, up = self.down[index][slot], self.up[index][slot]
            down[:rank].copy_(pair.down)
            down[rank:padded] = 0
            up[:, :rank].copy_(pair.up)
            up[:, rank:padded] = 0
            self.ranks[index][slot] = padded

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        for group in self._step.current:
            rows = x if self._step.whole else x[group.tokens]
            for part, downs, ups, ranks in zip(self.parts, self.down, self.up, self.ranks, strict=True):
                rank = ranks[group.slot]
                if rank == 0:
                    continue
                added = (rows @ downs[group.slot, :rank].T) @ ups[group.slot, :, :rank].T
                target = y[:, part.rows]
                if self._step.whole:
                    added = added[group.tokens]
                if isinstance(group.tokens, slice):
                    target[group.tokens] += added
                else:
                    target.index_add_(0, group.tokens, added)
        return y

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.down, *self.up))


class StepGroups:
    """The adapters of the tokens that are being computed, all of a step's or a tile of them."""

    def __init__(self) -> None:
        self.current: Sequence[Group] = ()
        self.whole = False  # products are made of all rows, of as many at a time whoever they are, and taken from those
        self._tiles: list[list[Group]] = []

    def begin(self, slots: Tensor | None, *, tile: int | None = None) -> None:
        """Take a step's slots, [num_tokens]; None: no row has an adapter. With `tile`, `turn_to` follows."""
        self.whole = tile is not None
        self.current, self._tiles = (), []
        if slots is not None and tile is None:
            self.current = _groups(slots)
        elif slots is not None and tile is not None:
            self._tiles = [_groups(part) for part in torch.split(slots, tile)]

    def turn_to(self, tile: int) -> None:
        """Let the next products be those of a tile's tokens."""
        self.current = self._tiles[tile] if self._tiles else ()


def _groups(slots: Tensor) -> list[Group]:
    """Group the tokens of each slot; neighbours are a slice, which costs no copy. `slots`: [num_tokens]."""
    groups = []
    for slot in sorted(set(slots.tolist()) - {NO_ADAPTER}):
        tokens = (slots == slot).nonzero().flatten()
        first, last = int(tokens[0]), int(tokens[-1]) + 1
        groups.append(Group(slot, slice(first, last) if last - first == len(tokens) else tokens))
    return groups


class AdaptedModel(Protocol):
    """A model that has linears."""

    def linears(self) -> Iterator[Linear]: ...


class AdapterSlots:
    """All slots of a rank. Who fills one sees to it that no step uses it meanwhile."""

    def __init__(
        self,
        model: AdaptedModel,
        *,
        num_slots: int,
        max_rank: int,
        device: torch.device,
        make: Callable[..., SlotMatrices] | None = None,
    ) -> None:
        """`make`: another form of a linear's matrices than torch's. Raises ConfigError where memory is too small."""
        self.num_slots, self.max_rank = num_slots, max_rank
        self.step = StepGroups()
        self.linears: list[SlotMatrices] = []
        self._make = make or partial(LinearAdapters, step=self.step)
        self._parts: dict[str, tuple[LinearPart, int, torch.dtype]] = {}  # by module; with a rank's inputs
        try:
            for linear in model.linears():
                if not linear.takes_some_rows and any(True for _ in linear.parts_of_rank()):
                    self._adapt(linear, device)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(f"{num_slots} adapters of rank {max_rank} do not fit: {error}") from error

    def _adapt(self, linear: Linear, device: torch.device) -> None:
        linear.adapters = self._make(linear, num_slots=self.num_slots, max_rank=self.max_rank, device=device)
        self.linears.append(linear.adapters)
        weight = linear.weight
        self._parts |= {part.module: (part, weight.num_inputs, weight.dtype) for part in linear.adapters.parts}

    @property
    def num_bytes(self) -> int:
        return sum(linear.num_bytes for linear in self.linears)

    def cut(self, modules: Sequence[AdaptedModule], data: bytearray) -> AdapterWeights:
        """Take this rank's share of an adapter from its file, in the model's type. Raises ConfigError."""
        return {module.name: self._pair(module, data) for module in modules}

    def _pair(self, module: AdaptedModule, data: bytearray) -> Pair:
        if (found := self._parts.get(module.name)) is None:
            raise ConfigError(f"it adapts {module.name}, to which no adapter is applied")
        part, num_inputs, dtype = found
        check_pair(module, part.shape)
        if module.rank > self.max_rank:
            raise ConfigError(f"its rank is {module.rank}; --max-lora-rank is {self.max_rank}")
        down = _tensor(data, module.down.dtype, module.down.shape, module.down.begin)
        up = _tensor(data, module.up.dtype, module.up.shape, module.up.begin)
        outputs = part.rows.stop - part.rows.start
        down = down[:, part.first_input : part.first_input + num_inputs]
        up = up[part.first_output : part.first_output + outputs]
        scaled = (up.float() * module.scale).to(dtype)
        return Pair(down.to(dtype, copy=True, memory_format=torch.contiguous_format), scaled)

    def put(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a slot that no step uses."""
        for linear in self.linears:
            linear.put(slot, weights)


def _tensor(data: bytearray, dtype: str, shape: tuple[int, int], begin: int) -> Tensor:
    kind = _DTYPES[dtype]
    if begin % kind.itemsize:  # nothing says that tensors in a file are aligned
        size = shape[0] * shape[1] * kind.itemsize
        data, begin = bytearray(memoryview(data)[begin : begin + size]), 0
    return torch.frombuffer(data, dtype=kind, count=shape[0] * shape[1], offset=begin).view(shape)
