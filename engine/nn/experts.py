"""A feed-forward of many experts, of which each token takes a few.

    gate: scores, the best of them  ->  rows grouped by expert  ->  each expert's MLP  ->  the weighted sum

Some families' routed experts see rows that are made narrower before, and wide again behind the sum (`NarrowRows`).

A row's sum is taken in the order of its experts. Ranks have a part of each expert, or each its own whole experts
(`Builder.expert_plan`); either way every rank chooses for all rows, and one sum over the ranks follows, unless rows
are exchanged (`exchange.py`). An expert that several ranks hold is computed by one of them for each row. Which one, the
row's own numbers say, which all ranks have alike (`Replicas`): it depends on neither the other rows nor their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.expert_plan import Held, copies_of, shares
from ...models.parts.experts import NORMS_BESIDE_MLP, ExpertsConfig, Narrowing
from ..ranks.communicator import Communicator
from ..weights.weight import DenseWeight, Leaf, WeightSlot
from .builder import Builder
from .feed_forward import MLP, make_mlp
from .layers import ColumnParallelLinear, Linear, Part, RMSNorm
from .stacked_experts import ExpertStack, StackedExpert
from .step_groups import StepGroups

TILE = 16  # rows up to which each expert multiplies all of them: see `SparseMLP`


class Gate(Linear):
    """Chooses experts, in float32 whatever the weights are: near ties are common, and each decides about a block."""

    def __init__(self, builder: Builder, layer: str, experts: ExpertsConfig) -> None:
        shape = (experts.num_experts, builder.config.hidden_size)
        bias = torch.empty(shape[0], device=builder.device) if experts.is_stacked else None
        super().__init__(f"{layer}.{experts.gate}", DenseWeight(torch.empty(shape, device=builder.device)), bias)
        self.experts = experts
        self._vectors: dict[str, Tensor] = {}  # by their names
        self.score_bias: Tensor | None = None
        if experts.score_bias is not None:
            self.score_bias = self._vector(builder, f"{layer}.{experts.score_bias}", shape[0])
        # Of experts beside an MLP: what rows are multiplied by, and what each expert's weight is.
        self.factors: tuple[Tensor, Tensor] | None = None
        if experts.are_beside_mlp:
            of_rows = self._vector(builder, f"{layer}.router.scale", shape[1])
            self.factors = of_rows, self._vector(builder, f"{layer}.router.per_expert_scale", shape[0])

    def _vector(self, builder: Builder, name: str, size: int) -> Tensor:
        return self._vectors.setdefault(name, torch.empty(size, device=builder.device))

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's experts and their weights, both [rows, num_chosen], and the weights float32."""
        experts = self.experts
        rows = x.float() if self.factors is None else x.float() * self.factors[0] * x.shape[1] ** -0.5
        logits = self(rows)
        scores = _sigmoid(logits) if experts.scoring == "sigmoid" else logits.softmax(-1)
        ranked = scores if self.score_bias is None else scores + self.score_bias
        if experts.num_groups > 1:
            ranked = self._of_best_groups(ranked)
        chosen = ranked.topk(experts.num_chosen).indices
        weights = scores.gather(1, chosen)
        if experts.normalised:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        if self.factors is not None:
            weights = weights * self.factors[1][chosen]
        return chosen, weights * experts.scale

    def _of_best_groups(self, ranked: Tensor) -> Tensor:
        """A group is worth its best expert (DeepSeek-V2), or its best two (V3)."""
        groups = ranked.view(len(ranked), self.experts.num_groups, -1)
        worth = groups.amax(2) if self.score_bias is None else groups.topk(min(2, groups.shape[2])).values.sum(2)
        best = worth.topk(self.experts.num_chosen_groups).indices
        is_out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(is_out.unsqueeze(2), -torch.inf).flatten(1)

    def slots(self) -> Iterator[WeightSlot]:
        size = (self.weight.num_outputs, self.weight.num_inputs)
        yield from self.weight.slots(self.name, size)
        if self.bias is not None:
            yield WeightSlot(f"{self.name}.bias", size[:1], self.bias)
        for name, vector in self._vectors.items():
            yield WeightSlot(name, tuple(vector.shape), vector)


def _sigmoid(logits: Tensor) -> Tensor:
    """Return [rows, experts], of 16 rows each one's bits at any place."""
    if (width := logits.shape[1]) % 2 == 0:
        return logits.sigmoid()
    # Torch takes 32 numbers at a time, and rounds otherwise what is left over. Of an even width nothing is.
    return F.pad(logits, (0, 1)).sigmoid()[:, :width]


class SharedGate(Linear):
    """Weighs what the shared expert yields, in float32 as the other experts are."""

    def __init__(self, builder: Builder, name: str) -> None:
        super().__init__(name, DenseWeight(torch.empty(1, builder.config.hidden_size, device=builder.device)))

    def slots(self) -> Iterator[WeightSlot]:
        yield from self.weight.slots(self.name, (1, self.weight.num_inputs))


class NarrowRows:
    """Two linears around the routed experts make rows narrower and wide again, each whole on every rank."""

    def __init__(self, builder: Builder, layer: str, narrowing: Narrowing) -> None:
        builder, hidden = replace(builder, comm=Communicator()), builder.config.hidden_size
        self._dtype = builder.dtype
        size = narrowing.size
        before, behind = Part(f"{layer}.{narrowing.before}", size), Part(f"{layer}.{narrowing.behind}", hidden)
        self.before = ColumnParallelLinear(builder, before.name, hidden, [before], bias=False)
        self.behind = ColumnParallelLinear(builder, behind.name, size, [behind], bias=False)

    def behind_sum(self, total: Tensor) -> Tensor:
        """[rows, narrow] float32 -> [rows, hidden] float32. A rank's part of the sums gives its part of the results."""
        return self.behind(total.to(self._dtype)).float()


class Replicas:
    """A rank's share of the experts that several ranks hold."""

    def __init__(self, held: Held, rank: int, num_experts: int, device: torch.device) -> None:
        copies = copies_of(held)
        turns = [sum(expert in own for own in held[:rank]) for expert in range(num_experts)]
        own = set(held[rank])
        self.are_there = any(count > 1 for count in copies.values())
        self.copies = torch.tensor([copies[expert] for expert in range(num_experts)], dtype=torch.int32, device=device)
        # Of the ranks that hold an expert, which one this is; -1: none of them.
        self.turn = torch.tensor([turns[i] if i in own else -1 for i in range(num_experts)], dtype=torch.int32)
        self.turn = self.turn.to(device)

    def own(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Return the choices in one row; those that other ranks compute are the number of experts."""
        turn = turns(x, self.copies[chosen])
        return torch.where(turn == self.turn[chosen], chosen, len(self.turn)).flatten()


def turns(x: Tensor, copies: Tensor) -> Tensor:
    """Return which of the ranks that hold it computes each choice. `copies`: how many there are, of its expert."""
    # As `ExpertMath::share_out` does: how many of a row's numbers are positive is as good as random.
    return (x > 0).sum(1, keepdim=True) % copies


class SparseMLP:
    """Implements `FeedForward`.

    Up to TILE rows go through each expert that one of them chose, whole: reading it takes longer than multiplying, and
    of 16 rows a result does not depend on the other 15 (`cpu/tiled.py`), which is what exact steps are made of.
    """

    def __init__(
        self,
        builder: Builder,
        layer: str,
        experts: ExpertsConfig,
        held: Held | None = None,
        *,
        has_whole_shared: bool = False,
    ) -> None:
        """`held`: each rank's experts; None: a part of all. `has_whole_shared`: all of the shared one."""
        self.comm = builder.comm
        self.name = layer
        self.step: StepGroups | None = None  # tells which adapter a row has; None: no row has one
        self.gate = Gate(builder, layer, experts)
        self.taken = torch.zeros(experts.num_experts, dtype=torch.int64)  # by rows, so far; read by any thread
        self._shares: Tensor | None = None  # [ranks, num_experts]: see `of_ranks`
        self.replicas: Replicas | None = None  # None: no expert has any
        self.held = tuple(range(experts.num_experts))  # this rank's
        own = builder
        if held is not None:
            own = replace(builder, comm=Communicator())
            self.held = held[builder.comm.rank]
            replicas = Replicas(held, builder.comm.rank, experts.num_experts, builder.device)
            self.replicas = replicas if replicas.are_there else None
            self._shares = torch.tensor(shares(held, experts.num_experts), dtype=torch.float64)
        # What computes in place of a call: `engine/cuda/experts.py`.
        self.grouped: Callable[[Tensor], Tensor] | None = None
        self.stack: ExpertStack | None = None
        self.experts: Sequence[MLP | StackedExpert]
        if experts.is_stacked:
            name = f"{layer}.{experts.module}.experts"
            self.stack = ExpertStack(own, name, experts, self.held, are_whole=held is not None)
            self.experts = self.stack.experts
        else:
            size, row_size = experts.intermediate_size, None if experts.narrowing is None else experts.narrowing.size
            self.experts = [
                make_mlp(own, f"{layer}.{experts.expert(index)}", size, experts.parts, row_size=row_size)
                for index in self.held
            ]
        self.row_norm: RMSNorm | None = None
        if experts.are_beside_mlp:
            self.row_norm = RMSNorm(builder, f"{layer}.{NORMS_BESIDE_MLP[0]}", builder.config.hidden_size)
        self.narrowing = None if experts.narrowing is None else NarrowRows(builder, layer, experts.narrowing)
        for expert in self.experts:
            expert.gate_up_proj.takes_some_rows = expert.down_proj.takes_some_rows = True
        self._by_number = dict(zip(self.held, self.experts, strict=True))
        self.shared: MLP | None = None
        if experts.shared_size:
            shared_by = own if has_whole_shared else builder
            name = f"{layer}.{experts.shared}"
            self.shared = make_mlp(
                shared_by, name, experts.shared_size, experts.shared_parts, fused=experts.shared_fused
            )
        gate = experts.shared_gate
        self.shared_gate = None if gate is None else SharedGate(builder, f"{layer}.{gate}")

    def __call__(self, x: Tensor) -> Tensor:
        if self.grouped is not None:
            return self.grouped(x)
        chosen, weights = self.gate.choose(x)
        own = chosen.flatten()
        counts = self._counts(own)
        self.taken += counts
        if self.replicas is not None:
            own = self.replicas.own(x, chosen)
            counts = self._counts(own)
        seen, weights = self.seen(x, weights)
        total = self.widened(self._part(seen, own, counts, weights))
        if self.shared is not None:
            total += self.of_shared(self.shared, x)
        return self.comm.all_reduce(total.to(x.dtype))

    def seen(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows as the routed experts see them, and the weights of what these yield."""
        if self.gate.experts.scales_inputs:  # one expert a row
            return (x * weights).to(x.dtype), torch.ones_like(weights)
        if self.row_norm is not None:  # rows are normed already
            return x * self.row_norm.weight, weights
        return (x if self.narrowing is None else self.narrowing.before(x)), weights

    def widened(self, total: Tensor) -> Tensor:
        """Return rows' sums over some of their experts, float32, as the residual stream has them."""
        return total if self.narrowing is None else self.narrowing.behind_sum(total)

    def of_shared(self, shared: MLP, x: Tensor) -> Tensor:
        """Return this rank's part of what every token takes."""
        return self.gated(shared.partial(x), x)

    def gated(self, y: Tensor, x: Tensor) -> Tensor:
        """Weigh what the shared expert yields for rows of x, where it has a gate."""
        return y if self.shared_gate is None else y * self.shared_gate(x.float()).sigmoid()

    def _counts(self, chosen: Tensor) -> Tensor:
        """Count each expert's choices, on the host."""
        return torch.bincount(chosen, minlength=len(self.taken)).cpu()

    def _part(self, x: Tensor, own: Tensor, counts: Tensor, weights: Tensor) -> Tensor:
        """Return this rank's part of each row's sum, in float32. `own`: rows' choices in a line; `counts`: of them."""
        total = torch.zeros_like(x, dtype=torch.float32)
        slots = None if self.step is None else self.step.slots(len(x))
        by_expert = own.argsort(stable=True)
        for index, places in enumerate(torch.split(by_expert, counts.tolist())):
            expert = self._by_number.get(index)
            if expert is not None and len(places):
                rows = places // weights.shape[1]
                y = expert.partial(x)[rows] if len(x) <= TILE else self._of_rows(expert, x, rows, slots)
                total.index_add_(0, rows, y.float() * weights.flatten()[places].unsqueeze(1))
        return total

    def _of_rows(self, expert: MLP | StackedExpert, x: Tensor, rows: Tensor | slice, slots: Tensor | None) -> Tensor:
        """Return what an expert makes of some rows of x. `slots`: of the adapters of all of x; None: no row has one."""
        is_adapted = expert.gate_up_proj.adapters is not None or expert.down_proj.adapters is not None
        if self.step is None or slots is None or not is_adapted:
            return expert.partial(x[rows])
        with self.step.given(slots[rows]):
            return expert.partial(x[rows])

    def of_ranks(self, taken: Tensor) -> list[int]:
        """Return how much of `taken` each rank computed; none where each has a part of every expert."""
        return [] if self._shares is None else (self._shares @ taken.double()).long().tolist()

    def adapted_linears(self) -> Iterator[Linear]:
        """Yield those of this rank's linears that are given some of a step's rows."""
        blocks = self.experts if self.shared is None else [*self.experts, self.shared]
        linears = (linear for block in blocks for linear in (block.gate_up_proj, block.down_proj))
        yield from (linear for linear in linears if linear.takes_some_rows)

    def adapted_modules(self) -> Iterator[str]:
        """Yield the names of these linears' modules in the checkpoint, on all ranks."""
        experts = self.gate.experts
        yield from (part.module for linear in self.adapted_linears() for part in linear.parts_of_rank())
        for index in range(0 if experts.is_stacked else experts.num_experts):
            yield from (f"{self.name}.{experts.expert(index)}.{part}" for part in experts.parts)

    def leaves(self) -> Iterator[Leaf]:
        yield self.gate
        if self.narrowing is not None:
            yield from (self.narrowing.before, self.narrowing.behind)
        yield from filter(None, (self.row_norm, self.stack))
        for expert in self.experts:
            yield from expert.leaves()
        if self.shared is not None:
            yield from self.shared.leaves()
        if self.shared_gate is not None:
            yield self.shared_gate
