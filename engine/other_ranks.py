"""Rank 0 tells the others of its steps: whatever it computes, they compute their part of, in its order.

    a step                    its plan
    one with a draft model    that it begins, with its copies; each small forward that drafts, when that is known; the
                              plan, with what the draft model is fed behind it

What they do with it is `Engine.follow`.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from ..common.batch import Batch
from .nn.plan import StepPlan, plan_step
from .ranks.group import RankGroup


class OtherRanks:
    """Used by the engine's thread of rank 0, which may be the only rank."""

    def __init__(self, group: RankGroup | None, block_size: int) -> None:
        self._group = group
        self._block_size = block_size

    def tell(self, batch: Batch, *, is_measured: bool, is_drafting: bool) -> StepPlan | None:
        """Return the plan that they were told. None: there are none, or a draft model is to be heard first."""
        if self._group is None:
            return None
        if is_drafting and batch.rows:
            self.send(msgspec.structs.replace(plan_step(replace(batch, rows=[]), self._block_size), is_begin=True))
            return None
        plan = plan_step(batch, self._block_size)
        self.send(msgspec.structs.replace(plan, is_measured=is_measured))
        return plan

    def tell_drafted(self, batch: Batch, behind: StepPlan | None) -> StepPlan | None:
        """Return the plan of rows whose drafts are said; None: there are no other ranks."""
        if self._group is None:
            return None
        plan = plan_step(replace(batch, block_copies=[], swap_out=[], swap_in=[]), self._block_size)
        self.send(msgspec.structs.replace(plan, behind=behind))
        return plan

    def send(self, plan: StepPlan) -> None:
        if self._group is not None:
            self._group.send_step(msgspec.msgpack.encode(plan))
