"""What llama.cpp's converter makes of tensors that it stores otherwise than as they are, by hand: of layers that keep a
state, and of Granite's pairs in one tensor (`conversion/`: `mamba.py`, `qwen.py`, `granite.py`, `falcon_h1.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .quantized import Array

_LAYER = re.compile(r"(?:model|backbone)\.layers\.(\d+)\.(.+)")
_MAMBA = ("granitehybrid", "nemotron_h", "nemotron_h_moe", "falcon-h1")
_DELTA_NETS = ("qwen3next", "qwen35", "qwen35moe")
_SQUEEZED = {"conv1d.weight": "ssm_conv1d.weight", "conv.conv.weight": "shortconv.conv.weight"}


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file that comes of a checkpoint's."""

    name: str
    rows: list[int] | None = None  # the checkpoint's, in the file's order
    columns: list[int] | None = None
    change: Callable[[Array], Array] | None = None


def file_tensors(key: str, config: dict[str, Any], arch: str) -> list[FileTensor]:
    """Return what becomes of a checkpoint's tensor; nothing: it is stored as it is, under the name that it has."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return [FileTensor(_outer(key), change=_scaled(config, key))] if arch == "falcon-h1" else []
    layer, name = f"blk.{match[1]}", match[2]
    for end, own in _SQUEEZED.items():
        if name.endswith(end):
            rows = _Heads(config).convolved if arch in ("qwen35", "qwen35moe") else None
            return [FileTensor(f"{layer}.{own}", rows, change=lambda values: values.squeeze(1))]
    if arch in _DELTA_NETS:
        return _of_delta_nets(layer, name, _Heads(config), is_grouped=arch == "qwen3next")
    if arch in _MAMBA and (found := _of_mamba(layer, name, config)):
        return found
    if arch == "falcon-h1":
        return _of_falcon(layer, name, config)
    return _of_granite(layer, name, config) if arch.startswith("granite") else []


def _of_mamba(layer: str, name: str, config: dict[str, Any]) -> list[FileTensor]:
    groups: int = config.get("mamba_n_groups") or config["n_groups"]
    changes: dict[str, tuple[str, Callable[[Array], Array]]] = {
        "A_log": ("ssm_a", lambda values: -np.exp(values).reshape(-1, 1)),
        "D": ("ssm_d", lambda values: values.reshape(-1, 1)),
        "dt_bias": ("ssm_dt.bias", lambda values: values),
        "mamba.norm.weight": ("ssm_norm.weight", lambda values: values.reshape(groups, -1)),
        "mixer.norm.weight": ("ssm_norm.weight", lambda values: values.reshape(groups, -1)),
    }
    return [FileTensor(f"{layer}.{own}", change=change) for end, (own, change) in changes.items() if name.endswith(end)]


class _Heads:
    """The heads of delta nets: where a file has the rows of each."""

    def __init__(self, config: dict[str, Any]) -> None:
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        self.keys, self.values, self.key_dim, self.value_dim = (config[f"linear_{name}"] for name in names)
        self.each = self.values // self.keys
        self.in_turns = [key * self.each + each for each in range(self.each) for key in range(self.keys)]

    def value_rows(self, first: int = 0) -> list[int]:
        return [first + head * self.value_dim + i for head in self.in_turns for i in range(self.value_dim)]

    @property
    def convolved(self) -> list[int]:
        return [*range(2 * self.keys * self.key_dim), *self.value_rows(2 * self.keys * self.key_dim)]

    def grouped(self, *parts: int) -> list[int]:
        """Return the rows of some of queries, keys, values and gates, each of all heads."""
        sizes = (self.key_dim, self.key_dim, self.each * self.value_dim, self.each * self.value_dim)
        return [
            head * sum(sizes) + sum(sizes[:part]) + i
            for part in parts
            for head in range(self.keys)
            for i in range(sizes[part])
        ]


def _of_delta_nets(layer: str, name: str, heads: _Heads, *, is_grouped: bool) -> list[FileTensor]:
    turns = None if is_grouped else heads.in_turns
    match name.removeprefix("linear_attn."):
        case "A_log":
            return [FileTensor(f"{layer}.ssm_a", turns, change=lambda values: -np.exp(values))]
        case "dt_bias":
            return [FileTensor(f"{layer}.ssm_dt.bias", turns, change=lambda values: values)]
        case "in_proj_qkvz.weight":
            parts = {"attn_qkv": heads.grouped(0, 1, 2), "attn_gate": heads.grouped(3)}
            return [FileTensor(f"{layer}.{own}.weight", rows) for own, rows in parts.items()]
        case "in_proj_qkv.weight":
            return [FileTensor(f"{layer}.attn_qkv.weight", heads.convolved)]
        case "in_proj_z.weight":
            return [FileTensor(f"{layer}.attn_gate.weight", heads.value_rows())]
        case "in_proj_a.weight" | "in_proj_b.weight" as own:
            return [FileTensor(f"{layer}.ssm_{'alpha' if '_a.' in own else 'beta'}.weight", heads.in_turns)]
        case "out_proj.weight" if not is_grouped:
            return [FileTensor(f"{layer}.ssm_out.weight", columns=heads.value_rows())]
    return []


def _of_granite(layer: str, name: str, config: dict[str, Any]) -> list[FileTensor]:
    if name == "shared_mlp.output_linear.weight" and not config["num_local_experts"]:
        return [FileTensor(f"{layer}.ffn_down.weight")]
    if name != "shared_mlp.input_linear.weight":
        return []
    size, end = config["shared_intermediate_size"], "_shexp" if config["num_local_experts"] else ""
    halves = {"gate": range(size), "up": range(size, 2 * size)}
    return [FileTensor(f"{layer}.ffn_{part}{end}.weight", list(rows)) for part, rows in halves.items()]


_FALCON = {
    "pre_ff_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mamba.in_proj": "ssm_in",
    "mamba.out_proj": "ssm_out",
    "mamba.conv1d": "ssm_conv1d",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def _of_falcon(layer: str, name: str, config: dict[str, Any]) -> list[FileTensor]:
    module, _, suffix = name.rpartition(".")
    return [FileTensor(f"{layer}.{_FALCON[module]}.{suffix}", change=_scaled(config, name))]


def _outer(key: str) -> str:
    names = {"embed_tokens": "token_embd", "final_layernorm": "output_norm", "lm_head": "output"}
    return f"{names[key.removesuffix('.weight').rpartition('.')[2]]}.weight"


def _scaled(config: dict[str, Any], key: str) -> Callable[[Array], Array]:
    """Return what multiplies a tensor of Falcon-H1 by its factors."""
    gate, down = config["mlp_multipliers"]
    inside = config["attention_in_multiplier"]
    factors = {
        "down_proj": down,
        "gate_proj": gate,
        "k_proj": config["key_multiplier"] * inside,
        "q_proj": inside,
        "v_proj": inside,
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "in_proj": config["ssm_in_multiplier"] * _projected(config)[:, None] if "in_proj" in key else 1.0,
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    factor = next((factors[part] for part in key.split(".")[::-1] if part in factors), 1.0)
    return lambda values: np.asarray(values * factor, np.float32)


def _projected(config: dict[str, Any]) -> Array:
    size, keys = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    return np.repeat(config["ssm_multipliers"], (size, size, keys, keys, config["mamba_n_heads"]))
