"""Steps in torch on a CPU: any model, any weights' type, any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from ...common.batch import Batch, RowOutput
from ...common.request import SampledToken
from ..sampling.logprobs import prompt_logprobs
from ..sampling.sampling import SampleRow, sample
from ..sampling.seen import SeenTokens
from .attention.base import AttentionBackend
from .decoder import Decoder
from .plan import StepPlan, logit_rows, pooled_rows, step_tensors, token_adapters
from .runner import OnLayer

_MIN_ROWS = 4  # below, the processor's matrix products are slower and round a row differently


class PackedModel(Protocol):
    """Layers and head on packed tokens: a `Decoder`, or another order of the same sums."""

    def forward(
        self, input_ids: Tensor, positions: Tensor, backend: AttentionBackend, on_layer: OnLayer | None = None
    ) -> Tensor:
        """Return hidden states, at least [num_tokens, hidden_size]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn rows of `forward` into logits, at least [rows, vocab_size] float32."""
        ...


class TorchRunner:
    """Implements `Runner`. Rounding follows from how many rows a product has, so nothing is promised about it."""

    results = ""
    _tile: int | None = None  # tokens that the model takes at a time; None: all

    def __init__(
        self, decoder: Decoder, attention: AttentionBackend, *, block_size: int, model: PackedModel | None = None
    ) -> None:
        """`model` computes in place of `decoder`, from the same weights."""
        self.decoder = decoder
        self._model: PackedModel = model if model is not None else decoder
        self._attention = attention
        self._block_size = block_size
        self._eos_token_ids = decoder.config.eos_token_ids
        self._seen = SeenTokens()
        attention.warm_up()

    def calculating(self) -> AbstractContextManager[None]:
        return nullcontext()

    def decode(self, batch: Batch, on_layer: OnLayer | None) -> list[RowOutput] | None:
        return None

    def forward(self, plan: StepPlan, on_layer: OnLayer | None) -> Iterator[Tensor]:
        input_ids, positions, metadata = step_tensors(plan, self._block_size)
        self._attention.plan(metadata)
        if self.decoder.states is not None:
            self.decoder.states.begin(plan, self._block_size)
        if self.decoder.adapters is not None:
            self.decoder.adapters.step.begin(token_adapters(plan), tile=self._tile)
        hidden = self._model.forward(_padded(input_ids), _padded(positions), self._attention, on_layer)
        logits = (self._model.logits(hidden[_padded(part)])[: len(part)] for part in logit_rows(plan))
        return chain(self._states(hidden, pooled_rows(plan)), logits)

    def _states(self, hidden: Tensor, rows: Tensor) -> Iterator[Tensor]:
        if len(rows):
            yield self.decoder.final_norm.in_type_of(hidden[rows.long()]).float()

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sequence[tuple[SampledToken, ...]]:
        return sample(logits, rows, self._eos_token_ids, self._seen)

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        return prompt_logprobs(logits, targets)

    def stop(self) -> None:
        """A step runs to its end."""

    def layer_event(self) -> None:
        return None

    def wait(self) -> None:
        """Nothing is queued on a CPU."""


def _padded(index: Tensor) -> Tensor:
    """[n] integers -> int64, at least _MIN_ROWS of them: the last ones are computed for nothing."""
    index = index.long()
    missing = _MIN_ROWS - len(index)
    return index if missing <= 0 else torch.cat((index, index.new_zeros(missing)))
