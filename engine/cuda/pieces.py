"""Steps of any batch as CUDA graphs in pieces: what lies between attention and collectives is captured, these are not.

    piece ─> attention of layer 0 ─> piece ─> attention of layer 1 ─> …        with several ranks, a sum cuts too

A small step is bound by its launches, some ten for each layer. Attention depends on the rows of a batch, so it is
launched by itself, between two pieces, as a layer's states are read; so is a collective, as one inside a graph would
have to be proven safe against a rank that fails. Everything else depends on the number of tokens alone: there are
pieces for a few padded numbers. Padding computes for nothing: it neither attends nor writes to pages.

With several ranks, whose decode steps have no graphs of their own, there are pieces for rows of one token besides, in
which states are read as in those graphs.

Each piece is captured while the step runs as it would without graphs. What attention reads and yields lies in buffers
of this module, and what states and collectives do, so that they stay where a piece expects them.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn.attention.device import DeviceAttention
from ..nn.decoder import Decoder
from ..nn.loading import Progress
from ..nn.runner import OnLayer
from ..nn.states import Read
from .decoder import FusedDecoder
from .states import DeviceStates

# Tokens of a step, padded. Larger steps take so long to compute that launches hide behind them; each size costs memory
# for its activations and, for each layer, a graph.
SIZES = (16, 32, 64, 128, 256, 512)
RANK_SIZES = (1, 2, 4, 8, *SIZES)  # with several ranks, whose decode steps have no graphs of their own


class _Kind(NamedTuple):
    """There are pieces of their own for each."""

    size: int
    is_adapted: bool  # tokens have adapters
    are_rows: bool  # of one token each; read where there are states alone


class PieceGraphs:
    """Owned by the engine's thread. Attention and states are ready for a step before each call of `run`."""

    def __init__(
        self,
        decoder: FusedDecoder,
        attention: DeviceAttention,
        device: torch.device,
        states: DeviceStates | None = None,
    ) -> None:
        """`states`: of the model's layers; None: all keep keys and values."""
        plain = decoder.plain
        self._comm = plain.head.rows.comm
        self.sizes = RANK_SIZES if self._comm.size > 1 else SIZES
        self._decoder = decoder
        self._attention = attention
        self._device = device
        self._states = states
        self._row_states = states if self._comm.size > 1 else None  # of which there are pieces for rows of one token
        self._buffers = _Buffers(plain, attention, self.sizes[-1], device)
        self._input_ids = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        self._positions = torch.zeros(self.sizes[-1], dtype=torch.int32, device=device)
        self._adapters = torch.zeros(self.sizes[-1], dtype=torch.int32, device=device)
        self._pool = torch.cuda.graph_pool_handle()
        # What to do, in order, and hidden states.
        self._steps: dict[_Kind, tuple[list[Callable[[], object]], Tensor]] = {}
        self._on_layer: OnLayer | None = None
        self._capture: _Capture | None = None

    def capture(self, progress: Progress | None = None) -> None:
        """Capture every size, the largest first."""
        gc.collect()
        choices = [False] if self._row_states is None else [False, True]
        kinds = [
            _Kind(size, is_adapted, are_rows)
            for size in reversed(self.sizes)
            for is_adapted in self._decoder.adapter_choices
            for are_rows in choices
        ]
        for count, kind in enumerate(kinds, 1):
            self._steps[kind] = self._captured(kind)
            if progress is not None:
                progress("capturing CUDA graphs", count / len(kinds))
        torch.cuda.synchronize(self._device)

    def _captured(self, kind: _Kind) -> tuple[list[Callable[[], object]], Tensor]:
        self._attention.plan_nothing()
        if self._states is not None and kind.are_rows:
            self._states.begin_padding(kind.size, self.sizes[-1])
        with_states = nullcontext() if self._states is None or kind.are_rows else self._states.apart(self._between)
        adapters = self._adapters[: kind.size] if kind.is_adapted else None
        ids, positions = self._input_ids[: kind.size], self._positions[: kind.size]
        with _Capture(self._pool) as self._capture, with_states:
            self._comm.around = self._sum
            hidden = self._decoder.forward(ids, positions, self, self._tell, adapters)
        self._comm.around, steps = None, self._capture.steps
        self._capture = None
        return steps, hidden

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.sizes[-1]

    def run(
        self, input_ids: Tensor, positions: Tensor, on_layer: OnLayer | None, adapters: Tensor | None = None
    ) -> Tensor:
        """Queue a step that is planned. Returns hidden states of its tokens, good until the next call."""
        count = len(input_ids)
        size = self.sizes[bisect_left(self.sizes, count)]
        rows = self._row_states if self._row_states is not None and self._row_states.are_rows else None
        steps, hidden = self._steps[_Kind(size, adapters is not None, rows is not None)]
        if rows is not None:
            rows.put_rows(size)
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
        attention, (count, num_heads, dim) = self._attention, q.shape
        parts = (q, k, v) if attention.keeps_values else (q, k)
        num_all = sum(part.shape[1] for part in parts)
        heads = self._buffers.heads[: count * num_all * dim].view(count, num_all, dim)
        torch.cat(parts, 1, out=heads)
        queries, keys, values = torch.tensor_split(heads, (q.shape[1], q.shape[1] + k.shape[1]), 1)
        dim = dim if attention.value_dim is None else attention.value_dim
        out = self._buffers.attended[: count * num_heads * dim].view(count, num_heads, dim)
        self._cut(lambda: attention.forward(queries, keys, values, layer_id, out=out))
        return out

    def _tell(self, page: int) -> None:
        """Tell, behind what has been between two pieces, of a page that is written by then."""
        assert self._capture is not None
        self._capture.steps.append(lambda: self._on_layer(page) if self._on_layer is not None else None)

    def _between(self, read: Read, projected: Tensor) -> Tensor:
        """Read a layer's states between two pieces."""
        taken, out = (each[: len(projected)] for each in (self._buffers.projected, self._buffers.read))
        taken.copy_(projected)
        self._cut(lambda: out.copy_(read(taken)))
        return out

    def _sum(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over the ranks between two pieces."""
        sums = self._buffers.sums[: x.nbytes].view(x.dtype).view_as(x)
        sums.copy_(x)
        self._cut(lambda: reduce(sums))
        return sums.clone()

    def _cut(self, between: Callable[[], object]) -> None:
        """End a piece, and begin another one behind what is done between them, sums within it too."""
        assert self._capture is not None
        self._comm.around = None
        self._capture.cut(between)
        self._comm.around = self._sum


class _Buffers:
    """Buffers hold what goes from piece to piece, with room for the layer that has most, and stay where they are."""

    def __init__(self, decoder: Decoder, attention: DeviceAttention, num_tokens: int, device: torch.device) -> None:
        config, mixers = decoder.config, decoder.stateful_mixers()

        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_tokens * width, dtype=dtype, device=device)

        self.heads, self.attended = (
            zeros(size, attention.dtype) for size in (attention.heads_size, attention.result_size)
        )
        width = max((mixer.num_projected for mixer in mixers), default=0)
        self.projected = zeros(width, decoder.dtype).view(num_tokens, width)
        width = max((mixer.out_proj.weight.num_inputs for mixer in mixers), default=0)
        self.read = zeros(width, decoder.dtype).view(num_tokens, width)
        looked_up = 0 if config.layer_inputs is None else config.num_layers * config.layer_inputs.size
        self.sums = zeros(max(config.hidden_size, looked_up) * torch.float32.itemsize, torch.uint8)  # of any type


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
