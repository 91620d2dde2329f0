"""A step that nobody wants any more ends early, and counts as what it was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvferry.simulator.world import World
from kvferry.sizing.steps import Linear
from kvferry.wire.tasks import Abort

from .runs import one_request

STEPS = Linear(step=0.5, mixed=0.0, per_token=0.0, per_pair=0.0, per_row=0.0, per_context=0.0)


def test_a_stopped_step_is_a_step_and_its_time_was_busy() -> None:
    scenario = one_request(100, 1000, prefill=0, steps=STEPS, num_blocks=400, block_tokens=16)
    world = World(replace(scenario, jumps=False, drain_s=8.0))
    [worker] = world.workers.values()
    steps: list[int] = []
    busy_s: list[float] = []

    def look() -> None:
        steps.append(worker.engine.figures().steps)
        busy_s.append(worker.engine.busy_s)

    def leave() -> None:
        worker.send(Abort(request_id=next(iter(world.jobs)), attempt=1))

    world.kernel.at(5.2, look)
    world.kernel.at(5.3, leave)
    world.kernel.at(5.4, look)
    world.run()
    assert steps == [10, 11]
    assert busy_s == pytest.approx([5.0, 5.3])  # a step begins each half second
