"""One protocol for whatever carries out a step's arithmetic on a rank.

    decode    a whole step at once, where the runner has a way of its own for batches of single tokens
    forward   any batch: the layers at once, then hidden states and logits as they are asked for
    sample    logits to tokens, on rank 0 alone
    wait      the step is over when this returns

Implementations: `TorchRunner` (any device's torch, used on CPUs), `TiledRunner` (exact, in torch), `NativeRunner` (C++,
exact or not) and `CudaRunner`. `engine/choose.py` chooses one when the engine starts; nothing else asks which it is.
A runner keeps nothing of a request that a step needs: what a sequence was is in the pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ...common.batch import Batch, GpuEvent, RowOutput
from ...common.request import SampledToken
from ..sampling.sampling import SampleRow
from .plan import StepPlan

OnLayer = Callable[[int], None]


class StepStopped(Exception):
    """Nobody wants the step any more; what it has written of its own tokens is worth nothing."""


class Runner(Protocol):
    """Used by the engine's thread alone, under inference mode and within `calculating`."""

    results: str  # names a rounding: workers of equal names compute equal bits. Empty: nothing is promised

    def calculating(self) -> AbstractContextManager[None]:
        """Return what a step is computed within: exact results in torch need torch to use one thread."""
        ...

    def decode(self, batch: Batch, on_layer: OnLayer | None) -> list[RowOutput] | None:
        """Run all of the step, whose blocks have been copied, and wait for it. None: nothing was done."""
        ...

    def forward(self, plan: StepPlan, on_layer: OnLayer | None) -> Iterator[Tensor]:
        """Run the layers at once; `on_layer(i)` is called when layer i's keys and values are in the pages or, on a
        GPU, when the kernels that write them are queued.

        The plan's blocks have been copied. Yields, where the plan has `pooled_rows`, their hidden states behind the
        final norm, [rows, hidden_size] float32; then logits, [rows, vocab_size] float32, for each part of
        `logit_rows(plan)`. With several ranks all of them take every part, for each is a collective.
        """
        ...

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sequence[tuple[SampledToken, ...]]:
        """Return the tokens of each row's choices, none where its logits are no distribution. `logits` is used up."""
        ...

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        """Judge by row i of `logits` the token targets[i][0], and report the targets[i][1] best ones."""
        ...

    def stop(self) -> None:
        """Have the running `forward` raise StepStopped, if it can: nobody wants it. From any thread."""
        ...

    def layer_event(self) -> GpuEvent | None:
        """Return, within `on_layer`, what tells when that layer's pages are written; None where they are by then."""
        ...

    def wait(self) -> None:
        """Return when everything queued so far is done."""
        ...
