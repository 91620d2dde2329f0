"""A loaded model as C++ takes it: every matrix packed, every block described, field by field as in `native/model.hpp`.

    NativeModel(decoder, cache)   takes the decoder's matrices over, one by one, so that memory never holds two models

In which order a packed matrix lies is known to the C++ alone (`native/tiles.hpp`). It has code for layers of
`Attention` and `GatedMLP` over plain bfloat16; a model of other blocks is left to torch.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from ...common.config import CpuIsa
from ..nn.decoder import Decoder, DecoderLayer
from ..nn.feed_forward import GatedMLP
from ..nn.layers import Linear
from ..nn.mixer import Attention
from ..nn.weight import DenseWeight
from .build import load
from .compiler import NativeUnavailable


class _Tiles(ctypes.Structure):
    _fields_ = [("weights", ctypes.c_void_p), ("columns", ctypes.c_int64), ("pairs", ctypes.c_int64)]


class _Linear(ctypes.Structure):
    _fields_ = [("weight", _Tiles), ("bias", ctypes.c_void_p)]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("qkv", _Linear),
        ("o", _Linear),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("window", ctypes.c_int64),
    ]


class _GatedMLP(ctypes.Structure):
    _fields_ = [("gate_up", _Linear), ("down", _Linear)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("attention", _Attention),
        ("mlp_norm", ctypes.c_void_p),
        ("mlp", _GatedMLP),
        ("pages", ctypes.c_void_p),
    ]


_SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")


class Model(ctypes.Structure):
    """The C++ `Model`. Whoever has pages fills in the layers' and their numbers."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, "page_stride", "block_size")),
        ("norm_eps", ctypes.c_double),
        ("rope_factor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("inv_freq", "embedding", "final_norm")),
        ("head", _Tiles),
        ("layers", ctypes.POINTER(_Layer)),
    ]


class NativeModel:
    """A rank's weights in C++'s form, and the library for them. It keeps the memory that `described` points to."""

    def __init__(self, decoder: Decoder, cache: Path, isa: CpuIsa = "auto") -> None:
        """Raises NativeUnavailable, and has then left the decoder as it was; ConfigError as `load` does."""
        blocks = [_known_blocks(layer) for layer in decoder.layers]
        weights = [_known_weight(linear) for linear in decoder.linears()]
        self.library = load(cache, isa)
        self.name = Path(self.library._name).stem  # instruction set, source and compiler
        self._pack = _Packer(self.library)
        self._packed = {id(weight): self._pack(weight.take()) for weight in weights}
        self._keep = (decoder, weights)
        self.described = self._describe(decoder, blocks)

    def _describe(self, decoder: Decoder, blocks: list[tuple[Attention, GatedMLP]]) -> Model:
        config = decoder.config
        layers = (_Layer * config.num_layers)()
        parts = zip(decoder.layers, blocks, config.sliding_windows, layers, strict=True)
        for layer, (attention, mlp), window, target in parts:
            target.input_norm, target.mlp_norm = _address(layer.input_norm.weight), _address(layer.mlp_norm.weight)
            target.attention.qkv = self._linear(attention.qkv_proj, attention.qkv_proj.bias)
            target.attention.o = self._linear(attention.o_proj, attention.o_proj.sum_bias)
            if attention.head_norms:
                q_norm, k_norm = attention.head_norms
                target.attention.q_norm, target.attention.k_norm = _address(q_norm.weight), _address(k_norm.weight)
            target.attention.window = window or 0
            target.mlp.gate_up = self._linear(mlp.gate_up_proj, mlp.gate_up_proj.bias)
            target.mlp.down = self._linear(mlp.down_proj, mlp.down_proj.sum_bias)
        model = Model(norm_eps=config.rms_norm_eps, rope_factor=decoder.rotary.attention_factor)
        for name in _SIZES:
            setattr(model, name, getattr(config, name))
        model.inv_freq = _address(decoder.rotary.inv_freq)
        model.embedding = _address(decoder.embedding.weight.plain)
        model.final_norm = _address(decoder.final_norm.weight)
        model.head = self._linear(decoder.head.linear, None).weight
        model.layers = layers
        return model

    def _linear(self, linear: Linear, bias: Tensor | None) -> _Linear:
        return _Linear(self._packed[id(linear.weight)][0], _address(bias))


class _Packer:
    """Packs a matrix: its description, and the memory that this points to."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._size, self._pack = library.kvferry_tiled_size, library.kvferry_pack
        self._size.restype, self._size.argtypes = ctypes.c_long, [ctypes.c_long, ctypes.c_long]
        self._pack.restype = _Tiles
        self._pack.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]

    def __call__(self, matrix: Tensor) -> tuple[_Tiles, Tensor]:
        assert matrix.dtype == torch.bfloat16 and matrix.is_contiguous()
        memory = torch.empty(self._size(*matrix.shape), dtype=torch.bfloat16)
        return self._pack(matrix.data_ptr(), *matrix.shape, memory.data_ptr()), memory


def _known_blocks(layer: DecoderLayer) -> tuple[Attention, GatedMLP]:
    mixer, feed_forward = layer.mixer, layer.feed_forward
    if type(mixer) is not Attention or type(feed_forward) is not GatedMLP:  # a subclass computes something else
        raise NativeUnavailable(f"no C++ for layers of {type(mixer).__name__} and {type(feed_forward).__name__}")
    return mixer, feed_forward


def _known_weight(linear: Linear) -> DenseWeight:
    weight = linear.weight
    if type(weight) is not DenseWeight or weight.dtype != torch.bfloat16 or weight.plain.device.type != "cpu":
        raise NativeUnavailable(f"no C++ for {linear.name} in {weight.dtype} as {type(weight).__name__}")
    return weight


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
