"""The structures of `native/layers/model.hpp` as `ctypes` has them, field by field: a model as C++ reads it."""

from __future__ import annotations

import ctypes

from .packing import Tiles


class LinearParts(ctypes.Structure):
    """The C++ `Linear`."""

    _fields_ = [("weight", Tiles), ("bias", ctypes.c_void_p), ("adapters", ctypes.c_void_p)]


class LatentParts(ctypes.Structure):
    """The C++ `Latents`."""

    _fields_ = [
        *((name, LinearParts) for name in ("inputs", "queries")),
        *((name, Tiles) for name in ("to_keys", "to_values")),
        *((name, ctypes.c_void_p) for name in ("kv_norm", "q_norm")),
        *((name, ctypes.c_int64) for name in ("kv_rank", "nope_dim", "value_dim", "q_rank", "is_interleaved")),
        ("norm_eps", ctypes.c_double),
    ]


class StateRun(ctypes.Structure):
    """The C++ `StateRun`."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("at", "size", "place"))]


class StateRuns(ctypes.Structure):
    """The C++ `StateRuns`."""

    _fields_ = [
        *((name, ctypes.POINTER(StateRun)) for name in ("runs", "copies")),
        *((name, ctypes.c_int64) for name in ("num_runs", "num_copies")),
    ]


_STATE_SIZES = ("kind", "kernel_size", "num_convolved", "num_values", "memory_size", "num_rates")
DELTA_NET, MAMBA, SHORT_CONVOLUTION = range(3)  # the C++ `StateKind`


class StateParts(ctypes.Structure):
    """The C++ `StateLayer`: all of a short convolution, and what other kinds begin with."""

    _fields_ = [
        *((name, LinearParts) for name in ("rows", "rates", "out")),
        *((name, ctypes.c_void_p) for name in ("factors", "convolution", "convolution_bias")),
        *((name, ctypes.c_int64) for name in _STATE_SIZES),
        ("state", StateRuns),
        ("out_factor", ctypes.c_double),
    ]


_NET_SIZES = ("num_key_heads", "num_value_heads", "key_dim", "value_dim", "is_grouped")


class DeltaNetParts(StateParts):
    """The C++ `DeltaNet`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("forgetting", "rate_bias", "norm")),
        *((name, ctypes.c_int64) for name in _NET_SIZES),
        ("norm_eps", ctypes.c_double),
    ]


class MambaParts(StateParts):
    """The C++ `Mamba`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("forgetting", "step_bias", "kept", "norm")),
        *((name, ctypes.c_int64) for name in ("num_heads", "head_dim", "num_groups", "state_dim")),
        *((name, ctypes.c_int64) for name in ("is_normed_first", "num_normed")),
        *((name, ctypes.c_double) for name in ("norm_eps", "least_step", "most_step")),
    ]


class SightParts(ctypes.Structure):
    """The C++ `Sight`."""

    _fields_ = [("size", ctypes.c_int64), ("in_chunks", ctypes.c_int64)]


class AttentionParts(ctypes.Structure):
    """The C++ `AttentionBlock`."""

    _fields_ = [
        *((name, LinearParts) for name in ("qkv", "o")),
        *((name, ctypes.c_int64) for name in ("num_made", "norms_values")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "sinks")),
        ("has_whole_norms", ctypes.c_int64),
        ("sight", SightParts),
        ("latents", ctypes.POINTER(LatentParts)),
        ("state", ctypes.POINTER(StateParts)),
    ]


class MLPParts(ctypes.Structure):
    """The C++ `Mlp`."""

    _fields_ = [("gate_up", LinearParts), ("down", LinearParts)]


_COUNTS = (
    "num_experts",
    "num_chosen",
    "count",
    "num_groups",
    "num_chosen_groups",
    "is_sigmoid",
    "is_normalised",
    "scales_inputs",
)


class ExpertParts(ctypes.Structure):
    """The C++ `Experts`."""

    _fields_ = [
        ("gate", LinearParts),
        *((name, ctypes.c_void_p) for name in ("norm", "gate_norm", "weights")),
        *((name, LinearParts) for name in ("before", "behind")),
        ("score_bias", ctypes.c_void_p),
        ("experts", ctypes.POINTER(MLPParts)),
        ("shared", ctypes.POINTER(MLPParts)),
        ("shared_gate", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double) for name in ("scale", "limit", "alpha")),
        *((name, ctypes.c_void_p) for name in ("taken", "place", "copies", "turn")),
    ]


class OwnInputParts(ctypes.Structure):
    """The C++ `OwnInput`."""

    _fields_ = [("gate", LinearParts), ("projection", LinearParts), ("norm", ctypes.c_void_p)]


class LayerInputParts(ctypes.Structure):
    """The C++ `LayerInputs`."""

    _fields_ = [
        ("made", LinearParts),
        *((name, ctypes.c_void_p) for name in ("norm", "table")),
        *((name, ctypes.c_int64) for name in ("size", "first", "num_own", "first_token", "num_tokens")),
        *((name, ctypes.c_double) for name in ("made_factor", "table_factor")),
    ]


class LayerParts(ctypes.Structure):
    """The C++ `Layer`."""

    _fields_ = [
        ("input_norm", ctypes.c_void_p),
        ("mixed_norm", ctypes.c_void_p),
        ("attention", AttentionParts),
        ("mlp_norm", ctypes.c_void_p),
        ("output_norm", ctypes.c_void_p),
        ("mlp", MLPParts),
        *((name, ctypes.c_int64) for name in ("is_local", "is_fed_first")),
        ("experts", ctypes.POINTER(ExpertParts)),
        *((name, ctypes.c_void_p) for name in ("mlp_behind", "experts_behind")),
        ("own_input", OwnInputParts),
        ("factor", ctypes.c_double),
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("head_step", "value_step")),
    ]


class GrowthParts(ctypes.Structure):
    """The C++ `QueryGrowth`."""

    _fields_ = [("beta", ctypes.c_double), ("len", ctypes.c_int64), ("shift", ctypes.c_int64)]


class HeadParts(ctypes.Structure):
    """The C++ `Heads`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_qo", "num_kv", "dim", "rotary_dim", "are_latents")),
        *((name, ctypes.c_double) for name in ("rope_factor", "query_factor")),
        ("growth", GrowthParts),
        ("inv_freq", ctypes.c_void_p),
    ]


SumOverRanks = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


class Model(ctypes.Structure):
    """The C++ `Model`. Whoever has pages fills in the layers' and their numbers."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_layers", "hidden_size", "intermediate_size", "vocab_size")),
        ("heads", HeadParts * 2),
        *((name, ctypes.c_int64) for name in ("page_bytes", "block_size", "has_int8_pages")),
        *((name, ctypes.c_int64) for name in ("has_neighbours", "norms_turned", "has_gates")),
        *((name, ctypes.c_int64) for name in ("activation", "is_gated", "takes_mean_off")),
        *((name, ctypes.c_double) for name in ("norm_eps", "norm_offset")),
        *((name, ctypes.c_double) for name in ("embedding_factor", "mixed_factor", "fed_factor")),
        *((name, ctypes.c_double) for name in ("gate_factor", "score_cap")),
        *((name, ctypes.c_void_p) for name in ("embedding", "final_norm")),
        ("inputs", ctypes.POINTER(LayerInputParts)),
        ("head", Tiles),
        ("layers", ctypes.POINTER(LayerParts)),
        ("sum_over_ranks", SumOverRanks),
        *((name, ctypes.c_int64) for name in ("num_ranks", "first_token", "num_tokens", "adapter_rank")),
        ("state_pages", ctypes.c_void_p),
    ]


class Draw(ctypes.Structure):
    """`Draw` of native/sampling/draws.hpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("allowed", ctypes.c_void_p),
        ("uniforms", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("top_p", ctypes.c_double),
        ("temperature", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("count", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
    )


class Report(ctypes.Structure):
    """`Report` of native/sampling/draws.hpp."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("best", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("count", ctypes.c_int32),
        ("token", ctypes.c_int32),
    )
