"""The decode step in native code: the same weights, pages and results as `Decoder`, one call for all layers.

For batches whose every row is one token, which is what a decode worker runs all day: there the torch path spends more
time between products than in them. Weights are read where `Linear.pack` left them, so nothing is held twice; what the
library takes is described with its source, `common/cpu/decoder.cpp`. It knows neither sequences nor sampling.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path

import torch
from torch import Tensor

from ..native import NativeUnavailable, load
from .decoder import Decoder, DecoderLayer
from .layers import Linear

_MAX_ROWS = 64  # kMaxRows of the library; where oneDNN's products catch up
_TILE = 64  # columns; what rows of hidden states and logits are padded to


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("qkv_bias", "o_bias", "gate_up_bias", "down_bias")),
        *((name, ctypes.c_void_p) for name in ("input_norm", "mlp_norm", "q_norm", "k_norm")),
        ("window", ctypes.c_int64),
    ]


_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, "num_blocks", "block_size")),
        ("norm_eps", ctypes.c_double),
        ("rope_factor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("inv_freq", "embedding", "final_norm", "head", "pages")),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class NativeDecoder:
    """Used by one thread; with `num_threads` 1 it starts no other. Keeps the decoder's memory alive."""

    max_rows = _MAX_ROWS

    def __init__(self, decoder: Decoder, pages: Tensor, *, num_threads: int, cache: Path) -> None:
        """`pages` are those of the engine. Raises NativeUnavailable."""
        if pages.dtype != torch.bfloat16 or pages.device.type != "cpu" or decoder.head.rows.comm.size != 1:
            raise NativeUnavailable("only for a whole model in bfloat16 on a CPU")
        self._model = _describe(decoder, pages)
        self._keep = (decoder, pages)
        self._vocab_size = decoder.config.vocab_size
        self._hidden_stride = _padded(decoder.config.hidden_size)
        library = load(cache)
        self._forward, self._logits = library.kvferry_decoder_forward, library.kvferry_decoder_logits
        self._forward.argtypes = [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_char_p] * 3, ctypes.c_void_p]
        self._logits.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        library.kvferry_decoder_new.restype = ctypes.c_void_p
        handle = library.kvferry_decoder_new(ctypes.byref(self._model), num_threads, self.max_rows)
        self._handle = ctypes.c_void_p(handle)
        weakref.finalize(self, library.kvferry_decoder_free, self._handle)

    def forward(self, input_ids: bytes, positions: bytes, block_ids: bytes) -> Tensor:
        """int32 arrays: each row's token, its position, and its blocks up to that position, row after row.

        Hidden states before the final norm, [rows, hidden_size padded to 64] float32.
        """
        self._check(input_ids, positions, block_ids)
        rows = len(input_ids) // 4
        hidden = torch.empty(rows, self._hidden_stride)
        self._forward(self._handle, rows, input_ids, positions, block_ids, hidden.data_ptr())
        return hidden

    def _check(self, input_ids: bytes, positions: bytes, block_ids: bytes) -> None:
        """What torch would refuse, and the library would read or write out of bounds."""
        tokens = memoryview(input_ids).cast("i")
        num_blocks = sum(position // self._model.block_size + 1 for position in memoryview(positions).cast("i"))
        assert 0 < len(tokens) <= self.max_rows and len(positions) == len(input_ids), len(tokens)
        assert 0 <= min(tokens) and max(tokens) < self._vocab_size, "a token is not in the vocabulary"
        assert num_blocks * 4 == len(block_ids), "a block table is shorter than its sequence"

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of `forward` -> [rows, vocab_size] float32."""
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), _padded(self._vocab_size))
        self._logits(self._handle, len(hidden), hidden.data_ptr(), logits.data_ptr())
        return logits[:, : self._vocab_size]


def _describe(decoder: Decoder, pages: Tensor) -> _Model:
    config = decoder.config
    layers = (_Layer * config.num_layers)()
    for layer, window, target in zip(decoder.layers, config.sliding_windows, layers, strict=True):
        _describe_layer(layer, window, target)
    model = _Model(num_blocks=pages.shape[1], block_size=pages.shape[4], norm_eps=config.rms_norm_eps)
    for name in _SIZES:
        setattr(model, name, getattr(config, name))
    model.rope_factor = decoder.rotary.attention_factor
    model.inv_freq = decoder.rotary.inv_freq.data_ptr()
    model.embedding = decoder.embedding.weight.data_ptr()
    model.final_norm = decoder.final_norm.weight.data_ptr()
    model.head = _tiles(decoder.head.linear)
    model.pages = pages.data_ptr()
    model.layers = layers
    return model


def _describe_layer(layer: DecoderLayer, window: int | None, target: _Layer) -> None:
    attention = layer.attention
    for name, linear in (
        ("qkv", attention.qkv_proj),
        ("o", attention.o_proj),
        ("gate_up", layer.gate_up_proj),
        ("down", layer.down_proj),
    ):
        setattr(target, name, _tiles(linear))
    target.qkv_bias, target.o_bias = _address(attention.qkv_proj.bias), _address(attention.o_proj.sum_bias)
    target.gate_up_bias, target.down_bias = _address(layer.gate_up_proj.bias), _address(layer.down_proj.sum_bias)
    target.input_norm, target.mlp_norm = _address(layer.input_norm.weight), _address(layer.mlp_norm.weight)
    if attention.head_norms:
        target.q_norm, target.k_norm = (_address(norm.weight) for norm in attention.head_norms)
    target.window = window or 0


def _tiles(linear: Linear) -> int:
    if linear.tiles is None:
        raise NativeUnavailable("this build of torch blocks weights in another way")
    return linear.tiles


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _padded(size: int) -> int:
    return -(-size // _TILE) * _TILE
