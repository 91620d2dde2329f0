"""The `quantization_config` of a config.json, as each tool writes it. What cannot be read is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..common.errors import ConfigError
from .families.module_names import full_name
from .parts.config_fields import ConfigFields
from .quantization import Quantization, Rule
from .quantization_fields import (
    bits_of,
    block_of,
    choice,
    choice_of_any,
    excluded_by,
    flat,
    group_size_of,
    is_class,
    named,
    order_of,
    rule_of,
)
from .storage import FLOAT4_KINDS, GGUF_KINDS, Layout, Storage

MODELOPT_FILE = "hf_quant_config.json"  # what NVIDIA's Model Optimizer writes, and nothing to config.json at first

_KEYS = ("quantization_config", "compression_config")  # the second by compressed-tensors at first
_MLX_KEY = "quantization"  # a word that other files may have for something else
_HEAD = Rule("lm_head", None)


def read_quantization(config: ConfigFields) -> Quantization | None:
    """Return what config.json says of its matrices; None: they are plain. Raises ConfigError."""
    key = config.told(_KEYS)
    if not config.has(key) and _is_mlx(config.raw.get(_MLX_KEY)):
        key = _MLX_KEY
    fields = config.mapping(key)
    if fields is None:
        return None
    method = _method_of(fields)
    if not isinstance(method, str) or method not in _READERS:
        raise ConfigError(
            f"{config.path}: {key}: quant_method {method!r} is not supported; these are: {', '.join(_READERS)}; "
            "serve the model that was quantized, with --quantization int8, int4 or fp8 where it is to take less"
        )
    if (found := _READERS[method](fields)) is None:
        return None
    is_nested = config.has("text_config")
    rules = [Rule(full_name(rule.target), rule.storage, is_nested=is_nested) for rule in found.rules]
    return replace(found, rules=tuple(rules))


def _method_of(fields: ConfigFields) -> object:
    """Return the tool that quantized a checkpoint: some are known by words of theirs alone."""
    if fields.has("quant_method"):
        return fields.raw["quant_method"]
    if fields.has("load_in_4bit") or fields.has("load_in_8bit"):
        return "bitsandbytes"
    return "mlx" if _is_mlx(fields.raw) else None


def _is_mlx(value: object) -> bool:
    return isinstance(value, Mapping) and "bits" in value and "group_size" in value


def with_modelopt(config: Mapping[str, object], beside: Mapping[str, object]) -> dict[str, object]:
    """Return config.json with what the file of Model Optimizer `beside` it says, unless it says something itself."""
    told = beside.get("quantization")
    if any(config.get(key) is not None for key in _KEYS) or not isinstance(told, dict):
        return dict(config)
    return {**config, "quantization_config": {"quant_method": "modelopt", **told}}


def _gptq(fields: ConfigFields) -> Quantization:
    kind = choice_of_any(fields, ("checkpoint_format", "format"), "gptq", ("gptq", "gptq_v2"))
    choice(fields, "pack_dtype", "int32", ("int32",))
    if fields.flag("is_marlin_format", default=False):  # as it was told before there was a checkpoint_format
        raise fields.refuse("is_marlin_format", "is not supported; take a checkpoint of GPTQ's own format")
    symmetric = fields.flag("sym", default=True)
    storage = Storage(
        layout="gptq",
        bits=bits_of(fields, "bits"),
        group_size=group_size_of(fields),
        symmetric=symmetric,
        one_less=kind == "gptq",
        # With groups that are told before inputs are ordered, each is of neighbours again.
        is_ordered=fields.flag("desc_act", default=False) and not fields.flag("static_groups", default=False),
    )
    rules = [] if fields.flag("lm_head", default=False) else [_HEAD]
    if (dynamic := fields.mapping("dynamic")) is not None:
        if any(not pattern.startswith("-:") for pattern in dynamic.raw):
            raise fields.refuse("dynamic", "of its rules for single modules only exclusions (-:) are supported")
        rules += [rule_of(fields, f"re:{pattern[2:]}", None) for pattern in dynamic.raw]
    targets = list(flat(fields.raw.get("modules_in_block_to_quantize"))) or ["Linear"]
    return named(fields, [*rules, *(rule_of(fields, target, storage) for target in targets)])


def _awq(fields: ConfigFields) -> Quantization:
    choice_of_any(fields, ("version", "format"), "gemm", ("gemm",))
    if not fields.flag("zero_point", default=True):
        raise fields.refuse("zero_point", "only AWQ with zero points is supported")
    if (bits := bits_of(fields, "bits")) != 4:
        raise fields.refuse("bits", "only AWQ with 4 bits is supported")
    storage = Storage(layout="awq", bits=bits, group_size=group_size_of(fields), symmetric=False)
    rules = [_HEAD, *excluded_by(fields, "modules_to_not_convert"), Rule("Linear", storage)]
    return named(fields, rules)


def _fp8(fields: ConfigFields) -> Quantization:
    choice(fields, "fmt", "e4m3", ("e4m3", "float8_e4m3fn", "float8_e4m3"))  # one type; MiniMax-M2 has the longer name
    block = fields.raw.get("weight_block_size")
    # Transformers writes the key with or without blocks, and names scales alike; other tools write none.
    scale_name = "weight_scale_inv" if "weight_block_size" in fields.raw else "weight_scale"
    storage = Storage(layout="float8", sharing="tensor", scale_name=scale_name)
    if block is not None:
        storage = Storage(layout="float8", sharing="block", block=block_of(fields, block), scale_name=scale_name)
    excluded = [*excluded_by(fields, "modules_to_not_convert"), *excluded_by(fields, "ignored_layers")]
    return named(fields, [_HEAD, *excluded, Rule("Linear", storage)])


_MODELOPT_KINDS = {
    "FP8": Storage(layout="float8", sharing="tensor"),
    "FP8_PER_CHANNEL_PER_TOKEN": Storage(layout="float8"),
    "NVFP4": Storage(layout="float4", bits=4, kind="modelopt"),
    "W4A16_NVFP4": Storage(layout="float4", bits=4, kind="modelopt"),
}


def _modelopt(fields: ConfigFields) -> Quantization:
    if fields.raw.get("quant_algo") == "MIXED_PRECISION":
        return _mixed_modelopt(fields)
    storage = _modelopt_storage(fields)
    excluded = [*excluded_by(fields, "exclude_modules"), *excluded_by(fields, "ignore")]
    return named(fields, [*excluded, Rule("Linear", storage)])


def _mixed_modelopt(fields: ConfigFields) -> Quantization:
    """Read the algorithm of each module by its name; all others are plain."""
    layers = fields.mapping("quantized_layers")
    if layers is None or not layers.raw:
        raise fields.refuse("quantized_layers", "names no module")
    found = [(name, layers.mapping(name)) for name in layers.raw]
    rules = [Rule(name, _modelopt_storage(own)) for name, own in found if own is not None]
    return named(fields, rules)


def _modelopt_storage(fields: ConfigFields) -> Storage:
    storage = _MODELOPT_KINDS[choice(fields, "quant_algo", "", tuple(_MODELOPT_KINDS))]
    if storage.layout == "float4":
        _check_group_size(fields, storage)
    return storage


def _check_group_size(fields: ConfigFields, storage: Storage) -> None:
    size = FLOAT4_KINDS[storage.kind].group_size
    if fields.raw.get("group_size", size) != size:
        raise fields.refuse("group_size", f"of these floats of 4 bits {size} is read")


def _mxfp4(_: ConfigFields) -> Quantization:
    """Read it of gpt-oss, whose experts alone are in this format, by the names of their tensors."""
    return Quantization(name="mxfp4", method="mxfp4", has_mxfp4_experts=True)


def _gguf(fields: ConfigFields) -> Quantization:
    """Read what `gguf/convert.py` wrote: the kind of each module's blocks."""
    modules: dict[str, Storage] = {}
    kinds = fields.mapping("modules")
    for module, kind in (kinds.raw if kinds is not None else {}).items():
        if kind not in GGUF_KINDS:
            raise fields.refuse("modules", f"{module} is {kind!r}; these kinds are read: {', '.join(GGUF_KINDS)}")
        modules[module] = Storage(layout="gguf", kind=str(kind))
    has_mxfp4 = fields.flag("has_mxfp4_experts", default=False)
    names = {storage.kind for storage in modules.values()} | ({"MXFP4"} if has_mxfp4 else set())
    return Quantization(
        name="gguf " + "+".join(sorted(names)) if names else "gguf",
        method="gguf",
        modules=modules,
        has_mxfp4_experts=has_mxfp4,
        widened_experts=tuple(flat(fields.raw.get("widened_experts"))),
    )


# --- compressed-tensors ---------------------------------------------------------------------------------------------

_FORMATS: dict[str, Layout] = {
    "int-quantized": "integers",
    "naive-quantized": "integers",
    "pack-quantized": "packed",
    "float-quantized": "float8",
    "nvfp4-pack-quantized": "float4",
    "mxfp4-pack-quantized": "float4",
}
_ACT_ORDERS = ("group", "dynamic", True)  # names of one thing; "weight" and "static": groups are of neighbours


def _compressed_tensors(fields: ConfigFields) -> Quantization | None:
    """Read the groups of modules; None: there are none, as where the cache alone was calibrated."""
    for name in ("transform_config", "sparsity_config"):
        part = fields.mapping(name)
        if part is not None and part.raw.get("format", name if part.raw else "dense") != "dense":
            raise fields.refuse(name, "is not supported")
    groups = fields.mapping("config_groups")
    rules: list[Rule] = []
    for name in groups.raw if groups is not None else ():
        group = groups.mapping(name) if groups is not None else None
        if group is None or (weights := group.mapping("weights")) is None:
            raise fields.refuse("config_groups", f"{name} says nothing of weights")
        layout_name = group.raw.get("format") or fields.raw.get("format")
        if not isinstance(layout_name, str) or layout_name not in _FORMATS:
            raise fields.refuse(
                "format", f"of {name}: {layout_name!r} is not supported; these are: {', '.join(_FORMATS)}"
            )
        layout = _FORMATS[layout_name]
        if layout == "float4":
            storage = _compressed_float4(weights, layout_name.partition("-")[0])
        else:
            storage = _compressed(weights, layout)
        targets = list(flat(group.raw.get("targets")))
        if unknown := [target for target in targets if is_class(target) and target != "Linear"]:
            raise group.refuse("targets", f"{unknown[0]} is not supported; Linear, names and re: are")
        rules += [rule_of(fields, target, storage) for target in targets]
    if not rules and groups is not None and fields.raw.get("format") == "dense":
        return None
    if not rules:
        raise fields.refuse("config_groups", "names no group")
    return named(fields, [*excluded_by(fields, "ignore"), *sorted(rules, key=lambda rule: order_of(rule.target))])


def _compressed_float4(weights: ConfigFields, kind: str) -> Storage:
    storage = Storage(layout="float4", bits=4, kind=kind)
    choice(weights, "type", "float", ("float",))
    if weights.count("num_bits") != storage.bits or not weights.flag("symmetric", default=True):
        raise weights.refuse("num_bits", f"of {kind} 4 bits, symmetrical, are read")
    _check_group_size(weights, storage)
    return storage


def _compressed(weights: ConfigFields, layout: Layout) -> Storage:
    kind = choice(weights, "type", "int", ("int", "float"))
    strategy = choice(weights, "strategy", "channel", ("tensor", "channel", "group", "block"))
    bits = bits_of(weights, "num_bits")
    if kind == "float":
        layout = "float8"  # naive-quantized is either
    if (kind == "float") != (layout == "float8") or (layout != "packed" and bits != 8):
        raise weights.refuse("num_bits", f"{kind} of {bits} bits is not supported as {layout}")
    symmetric = weights.flag("symmetric", default=True)
    if layout == "float8" and (strategy == "group" or not symmetric):
        raise weights.refuse("strategy", "is not supported of FP8; tensor, channel and block are")
    if strategy == "block":
        if layout != "float8":
            raise weights.refuse("strategy", "is supported of FP8 alone")
        block = block_of(weights, weights.raw.get("block_structure"))
        return Storage(layout=layout, sharing="block", block=block)
    is_ordered = weights.raw.get("actorder") in _ACT_ORDERS
    if is_ordered and layout != "packed":
        raise weights.refuse("actorder", "is read of pack-quantized alone")
    return Storage(
        layout=layout,
        bits=bits,
        is_ordered=is_ordered,
        group_size=weights.count("group_size") if strategy == "group" else 0,
        symmetric=symmetric,
        sharing="tensor" if strategy == "tensor" else "group",
    )


_READERS: dict[str, Callable[[ConfigFields], Quantization | None]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gguf": _gguf,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
