"""The decoder in native code: the same pages and results as `Decoder`, one call for all layers of a step.

Torch spends more time between the products of a decode step than in them, and attends to a prompt at a third of the
rate of its products. The weights are a `NativeModel`'s; what the library takes is described with its source,
`engine/cpu/native/decoder.cpp`. It knows neither sequences nor sampling.
"""

from __future__ import annotations

import ctypes
import platform
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.cores import SharedCores
from ...common.errors import ConfigError
from ...models.parts.states import StatesConfig
from ..nn.attention.base import LayerPages
from ..nn.runner import StepStopped
from ..nn.states import ForeignStateError, LayerStates
from ..ranks.communicator import Communicator
from .described import Draw, Model, Report, SumOverRanks
from .model import NativeModel
from .state_runs import state_runs

_TILE = 64  # columns; what rows of hidden states and logits are padded to


_OnLayer = ctypes.CFUNCTYPE(None, ctypes.c_int)
_STOPPED, _WHOLE, _FOREIGN_STATE, _NO_MEMORY = range(4)  # how a step ends: native/decoder.cpp


class NativeDecoder:
    """Used by one thread; with `num_threads` 1 it starts no other. Keeps the model's memory alive."""

    def __init__(
        self,
        model: NativeModel,
        pages: LayerPages,
        *,
        num_threads: int,
        cores: SharedCores | None = None,
        is_exact: bool = False,
        states: LayerStates | None = None,
    ) -> None:
        """`pages` are this model's part of the engine's, of layers with keys and values; `states` has those of others.
        With `cores`, it uses more threads than its own while others are idle. `is_exact`: a token's results depend on
        the tokens before it alone, to the bit.
        """
        first = pages[0]
        assert first.dtype in (model.dtype, torch.int8) and first.device.type == "cpu", first.dtype
        self.is_exact = is_exact
        self._keep = (model, pages, cores)
        self._model = described = model.described
        described.page_bytes, described.block_size = first.stride(0) * first.itemsize, first.shape[3]
        described.has_int8_pages = first.dtype == torch.int8
        for number, page in model.pages.items():
            layer, own = described.layers[number], pages[page]
            layer.pages = own.data_ptr()
            layer.value_step, layer.head_step = (own.stride(dim) * own.itemsize for dim in (1, 2))
        self._pages_behind = model.pages_behind
        self._states = states
        if states is not None:
            assert states.pages is not None and states.pages.stride(1) * first.itemsize == described.page_bytes
            described.state_pages = states.pages.data_ptr()
            _place_states(described, states.config, states.pages.stride(0) * first.itemsize)
        self._vocab_size: int = described.vocab_size
        self._comm, self._num_logits, self._bounded_ = model.comm, model.num_logits, model.bounded_
        self._has_head = model.has_head
        self._sums = _Sums(self._comm)
        if self._comm.size > 1:
            described.sum_over_ranks = self._sums.callback
        self._hidden_stride = _padded(described.hidden_size)
        library = model.library
        self.build = f"{model.name} {' '.join(platform.libc_ver())}"  # sines and cosines are libc's
        if model.comm.size > 1:
            self.build += f" tp {model.comm.size}{f' {model.expert_plan.name}' if model.expert_plan else ''}"
        self._forward, self._logits = library.kvferry_decoder_forward, library.kvferry_decoder_logits
        self._forward.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p),
            *(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, _OnLayer, ctypes.c_char_p),
            *(ctypes.POINTER(ctypes.c_int32), ctypes.c_char_p, ctypes.c_void_p),
        ]
        self._forward.restype = ctypes.c_int
        self._stop = ctypes.c_int32(0)
        self._logits.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._draw, self._report = library.kvferry_decoder_draw, library.kvferry_decoder_report
        self._draw.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Draw), ctypes.c_int]
        self._report.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Report), ctypes.c_int]
        library.kvferry_decoder_new.restype = ctypes.c_void_p
        library.kvferry_decoder_new.argtypes = [
            *(ctypes.POINTER(Model), ctypes.c_bool, ctypes.c_int),
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
        ]
        shared: tuple[int, int | None, int, int] = (num_threads, None, 0, 0)
        if cores is not None:
            shared = (cores.slot.max_threads, cores.address, cores.slot.num_slots, cores.slot.slot)
        handle = library.kvferry_decoder_new(ctypes.byref(self._model), is_exact, num_threads, *shared)
        if handle is None:
            raise ConfigError(
                f"num_threads: the system does not give this process {shared[0]} threads, or their memory"
            )
        self._handle = ctypes.c_void_p(handle)
        self._num_threads = library.kvferry_decoder_num_threads
        weakref.finalize(self, library.kvferry_decoder_free, self._handle)

    @property
    def num_threads(self) -> int:
        """Return on how many threads the last part of the last step ran."""
        return int(self._num_threads(self._handle))

    def stop(self) -> None:
        """Have the running step end soon. From any thread."""
        self._stop.value = 1

    def forward(self, step: Step, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Return hidden states of the wanted tokens before the final norm, [wanted, hidden_size padded to 64] float32.

        `on_layer(page)` is called from within, when all keys and values of one of a block's pages are in it.
        What it raises is raised here after the step. Raises StepStopped after `stop`, with one rank alone;
        ForeignStateError, with nothing changed.
        """
        self._check(step)
        self._stop.value = 0
        wanted = len(step.wanted) // 4
        hidden = torch.empty(wanted, self._hidden_stride)
        starts = _ints(step.starts)
        found = None if self._states is None or not self._states.are_checked else torch.empty(len(starts))
        listener = _Listener(on_layer, self._pages_behind)
        end = self._forward(
            self._handle,
            len(starts),
            step.input_ids,
            step.starts,
            step.lengths,
            step.block_ids,
            wanted,
            step.wanted,
            hidden.data_ptr(),
            listener.callback,
            step.adapters or None,
            self._stop,
            step.drafted or None,
            None if found is None else found.data_ptr(),
        )
        self._sums.check()
        if listener.error is not None:
            raise listener.error
        if found is not None and end == _FOREIGN_STATE:
            raise ForeignStateError(f"states of {found.tolist()} tokens in place of {starts.tolist()}")
        if end == _STOPPED:
            raise StepStopped
        if end == _NO_MEMORY:
            raise MemoryError(f"no memory for a step of {len(step.input_ids) // 4} tokens")
        return hidden

    def _check(self, step: Step) -> None:
        """Assert what torch would refuse, and the library would read or write out of bounds."""
        tokens, starts, lengths, wanted = map(_ints, (step.input_ids, step.starts, step.lengths, step.wanted))
        size = self._model.block_size
        num_blocks = sum((start + count - 1) // size + 1 for start, count in zip(starts, lengths, strict=True))
        assert len(tokens) > 0 and min(lengths) > 0 and sum(lengths) == len(tokens), lengths.tolist()
        assert min(tokens) >= 0 and max(tokens) < self._vocab_size, "a token is not in the vocabulary"
        assert num_blocks * 4 == len(step.block_ids), "a block table is shorter than its sequence"
        assert all(0 <= token < len(tokens) for token in wanted), "a wanted token is not in the step"

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn rows of `forward` into [rows, vocab_size] float32, on every rank: zeros of a model without a head, whose
        steps are measured with rows that sample, and which draws nothing for anybody.
        """
        if not self._has_head:
            return torch.zeros(len(hidden), self._vocab_size)
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), _padded(self._num_logits))
        self._logits(self._handle, len(hidden), hidden.data_ptr(), logits.data_ptr())
        return self._bounded_(self._comm.all_gather(logits[:, : self._num_logits])[:, : self._vocab_size])

    def draw(self, rows: ctypes.Array[Draw], vocab_size: int) -> None:
        """Draw the tokens of rows of logits."""
        self._draw(self._handle, len(rows), rows, vocab_size)

    def report(self, rows: ctypes.Array[Report], vocab_size: int) -> None:
        """Tell of rows of logits what log-probabilities are made of."""
        self._report(self._handle, len(rows), rows, vocab_size)


def _place_states(described: Model, config: StatesConfig, page_stride: int) -> None:
    """Tell each layer that keeps a state where it lies."""
    states = [layer.attention.state for layer in described.layers[: described.num_layers]]
    for index, state in enumerate(filter(None, states)):
        state.contents.state = state_runs(config, index, page_bytes=described.page_bytes, page_stride=page_stride)


class Step(NamedTuple):
    """int32 arrays, rows packed in a line. Row i feeds lengths[i] tokens from position starts[i] on."""

    input_ids: bytes  # [num_tokens]
    starts: bytes  # [rows]
    lengths: bytes  # [rows]
    block_ids: bytes  # each row's blocks up to its last token's, row after row
    wanted: bytes  # packed tokens, each once
    adapters: bytes = b""  # the slot of each row's; empty: no row has one
    drafted: bytes = b""  # how many of each row's last tokens are a draft; empty: none


class _Listener:
    """A Python function for the library to call: an exception cannot pass through it and is kept."""

    def __init__(self, on_layer: Callable[[int], None] | None, pages_behind: Sequence[tuple[int, ...]]) -> None:
        """`pages_behind`: which pages are complete behind each layer that attends."""
        self.error: BaseException | None = None
        self._on_layer, self._pages_behind = on_layer, pages_behind
        self.callback = _OnLayer() if on_layer is None else _OnLayer(self._call)

    def _call(self, layer: int) -> None:
        if self.error is None and self._on_layer is not None:
            try:
                for page in self._pages_behind[layer]:
                    self._on_layer(page)
            except BaseException as error:
                self.error = error


class _Sums:
    """Sums over the ranks for the library to call for; after a failed one it goes on with what it has."""

    def __init__(self, comm: Communicator) -> None:
        self.callback = SumOverRanks(self._call)
        self._comm = comm
        self._error: BaseException | None = None

    def _call(self, values: int, count: int) -> None:
        if self._error is None:
            try:
                memory = (ctypes.c_float * count).from_address(values)
                self._comm.all_reduce(torch.frombuffer(memory, dtype=torch.float32))
            except BaseException as error:
                self._error = error

    def check(self) -> None:
        """Raise what a sum has raised."""
        if self._error is not None:
            raise self._error


def _ints(data: bytes) -> memoryview:
    return memoryview(data).cast("i")


def _padded(size: int) -> int:
    return -(-size // _TILE) * _TILE
