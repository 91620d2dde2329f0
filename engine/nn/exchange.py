"""Experts on several ranks, to whom each token is sent: an exchange in place of a sum over all tokens.

    rank r: its share of the rows    ->  each row, once, to every rank that computes one of its experts
            what has come            ->  each row's sum over this rank's experts, back in float32
            what comes back          ->  added up, rank after rank, and the shared expert, whole on each rank
            its rows, done           ->  joined with those of the others: every rank has all rows again

A rank sends in a step of T rows of h numbers of b bytes, with n ranks, k experts chosen for each row, and m ranks
besides its home that hold some of these:

    sum         T h 2 b (n - 1) / n                              a ring, to and fro
    exchange    T (m (h b + 8 k + 4 h) + (n - 1) h b) / n        rows and choices, sums back, and the join

A row with an adapter takes its slot along, 4 bytes. With m = (n - 1) (1 - (1 - 1 / n)^k), of many experts that are
chosen evenly, the exchange is less for n above 2.5 k or so in bfloat16, 1.5 k in float32: for two chosen ones from 6
ranks on (float32: 4), for eight from 21 (13). It is four collectives against one, so on few ranks the sum is quicker.
`sizing/work.py` counts both.

Every rank chooses for all rows, as with a sum: the gate is small beside the experts, and a product of fewer rows may
round otherwise, so that equal scores come in another order. Each heeds the choices of its own rows alone and tells how
many rows it sends, so that ranks whose bits differ still agree. Up to TILE rows of a step are padded to their number
wherever experts multiply them: a row's result depends on neither the others nor its home, and exact steps, which are
of TILE rows, stay exact. How many rows come must be known to the host: no such layer is captured in a CUDA graph. Not
run on a card: shown on an emulated device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.parts.expert_plan import Held, copies_of
from ...models.parts.experts import ExpertsConfig
from .builder import Builder
from .experts import TILE, SparseMLP, turns


class ExchangedMLP(SparseMLP):
    """Implements `FeedForward`; every rank is given all rows, and yields all."""

    def __init__(self, builder: Builder, layer: str, experts: ExpertsConfig, held: Held) -> None:
        super().__init__(builder, layer, experts, held, has_whole_shared=True)
        if self.shared is not None:  # it is given some of a step's rows, as experts are
            self.shared.gate_up_proj.takes_some_rows = self.shared.down_proj.takes_some_rows = True
        self._holders = Holders(held, experts.num_experts, builder.device)
        self._ranks = torch.arange(self.comm.size, device=builder.device).view(-1, 1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        share = -(-len(x) // self.comm.size)  # of each rank; the last ones have less, or nothing
        first = min(len(x), share * self.comm.rank)
        mine = slice(first, min(len(x), first + share))
        total = self.widened(self._routed(x, mine))
        if self.shared is not None and len(total):
            slots = None if self.step is None else self.step.slots(len(x))
            is_few = len(x) <= TILE
            y = self.shared.partial(x)[mine] if is_few else self._of_rows(self.shared, x, mine, slots)
            total += self.gated(y, x[mine])
        own = F.pad(total.to(x.dtype), (0, 0, 0, share - len(total)))
        return self.comm.all_gather_rows(own)[: len(x)]

    def _routed(self, x: Tensor, mine: slice) -> Tensor:
        """Return the sums of this rank's rows over their experts, wherever these are: [rows, hidden], float32."""
        chosen, weights = self.gate.choose(x)
        self.taken += self._counts(chosen.flatten())
        x, weights = self.seen(x, weights)
        rows, chosen, weights = x[mine], chosen[mine], weights[mine]
        is_there = self._holders.of(rows, chosen) == self._ranks  # [ranks, rows, num_chosen]
        to, row = is_there.any(2).nonzero().unbind(1)  # rank after rank, row after row
        sent, received = self._tell(torch.bincount(to, minlength=self.comm.size))
        asked = torch.where(is_there[to, row], chosen[row], len(self.taken))
        slots = None if self.step is None else self.step.slots(len(x))
        of_sent = None if slots is None else slots[mine][row]
        there = self.comm.all_to_all(_packed(rows[row], asked, weights[row], of_sent), sent, received)
        arrived = _unpacked(there, x, chosen.shape[1], has_slots=slots is not None)
        computed = self._computed(*arrived, at_least=len(x))
        back = self.comm.all_to_all(computed, received, sent)
        total = torch.zeros_like(rows, dtype=torch.float32)
        for places, part in zip(torch.split(row, sent), torch.split(back, sent), strict=True):  # in the order of ranks
            total.index_add_(0, places, part)
        return total

    def _tell(self, going: Tensor) -> tuple[list[int], list[int]]:
        """Return how many rows this rank sends to each and receives from each."""
        told = self.comm.all_gather_rows(going.unsqueeze(0)).cpu()
        return told[self.comm.rank].tolist(), told[:, self.comm.rank].tolist()

    def _computed(self, x: Tensor, asked: Tensor, weights: Tensor, slots: Tensor | None, *, at_least: int) -> Tensor:
        """Return this rank's part of what was asked of it. `at_least`: rows of the step."""
        count, num_none = len(x), len(self.taken)
        if at_least <= TILE:
            more = (0, 0, 0, at_least - count)
            x, asked, weights = F.pad(x, more), F.pad(asked, more, value=num_none), F.pad(weights, more)
        own = asked.flatten()
        if self.step is None or slots is None:
            return self._part(x, own, self._counts(own), weights)[:count]
        with self.step.given(slots):
            return self._part(x, own, self._counts(own), weights)[:count]


class Holders:
    """`Holders` say which rank computes a choice: the one that `Replicas` on that rank takes it for its own."""

    def __init__(self, held: Held, num_experts: int, device: torch.device) -> None:
        copies, sets = copies_of(held), [set(own) for own in held]
        ranks = [[rank for rank, own in enumerate(sets) if expert in own] for expert in range(num_experts)]
        most = max(copies.values())
        self._ranks = torch.tensor([own + own[:1] * (most - len(own)) for own in ranks], device=device)
        self._copies = torch.tensor([len(own) for own in ranks], dtype=torch.int32, device=device)

    def of(self, x: Tensor, chosen: Tensor) -> Tensor:
        """[rows, hidden], and each row's experts [rows, num_chosen] -> ranks [rows, num_chosen]."""
        return self._ranks[chosen, turns(x, self._copies[chosen])]


def _packed(x: Tensor, asked: Tensor, weights: Tensor, slots: Tensor | None) -> Tensor:
    """Return rows, what is asked of each and its adapter's slot as bytes, [rows, bytes]: they go together."""
    parts = [x, asked.int(), weights.float(), *([] if slots is None else [slots.int().unsqueeze(1)])]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def _unpacked(
    rows: Tensor, like: Tensor, num_chosen: int, *, has_slots: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return what `_packed` was given. `like`: has the type and width of x."""
    sizes = [like.shape[1] * like.element_size(), 4 * num_chosen, 4 * num_chosen, 4 * has_slots]
    x, asked, weights, slots = (part.contiguous() for part in torch.split(rows, sizes, 1))
    of_rows = slots.view(torch.int32).flatten() if has_slots else None
    return x.view(like.dtype), asked.view(torch.int32).long(), weights.view(torch.float32), of_rows
