"""The decoder in tiles of 16 tokens: a token's results do not depend on how many others there are, to the bit.

Libraries choose a product's kernel, and torch cuts its loops, by the number of rows. Here every product, norm and
function runs on 16 rows, padded where tokens are fewer; attention is `TiledAttention`. That a row's place among the 16
does not matter either is tried with this machine's kernels before the first step. Embedding, weights and pages are
those of the `Decoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.errors import ConfigError
from ...common.request import SampledToken
from ..nn.attention.base import AttentionBackend
from ..nn.decoder import Decoder
from ..nn.deterministic import one_thread, torch_results
from ..nn.latent import LatentHeads
from ..nn.layers import Linear
from ..nn.torch_runner import TorchRunner
from ..sampling.logprobs import prompt_logprobs_each
from ..sampling.sampling import SampleRow, sample_each

_ROWS = 16  # of a product: more pads a lone token with more that is computed for nothing, fewer slow down prompts


class TiledDecoder:
    """Owned by the engine's thread, which calculates alone."""

    def __init__(self, decoder: Decoder) -> None:
        """Raises ConfigError where the processor's products do not allow it."""
        self._decoder = decoder
        for linear in _linears(decoder):
            _check_places(partial(Linear.__call__, linear), linear.name, linear.weight.dtype, linear.weight.num_inputs)
        if (heads := next((leaf for leaf in decoder.leaves() if isinstance(leaf, LatentHeads)), None)) is not None:
            for product, matrices in ((heads.asked, heads.of_keys), (heads.answered, heads.of_values.transpose(1, 2))):
                _check_places(product, heads.name, matrices.dtype, *matrices.shape[:2])

    def forward(
        self,
        input_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return hidden states before the final norm, [num_tokens padded to 16, hidden_size]; padding is anything."""
        decoder = self._decoder
        x = decoder.embed(_padded(input_ids))
        tokens = zip(_tiles(_padded(input_ids)), self._each(x), strict=True)
        inputs = [decoder.own_inputs(ids, part) for ids, part in tokens]
        ropes = [decoder.ropes(part) for part in _tiles(_padded(positions))]
        for layer, *own_inputs in zip(decoder.layers, *inputs, strict=True):
            projected = torch.cat([layer.project(part, own) for part, own in zip(self._each(x), ropes, strict=True)])
            mixed = layer.mix(projected, backend, on_layer)
            for part, attended, given in zip(self._each(x), _tiles(mixed), own_inputs, strict=True):
                layer.finish_(part, attended, given)
        return x

    def _each(self, x: Tensor) -> Iterator[Tensor]:
        """Yield tile after tile, each with its tokens' adapters in their linears."""
        adapters = self._decoder.adapters
        for index, part in enumerate(_tiles(x)):
            if adapters is not None:
                adapters.step.turn_to(index)
            yield part

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn rows of `forward` into [rows padded to 16, vocab_size] float32."""
        return torch.cat([self._decoder.logits(part) for part in _tiles(_padded(hidden))])


class TiledRunner(TorchRunner):
    """Implements `Runner`, to the bit: tiles of tokens, one torch thread, and every row sampled for itself."""

    _tile = _ROWS

    def __init__(self, decoder: Decoder, attention: AttentionBackend, *, block_size: int) -> None:
        """`attention` is one that keeps one order, too. Raises ConfigError."""
        with one_thread():
            tiled = TiledDecoder(decoder)
        super().__init__(decoder, attention, block_size=block_size, model=tiled)
        self.results = torch_results(decoder.dtype, decoder.head.rows.comm.size)
        if decoder.expert_plan is not None:
            self.results += f" {decoder.expert_plan.name}"

    def calculating(self) -> AbstractContextManager[None]:
        return one_thread()

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sequence[tuple[SampledToken, ...]]:
        return sample_each(logits, rows, self._eos_token_ids, self._seen)

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[tuple[int, int]]) -> list[SampledToken]:
        return prompt_logprobs_each(logits, targets)


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, _ROWS)


def _padded(x: Tensor) -> Tensor:
    """Add zero rows up to a multiple of _ROWS."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % _ROWS))


def _linears(decoder: Decoder) -> Iterator[Linear]:
    """Yield a linear of each name and shape: a product's kernel follows from the shape."""
    seen = set[tuple[str, int, int]]()
    for linear in decoder.linears():
        key = _short_name(linear.name), linear.weight.num_outputs, linear.weight.num_inputs
        if key not in seen:
            seen.add(key)
            yield linear


def _short_name(name: str) -> str:
    return name.rpartition(".")[2]


def _check_places(product: Callable[[Tensor], Tensor], name: str, dtype: torch.dtype, *shape: int) -> None:
    """Check that a row one place further gives the same bits there: so for every place, and hence for any two.

    NaN among the weights is not the processor's fault: each request will be told.
    """
    x = torch.randn(_ROWS, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = (product(rows).nan_to_num() for rows in (x, x.roll(1, 0)))
    if not torch.equal(here.roll(1, 0), there):
        raise ConfigError(
            f"deterministic: on this processor a row of {_short_name(name)} ({shape[-1]} inputs, {dtype}) "
            "depends on its place among 16; leave it off, or use another --dtype"
        )
