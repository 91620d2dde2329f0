"""Quantized checkpoints written number by number as their formats are documented, and the plain ones that they mean.

    write_pair(tmp_path, "gptq 4 act-order")  ->  (a checkpoint in that format, one in float32 with the same weights)

Nothing here is shared with the product: packing is plain NumPy, GGUF's blocks are read by the package `gguf`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file

from kvferry.models.token_bytes import _BYTE_ALPHABET

from .checkpoints import SPECIAL_TOKENS, Family, Shape, random_tensors, write_checkpoint

if TYPE_CHECKING:
    import gguf

Array = np.ndarray
# A matrix [out, in]: its tensors by their last names, and the plain numbers that they stand for.
Matrix = tuple[dict[str, Array | torch.Tensor], Array]

SHAPE = Shape(hidden_size=256, head_dim=64, num_qo_heads=4, num_kv_heads=2, intermediate_size=512, vocab_size=260)
GROUP = 32


@dataclass(frozen=True)
class Format:
    config: dict[str, object]  # config.json's quantization_config
    make: Callable[[np.random.Generator, int, int], Matrix]
    plain: tuple[str, ...] = ()  # parts of the names of modules that the config excludes


def _pack(numbers: Array, bits: int, axis: int) -> Array:
    """Whole numbers from 0 on -> int32 words along an axis, the first number in the lowest bits."""
    numbers = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    per_word = 32 // bits
    numbers = np.pad(numbers, [(0, 0), (0, -numbers.shape[-1] % per_word)])
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), np.uint32)
    for place in range(per_word):
        words |= numbers[:, place::per_word] << np.uint32(bits * place)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def _step(bits: int, num_inputs: int) -> float:
    """A scale by which random numbers of so many bits have the size of a linear's weights."""
    return float(3.5 / 2**bits / num_inputs**0.5)


def _scales(rng: np.random.Generator, shape: tuple[int, int], step: float) -> Array:
    return (rng.uniform(0.5, 1.5, shape) * step).astype(np.float16)


def _gptq(
    bits: int, *, symmetric: bool = True, act_order: bool = False, version: str = "gptq", group: int = GROUP
) -> Format:
    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        each = size_in if group == -1 else group
        groups = np.arange(size_in) // each
        if act_order:
            groups = np.random.default_rng(size_in).permutation(groups)  # fused parts have one order
        numbers = rng.integers(0, 2**bits, (size_in, size_out))
        low = 0 if version == "gptq_v2" else 1
        zeros = rng.integers(low, 2**bits, (size_in // each, size_out))
        zeros = np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
        scales = _scales(rng, zeros.shape, _step(bits, size_in))
        weight = (numbers - zeros[groups]) * scales.astype(np.float32)[groups]
        tensors: dict[str, Array | torch.Tensor] = {
            "qweight": _pack(numbers, bits, 0),
            "qzeros": _pack(zeros - (version == "gptq"), bits, 1),
            "scales": scales,
            "g_idx": groups.astype(np.int32),
        }
        return tensors, weight.T

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    return Format(config | {"checkpoint_format": version}, make)


def _awq() -> Format:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(numbers: Array) -> Array:
        return _pack(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(numbers.shape), 4, 1)

    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        numbers = rng.integers(0, 16, (size_in, size_out))
        zeros = rng.integers(0, 16, (size_in // GROUP, size_out))
        scales = _scales(rng, zeros.shape, _step(4, size_in))
        weight = (numbers - zeros.repeat(GROUP, 0)) * scales.astype(np.float32).repeat(GROUP, 0)
        return {"qweight": interleaved(numbers), "qzeros": interleaved(zeros), "scales": scales}, weight.T

    config = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    return Format(config | {"modules_to_not_convert": ["layers.1.mlp.down_proj"]}, make, ("layers.1.mlp.down_proj",))


def _compressed(layout: str, weights: dict[str, object], make: Callable[..., Matrix], ignore: list[str]) -> Format:
    config: dict[str, object] = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }
    return Format(config, make, tuple(name.removeprefix("re:.*") for name in ignore))


def _packed(bits: int, *, symmetric: bool, ignore: list[str]) -> Format:
    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        numbers = rng.integers(0, 2**bits, (size_out, size_in))
        middle = 2 ** (bits - 1)
        zeros = rng.integers(0, 2**bits, (size_out, size_in // GROUP))
        zeros = np.full_like(zeros, middle) if symmetric else zeros
        scales = _scales(rng, zeros.shape, _step(bits, size_in))
        weight = (numbers - zeros.repeat(GROUP, 1)) * scales.astype(np.float32).repeat(GROUP, 1)
        tensors: dict[str, Array | torch.Tensor] = {
            "weight_packed": _pack(numbers, bits, 1),
            "weight_scale": scales,
            "weight_shape": np.array([size_out, size_in]),
        }
        return tensors if symmetric else tensors | {"weight_zero_point": _pack(zeros, bits, 0)}, weight

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return _compressed("pack-quantized", weights, make, ignore)


def _integers(strategy: str, *, symmetric: bool = True) -> Format:
    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        numbers = rng.integers(-128, 128, (size_out, size_in)).astype(np.int8)
        shape = {"tensor": (1, 1), "channel": (size_out, 1), "group": (size_out, size_in // GROUP)}[strategy]
        zeros = np.zeros(shape, np.int8) if symmetric else rng.integers(-128, 128, shape).astype(np.int8)
        scales = _scales(rng, shape, _step(8, size_in)).astype(np.float32)
        repeats = size_in // shape[1]
        weight = (numbers - zeros.astype(np.float32).repeat(repeats, 1)) * scales.repeat(repeats, 1)
        tensors: dict[str, Array | torch.Tensor] = {
            "weight": numbers,
            "weight_scale": scales.reshape(1) if strategy == "tensor" else scales,
        }
        return tensors if symmetric else tensors | {"weight_zero_point": zeros}, weight

    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": strategy}
    weights |= {"group_size": GROUP} if strategy == "group" else {}
    return _compressed("int-quantized", weights, make, [])


def _float8(strategy: str, name: str = "weight_scale") -> Callable[[np.random.Generator, int, int], Matrix]:
    block = 128

    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        weight = torch.from_numpy(rng.standard_normal((size_out, size_in)) * 20).to(torch.float8_e4m3fn)
        shape = {"tensor": (1, 1), "channel": (size_out, 1), "block": (-(-size_out // block), -(-size_in // block))}[
            strategy
        ]
        scales = (rng.uniform(0.5, 1.5, shape) / 20 / size_in**0.5).astype(np.float32)
        wide = {"tensor": scales, "channel": scales, "block": scales.repeat(block, 0).repeat(block, 1)}[strategy]
        meant = weight.float().numpy() * (wide[:size_out, :size_in] if strategy == "block" else wide)
        return {"weight": weight, name: scales.reshape(1) if strategy == "tensor" else scales}, meant

    return make


def _float8_of_transformers(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
    """One scale for all, as Ministral 3's checkpoints have it, and one for inputs, which nobody uses here."""
    tensors, meant = _float8("tensor", "weight_scale_inv")(rng, size_out, size_in)
    scalar = torch.from_numpy(np.asarray(tensors["weight_scale_inv"])).reshape(())
    return tensors | {"weight_scale_inv": scalar, "activation_scale": torch.tensor(0.5)}, meant


def _compressed_float8(strategy: str) -> Format:
    weights: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    weights |= {"block_structure": [128, 128]} if strategy == "block" else {}
    return _compressed("float-quantized", weights, _float8(strategy), [])


def _modelopt_float8(strategy: str) -> Callable[[np.random.Generator, int, int], Matrix]:
    """As Model Optimizer writes it: scales have no dimension, or one."""

    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        tensors, meant = _float8(strategy)(rng, size_out, size_in)
        scale = torch.from_numpy(np.asarray(tensors["weight_scale"]))
        return tensors | {"weight_scale": scale.squeeze(), "input_scale": torch.tensor(0.5)}, meant

    return make


def _modelopt(kind: str, make: Callable[..., Matrix], **fields: object) -> Format:
    """As Model Optimizer writes it: stars stand for anything."""
    config: dict[str, object] = {"quant_method": "modelopt", "quant_algo": kind, "kv_cache_quant_algo": None}
    config["exclude_modules"] = ["lm_head", "model.layers.0.mlp*", "*1*.o_proj"]
    return Format(config | fields, make, ("layers.0.mlp", "layers.1.self_attn.o_proj"))


_SIZES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of floats with an exponent of 2 and a binary place


def _float4(kind: str) -> Callable[[np.random.Generator, int, int], Matrix]:
    group = 32 if kind == "mxfp4" else 16

    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        numbers = rng.integers(0, 16, (size_out, size_in)).astype(np.uint8)
        packed = numbers[:, ::2] | (numbers[:, 1::2] << 4)
        values = _SIZES[numbers & 7] * np.where(numbers & 8, -1, 1).astype(np.float32)
        shape = (size_out, size_in // group)
        if kind == "mxfp4":
            powers = rng.integers(-2, 2, shape) - round(np.log2(3 * size_in**0.5))
            tensors: dict[str, Array | torch.Tensor] = {"weight_packed": packed}
            tensors["weight_scale"] = (powers + 127).astype(np.uint8)
            return tensors, values * np.exp2(powers.astype(np.float32)).repeat(group, 1)
        scales = torch.from_numpy(rng.uniform(100, 448, shape)).to(torch.float8_e4m3fn)
        whole = np.float32(1 / (800 * size_in**0.5))
        meant = values * (scales.float().numpy() * whole).repeat(group, 1)
        if kind == "nvfp4":
            whole_scale = {"weight_global_scale": np.array([1 / whole]), "input_global_scale": np.array([3.0])}
            return {"weight_packed": packed, "weight_scale": scales, **whole_scale}, meant
        whole_scale = {"weight_scale_2": np.array(whole), "input_scale": np.array(3.0)}
        return {"weight": packed, "weight_scale": scales, **whole_scale}, meant

    return make


def _compressed_float4(kind: str) -> Format:
    weights: dict[str, object] = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group"}
    weights["group_size"] = 32 if kind == "mxfp4" else 16
    return _compressed(f"{kind}-pack-quantized", weights, _float4(kind), ["re:.*layers.0.mlp.up_proj"])


def _mixed_modelopt() -> Format:
    """The queries' matrix in 8-bit floats, so that it is fused with others, those of feed-forwards in 4-bit ones."""
    eight, four = _modelopt_float8("tensor"), _float4("modelopt")

    def make(rng: np.random.Generator, size_out: int, size_in: int) -> Matrix:
        return (four if SHAPE.intermediate_size in (size_out, size_in) else eight)(rng, size_out, size_in)

    layers: dict[str, object] = {}
    for layer in range(SHAPE.num_layers):
        names = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        for name in names:
            kind = {"quant_algo": "FP8"} if "attn" in name else {"quant_algo": "NVFP4", "group_size": 16}
            layers[f"model.layers.{layer}.{name}"] = kind
    return Format({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, make)


FORMATS = {
    "compressed int8 channel": _integers("channel"),
    "compressed int8 tensor": _integers("tensor"),
    "compressed int8 group": _integers("group"),
    "compressed int8 asymmetric": _integers("channel", symmetric=False),
    "compressed int4 packed": _packed(4, symmetric=True, ignore=["re:.*layers.0.mlp.up_proj"]),
    "compressed int4 packed asymmetric": _packed(4, symmetric=False, ignore=["model.layers.1.self_attn.o_proj"]),
    "compressed int8 packed": _packed(8, symmetric=True, ignore=[]),
    "compressed int8 packed asymmetric": _packed(8, symmetric=False, ignore=[]),
    "compressed fp8 tensor": _compressed_float8("tensor"),
    "compressed fp8 channel": _compressed_float8("channel"),
    "compressed fp8 block": _compressed_float8("block"),
    "fp8 tensor": Format({"quant_method": "fp8", "activation_scheme": "static"}, _float8("tensor"), ()),
    "fp8 tensor by transformers": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}, _float8_of_transformers, ()
    ),
    "fp8 block": Format(
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["model.layers.0.mlp.gate_proj"],
        },
        _float8("block", "weight_scale_inv"),
        ("layers.0.mlp.gate_proj",),
    ),
    "modelopt fp8 tensor": _modelopt("FP8", _modelopt_float8("tensor")),
    "modelopt fp8 channel": _modelopt("FP8_PER_CHANNEL_PER_TOKEN", _modelopt_float8("channel")),
    "modelopt nvfp4": _modelopt("NVFP4", _float4("modelopt"), group_size=16),
    "modelopt mixed": _mixed_modelopt(),
    "compressed nvfp4": _compressed_float4("nvfp4"),
    "compressed mxfp4": _compressed_float4("mxfp4"),
    "gptq 4": _gptq(4),
    "gptq 4 act-order": _gptq(4, act_order=True),
    "gptq 4 asymmetric act-order": _gptq(4, symmetric=False, act_order=True),
    "gptq 4 whole rows": _gptq(4, group=-1),
    "gptq 4 v2 asymmetric": _gptq(4, symmetric=False, version="gptq_v2"),
    "gptq 8": _gptq(8),
    "gptq 8 asymmetric": _gptq(8, symmetric=False),
    "awq": _awq(),
}


def write_pair(path: Path, name: str, *, seed: int = 0) -> tuple[Path, Path]:
    """Return a checkpoint in a format, and one in float32 with the same weights."""
    quantized, plain = (write_checkpoint(path / kind, tokenizer=False, shape=SHAPE) for kind in ("quantized", "plain"))
    form = FORMATS[name]
    stored, meant = in_format(form, random_tensors("llama", SHAPE), plain=form.plain, seed=seed)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    put_config(quantized, quantization_config=form.config)
    return quantized, plain


def in_format(
    form: Format, tensors: Mapping[str, torch.Tensor], *, plain: tuple[str, ...] = (), seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a checkpoint's tensors with random projections in a format, and with those that they mean in float32.

    `plain`: parts of the names of modules that stay as they are.
    """
    meant, stored = dict(tensors), dict(tensors)
    rng = np.random.default_rng(seed)
    for key in tensors:
        module = key.removesuffix(".weight")
        if not module.endswith("_proj") or any(part in module for part in plain):
            continue
        parts, weight = form.make(rng, *tensors[key].shape)
        del stored[key]
        stored |= {
            f"{module}.{suffix}": value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
            for suffix, value in parts.items()
        }
        meant[key] = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.float32))
    return stored, meant


def put_config(path: Path, **fields: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


# --- GGUF -------------------------------------------------------------------------------------------------------------

_HALVES = {  # where in a block half-precision numbers stand
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def random_blocks(kind: str, rng: np.random.Generator, size_out: int, size_in: int) -> tuple[Array, Array]:
    """Return rows of blocks, and the numbers that the package `gguf` reads in them."""
    import gguf

    own = gguf.GGMLQuantizationType[kind]
    size, num_bytes = gguf.GGML_QUANT_SIZES[own]
    blocks = rng.integers(0, 256, (size_out * size_in // size, num_bytes), dtype=np.uint8)
    if kind == "MXFP4":  # a block begins with an exponent
        blocks[:, 0] = rng.integers(121, 124, len(blocks), dtype=np.uint8)
        rows = blocks.reshape(size_out, -1)
        return rows, gguf.quants.dequantize(rows, own)
    for place in _HALVES[kind]:
        halves = rng.uniform(-1, 1, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    rows = blocks.reshape(size_out, -1)
    scale = np.abs(gguf.quants.dequantize(rows, own)).std() * size_in**0.5
    for place in _HALVES[kind]:  # brought to the size of a linear's weights
        halves = blocks[:, place : place + 2].copy().view(np.float16) / np.float16(scale)
        blocks[:, place : place + 2] = halves.view(np.uint8).reshape(-1, 2)
    rows = blocks.reshape(size_out, -1)
    return rows, gguf.quants.dequantize(rows, own)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path,
    family: Family,
    kinds: Mapping[str, str],
    *,
    tied: bool = False,
    rules: str = "smollm",
    architecture: str | None = None,
    fields: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    extra: Mapping[str, Array] | None = None,
) -> Path:
    """Write a GGUF file with blocks of `kinds`, by the ends of matrices' names ("": all others), F32 where none is
    named. Returns a checkpoint in float32 with the same weights, beside it. `architecture`: another name than its own.
    """
    import gguf

    shape = replace(SHAPE, tie_embeddings=tied)
    plain = write_checkpoint(path.with_suffix(".plain"), family, tokenizer=False, shape=shape)
    writer = gguf.GGUFWriter(path, architecture or family)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_block_count(shape.num_layers)
    writer.add_head_count(shape.num_qo_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_context_length(shape.max_model_len)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list([*SPECIAL_TOKENS[:-1], "ab", *_BYTE_ALPHABET])
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    fields(writer)
    meant, rng = random_tensors(family, shape), np.random.default_rng(1)
    for key, tensor in list(meant.items()):
        module, _, last = key.rpartition(".")
        kind = next((kinds[end] for end in sorted(kinds, reverse=True) if module.endswith(end)), "F32")
        rows = tensor.float().numpy()
        if tensor.dim() == 2 and kind in _HALVES:
            rows, values = random_blocks(kind, rng, *tensor.shape)
            meant[key] = torch.from_numpy(values)
        heads = {"q_proj": shape.num_qo_heads, "k_proj": shape.num_kv_heads}.get(module.rpartition(".")[2])
        if heads is not None and family == "llama":
            rows = interleaved(rows, heads)
        layer = module.removeprefix("model.layers.").partition(".")
        name = f"blk.{layer[0]}.{_GGUF_NAMES[layer[2]]}" if layer[0].isdigit() else _GGUF_NAMES[module]
        raw = gguf.GGMLQuantizationType[kind] if tensor.dim() == 2 and kind in _HALVES else None
        writer.add_tensor(f"{name}.{last}", np.ascontiguousarray(rows), raw_dtype=raw)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    return plain


def interleaved(rows: Array, num_heads: int) -> Array:
    """Return rows as llama.cpp's converter orders them: of a head's halves in turn."""
    half = len(rows) // num_heads // 2
    order = [head * 2 * half + part * half + i for head in range(num_heads) for i in range(half) for part in range(2)]
    return rows[order]
