"""Planted bugs of embeddings: vectors that miss a part of their prompt, blocks that stay when the vector has left."""

from __future__ import annotations

from kvferry.common.request import Pooling
from kvferry.prefill import results
from kvferry.prefill.results import StepResults
from kvferry.prefill.task import Task, embedding_message

from .planting import Planted


def _keep_blocks(self: StepResults, task: Task) -> None:
    """The prompt's blocks are given to nobody."""
    del self._tasks._live[task.spec.request_id]
    self._to_router(task.router_id, embedding_message(task, self._clock.now()))


BUGS = (
    Planted(
        "a mean without its cached tokens",
        frozenset({"I22"}),
        patches=((Pooling, "allows_reuse", property(lambda pooling: True)),),
    ),
    Planted(
        "a mean of the last chunk",
        frozenset({"I22"}),
        patches=((results, "add", lambda total, part: part or total),),
    ),
    Planted(
        "blocks of a prompt that is embedded are not given back",
        frozenset({"I2", "I15"}),
        patches=((StepResults, "_finish_embedding", _keep_blocks),),
    ),
)
