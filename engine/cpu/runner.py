"""Steps in C++: a model, or a rank's part of it, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor

from ...common.batch import Batch
from ...common.request import SampledToken
from ..nn.deterministic import one_thread
from ..nn.layers import RMSNorm
from ..nn.plan import StepPlan, logit_rows, pooled_rows
from ..nn.runner import OnLayer
from ..sampling.sampling import SampleRow
from .decoder import NativeDecoder, Step
from .sampling import NativeSampler


class NativeRunner:
    """Implements `Runner`. An exact decoder's results are named after the library: set, source, compiler."""

    def __init__(
        self, decoder: NativeDecoder, final_norm: RMSNorm, *, num_pages: int, eos_token_ids: frozenset[int]
    ) -> None:
        """`final_norm` is for embeddings alone: before logits the library computes it itself. `num_pages`: of a block,
        those with keys and values.
        """
        self.decoder = decoder
        self._final_norm = final_norm
        self.results = decoder.build if decoder.is_exact else ""
        self._num_pages = num_pages
        self._sampler = NativeSampler(decoder, eos_token_ids)

    def calculating(self) -> AbstractContextManager[None]:
        # Torch's threads would go on spinning for milliseconds, on cores that the library's own need for the next step.
        return one_thread()

    def decode(self, batch: Batch, on_layer: OnLayer | None) -> None:
        return None

    def forward(self, plan: StepPlan, on_layer: OnLayer | None) -> Iterator[Tensor]:
        pooled = pooled_rows(plan)
        wanted = plan.pooled_rows + plan.sample_rows + plan.prompt_rows
        step = Step(plan.input_ids, plan.starts, plan.lengths, plan.block_ids, wanted, plan.adapters, plan.drafted)
        if len(plan.input_ids) > len(plan.lengths) or on_layer is None:
            hidden = self.decoder.forward(step, on_layer)
        else:
            hidden = self.decoder.forward(step)  # tokens of running answers: too quick to interrupt for each layer
            for page in range(self._num_pages):
                on_layer(page)
        states, rest = hidden[: len(pooled)], hidden[len(pooled) :]
        logits = map(self.decoder.logits, torch.split(rest, [len(rows) for rows in logit_rows(plan)]))
        return chain((self._normed(states),), logits) if len(states) else logits

    def _normed(self, states: Tensor) -> Tensor:
        return self._final_norm.in_type_of(states[:, : len(self._final_norm.weight)])

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sequence[tuple[SampledToken, ...]]:
        return self._sampler.sample(logits, rows)

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        return self._sampler.prompt_logprobs(logits, targets)

    def stop(self) -> None:
        self.decoder.stop()

    def layer_event(self) -> None:
        return None

    def wait(self) -> None:
        """The library has returned when its call has."""
