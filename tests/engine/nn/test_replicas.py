"""An expert's replicas share its rows: each is computed once, and none feels its neighbours."""

from __future__ import annotations

import torch

from kvferry.engine.nn.experts import Replicas
from kvferry.models.parts.expert_plan import Held

HELD: Held = ((0, 1, 2), (1, 2, 3), (2, 1, 4))


def test_each_choice_is_computed_by_one_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator)
    chosen = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(600)])
    replicas = [Replicas(HELD, rank, 5, torch.device("cpu")) for rank in range(3)]
    own = torch.stack([each.own(x, chosen) for each in replicas])
    assert torch.equal((own < 5).sum(0), torch.ones(1200, dtype=torch.int64))
    assert torch.equal(own.amin(0), chosen.flatten())
    hot = [int((row == 2).sum()) for row in own]  # of three ranks
    assert min(hot) > 0.8 * sum(hot) / 3
    order = torch.randperm(600, generator=generator)
    for each, row in zip(replicas, own, strict=True):
        assert torch.equal(each.own(x[order], chosen[order]), row.view(600, 2)[order].flatten())


def test_without_replicas_there_is_nothing_to_share() -> None:
    assert not Replicas(((0, 2), (1, 3)), 0, 4, torch.device("cpu")).are_there
