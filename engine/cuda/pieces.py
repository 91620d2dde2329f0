"""Steps of any batch as CUDA graphs in pieces: what lies between attention and collectives is captured, these are not.

    piece ─> attention of layer 0 ─> piece ─> attention of layer 1 ─> …        with several ranks, a sum cuts too

A small step is bound by its launches, some ten for each layer. Attention depends on the rows of a batch, so it is
launched by itself, between two pieces; so is a collective, as one inside a graph would have to be proven safe against
a rank that fails. Everything else depends on the number of tokens alone: there are pieces for a few padded numbers.
Padding computes for nothing: it neither attends nor writes to pages.

Each piece is captured while the step runs as it would without graphs. What attention reads and yields lies in buffers
of this module, and what a collective sums, so that they stay where a piece expects them.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.attention.device import DeviceAttention
from ..nn.loading import Progress
from ..nn.runner import OnLayer
from .decoder import FusedDecoder

# Tokens of a step, padded. Larger steps take so long to compute that launches hide behind them; each size costs memory
# for its activations and, for each layer, a graph.
SIZES = (16, 32, 64, 128, 256, 512)
RANK_SIZES = (1, 2, 4, 8, *SIZES)  # with several ranks, whose decode steps have no graphs of their own


class PieceGraphs:
    """Owned by the engine's thread. `attention` is planned before each call of `forward`."""

    def __init__(self, decoder: FusedDecoder, attention: DeviceAttention, device: torch.device) -> None:
        plain = decoder.plain
        self._comm = plain.head.rows.comm
        self.sizes = RANK_SIZES if self._comm.size > 1 else SIZES
        self._decoder = decoder
        self._attention = attention
        self._device = device
        self._heads = attention.empty_heads(self.sizes[-1])
        self._attended = attention.empty_result(self.sizes[-1]).zero_()
        self._sums = torch.zeros(self.sizes[-1], plain.config.hidden_size, dtype=plain.dtype, device=device)
        self._input_ids = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(self.sizes[-1], dtype=torch.int32, device=device)
        self._adapters = torch.zeros(self.sizes[-1], dtype=torch.int32, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        # By size, and whether tokens have adapters: what to do, in order, and hidden states.
        self._steps: dict[tuple[int, bool], tuple[list[Callable[[], object]], Tensor]] = {}
        self._on_layer: OnLayer | None = None
        self._capture: _Capture | None = None

    def capture(self, progress: Progress | None = None) -> None:
        """Capture every size, the largest first."""
        gc.collect()
        kinds = [(size, each) for size in reversed(self.sizes) for each in self._decoder.adapter_choices]
        for count, (size, is_adapted) in enumerate(kinds, 1):
            self._attention.plan_nothing()
            with _Capture(self._pool) as self._capture:
                self._comm.around = self._sum
                adapters = self._adapters[:size] if is_adapted else None
                ids, positions = self._input_ids[:size], self._positions[:size]
                hidden = self._decoder.forward(ids, positions, self, None, adapters)
            self._comm.around, steps = None, self._capture.steps
            self._capture = None
            self._steps[size, is_adapted] = steps, hidden
            if progress is not None:
                progress("capturing CUDA graphs", count / len(kinds))
        torch.cuda.synchronize(self._device)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.sizes[-1]

    def run(
        self, input_ids: Tensor, positions: Tensor, on_layer: OnLayer | None, adapters: Tensor | None = None
    ) -> Tensor:
        """Queue a step whose attention is planned. Returns hidden states of its tokens, good until the next call."""
        count = len(input_ids)
        steps, hidden = self._steps[self.sizes[bisect_left(self.sizes, count)], adapters is not None]
        if adapters is not None:
            self._adapters[:count].copy_(adapters)
        self._input_ids[:count].copy_(input_ids)
        self._positions[:count].copy_(positions)
        self._on_layer = on_layer
        for step in steps:
            step()
        return hidden

    # --- between two pieces, while they are captured --------------------------------------------------------------

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layer_id: int) -> Tensor:
        """Implements `PagedAttention`: end a piece, attend, and begin the next one."""
        count = len(q)
        heads, out = self._heads[:count], self._attended[:count]
        has_values = heads.shape[1] > q.shape[1] + k.shape[1]  # else they are a part of keys
        torch.cat((q, k, v) if has_values else (q, k), 1, out=heads)

        def attend() -> None:
            self._attention.forward(*self._attention.split(heads), layer_id, out=out)
            if self._on_layer is not None:
                self._on_layer(layer_id)

        self._cut(attend)
        return out

    def _sum(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over the ranks between two pieces."""
        sums = self._sums[: len(x)]
        sums.copy_(x)
        self._cut(lambda: reduce(sums))
        return sums.clone()

    def _cut(self, between: Callable[[], object]) -> None:
        assert self._capture is not None
        self._capture.cut(between)


class _Capture:
    """Captures pieces on a stream of its own; whatever comes between two is done there too, at once."""

    def __init__(self, pool: object) -> None:
        self.steps: list[Callable[[], object]] = []
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]

    def __enter__(self) -> _Capture:
        torch.cuda.synchronize()
        self._stream.__enter__()  # type: ignore[no-untyped-call]
        gc.disable()  # memory that is freed meanwhile may not go back to the driver
        self._begin()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._end()
        gc.enable()
        self._stream.__exit__(None, None, None)
        torch.cuda.synchronize()

    def cut(self, between: Callable[[], object]) -> None:
        self._end()
        between()
        self.steps.append(between)
        self._begin()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may ask about their events meanwhile: only this thread's calls are watched.
        self._graph.capture_begin(self._pool, "thread_local")  # type: ignore[arg-type]

    def _end(self) -> None:
        self._graph.capture_end()
        self.steps.append(self._graph.replay)
