"""A worker's steps: the engine's next batch, with the adapters that it needs in their slots, and what is learned of it.

schedule ─> begin_step, on_layer ... ─> complete ─> note_turn: how long it took, for the routers

An adapter that requests wait for is loaded beside steps; one that the running step computes with keeps its slot.
"""

from __future__ import annotations

import msgspec

from ..common.batch import Batch, StepOutput
from ..engine.samples import RouterSamples, step_sample
from ..wire.workers import StepSample
from .adapters import AdapterCache
from .roles import RolePair


class Steps:
    """Implements `engine.loop.StepRole` for both roles."""

    def __init__(self, roles: RolePair, adapters: AdapterCache | None, samples: RouterSamples) -> None:
        """`adapters` None: none are applied."""
        self._roles = roles
        self._adapters = adapters
        self._samples = samples
        self._adapters_in_step: set[str] = set()  # of the running step
        self._sample: StepSample | None = None  # of the step that has just ended

    def serve_adapters(self) -> None:
        """Let requests have the adapters that are loaded by now, and those that wait have them loaded."""
        if self._adapters is None:
            return
        prompts, answers = self._roles.prefill.adapters_in_use(), self._roles.decode.adapters_in_use()
        self._adapters.serve(prompts[0] | answers[0] | self._adapters_in_step, [*prompts[1], *answers[1]])

    def schedule(self) -> Batch | None:
        if self._adapters is None:
            return self._roles.schedule()
        self.serve_adapters()
        batch = self._roles.schedule()
        rows = batch.rows if batch is not None else []
        self._adapters_in_step = {row.seq.adapter for row in rows if row.seq.adapter}
        return batch

    def begin_step(self, batch: Batch) -> None:
        self._roles.begin_step(batch)

    def on_layer(self, layer: int) -> None:
        self._roles.on_layer(layer)

    def complete(self, batch: Batch, output: StepOutput) -> None:
        # Before its tokens are counted as computed. A step that verifies drafts is like none that routers reckon with.
        is_plain = batch.rows and not batch.has_drafts and not output.is_stopped
        self._sample = step_sample(batch) if is_plain else None
        self._roles.complete(batch, output)
        self._adapters_in_step = set()

    def note_turn(self, turn_s: float) -> None:
        if self._sample is not None:
            self._samples.add(msgspec.structs.replace(self._sample, step_s=turn_s))
