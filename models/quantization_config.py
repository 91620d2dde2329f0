"""The `quantization_config` of a config.json, as each tool writes it. What cannot be read is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from ..common.errors import ConfigError
from .families.module_names import full_name
from .parts.config_fields import ConfigFields
from .quantization import Quantization, Rule
from .storage import GGUF_KINDS, Storage

MODELOPT_FILE = "hf_quant_config.json"  # what NVIDIA's Model Optimizer writes, and nothing to config.json at first

_HEAD = Rule("lm_head", None)
_MAX_REPEATS = 4  # of an expression: with each more the time it may take grows by the length of a module's name


def read_quantization(config: ConfigFields) -> Quantization | None:
    """Return what config.json says of its matrices; None: they are plain. Raises ConfigError."""
    fields = config.mapping("quantization_config")
    if fields is None:
        return None
    method = fields.raw.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise config.refuse("quantization_config", f"of its quant_method, these are read: {', '.join(_READERS)}")
    found = _READERS[method](fields)
    is_nested = config.has("text_config")
    rules = [Rule(full_name(rule.target), rule.storage, is_nested=is_nested) for rule in found.rules]
    return replace(found, rules=tuple(rules))


def with_modelopt(config: Mapping[str, object], beside: Mapping[str, object]) -> dict[str, object]:
    """Return config.json with what the file of Model Optimizer `beside` it says, unless it says something itself."""
    told = beside.get("quantization")
    if config.get("quantization_config") is not None or not isinstance(told, dict):
        return dict(config)
    return {**config, "quantization_config": {"quant_method": "modelopt", **told}}


def _gptq(fields: ConfigFields) -> Quantization:
    kind = _choice(fields, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    _choice(fields, "pack_dtype", "int32", ("int32",))
    symmetric = fields.flag("sym", default=True)
    storage = Storage(
        layout="gptq",
        bits=_bits(fields, "bits"),
        group_size=_group_size(fields),
        symmetric=symmetric,
        one_less=kind == "gptq",
    )
    rules = [] if fields.flag("lm_head", default=False) else [_HEAD]
    if (dynamic := fields.mapping("dynamic")) is not None:
        if any(not pattern.startswith("-:") for pattern in dynamic.raw):
            raise fields.refuse("dynamic", "of its rules for single modules only exclusions (-:) are supported")
        rules += [_rule(fields, f"re:{pattern[2:]}", None) for pattern in dynamic.raw]
    targets = list(_flat(fields.raw.get("modules_in_block_to_quantize"))) or ["Linear"]
    return _named(fields, storage, [*rules, *(_rule(fields, target, storage) for target in targets)])


def _awq(fields: ConfigFields) -> Quantization:
    _choice(fields, "version", "gemm", ("gemm", "GEMM"))
    if not fields.flag("zero_point", default=True):
        raise fields.refuse("zero_point", "only AWQ with zero points is supported")
    if (bits := _bits(fields, "bits")) != 4:
        raise fields.refuse("bits", "only AWQ with 4 bits is supported")
    storage = Storage(layout="awq", bits=bits, group_size=_group_size(fields), symmetric=False)
    rules = [_HEAD, *_excluded(fields, "modules_to_not_convert"), Rule("Linear", storage)]
    return _named(fields, storage, rules)


def _fp8(fields: ConfigFields) -> Quantization:
    _choice(fields, "fmt", "e4m3", ("e4m3",))
    block = fields.raw.get("weight_block_size")
    # Transformers writes the key with or without blocks, and names scales alike; other tools write none.
    scale_name = "weight_scale_inv" if "weight_block_size" in fields.raw else "weight_scale"
    storage = Storage(layout="float8", sharing="tensor", scale_name=scale_name)
    if block is not None:
        storage = Storage(layout="float8", sharing="block", block=_block(fields, block), scale_name=scale_name)
    excluded = [*_excluded(fields, "modules_to_not_convert"), *_excluded(fields, "ignored_layers")]
    return _named(fields, storage, [_HEAD, *excluded, Rule("Linear", storage)])


def _modelopt(fields: ConfigFields) -> Quantization:
    kind = _choice(fields, "quant_algo", "", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"))
    storage = Storage(layout="float8", sharing="tensor" if kind == "FP8" else "group")
    patterns = [*_flat(fields.raw.get("exclude_modules")), *_flat(fields.raw.get("ignore"))]
    excluded = [_rule(fields, _with_wildcards(pattern), None) for pattern in patterns]
    return _named(fields, storage, [*excluded, Rule("Linear", storage)])


def _with_wildcards(pattern: str) -> str:
    """Return the target of a module's name in which a star stands for anything."""
    return f"re:{re.escape(pattern).replace(re.escape('*'), '.*')}" if "*" in pattern else pattern


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
        widened_experts=tuple(_flat(fields.raw.get("widened_experts"))),
    )


# --- compressed-tensors ---------------------------------------------------------------------------------------------

_FORMATS: dict[str, Literal["integers", "packed", "float8"]] = {
    "int-quantized": "integers",
    "naive-quantized": "integers",
    "pack-quantized": "packed",
    "float-quantized": "float8",
}


def _compressed_tensors(fields: ConfigFields) -> Quantization:
    for name in ("transform_config", "sparsity_config"):
        part = fields.mapping(name)
        if part is not None and part.raw.get("format", name if part.raw else "dense") != "dense":
            raise fields.refuse(name, "is not supported")
    groups = fields.mapping("config_groups")
    rules = _excluded(fields, "ignore")
    storage = None
    for name in groups.raw if groups is not None else ():
        group = groups.mapping(name) if groups is not None else None
        if group is None or (weights := group.mapping("weights")) is None:
            raise fields.refuse("config_groups", f"{name} says nothing of weights")
        layout_name = group.raw.get("format") or fields.raw.get("format")
        if layout_name not in _FORMATS:
            raise fields.refuse(
                "format", f"of {name}: {layout_name!r} is not supported; these are: {', '.join(_FORMATS)}"
            )
        storage = _compressed(weights, _FORMATS[str(layout_name)])
        targets = list(_flat(group.raw.get("targets")))
        if unknown := [target for target in targets if target != "Linear" and ":" not in target and "." not in target]:
            raise group.refuse("targets", f"{unknown[0]} is not supported; Linear, names and re: are")
        rules += [_rule(fields, target, storage) for target in targets]
    if storage is None:
        raise fields.refuse("config_groups", "names no group")
    return _named(fields, storage, rules)


def _compressed(weights: ConfigFields, layout: Literal["integers", "packed", "float8"]) -> Storage:
    kind = _choice(weights, "type", "int", ("int", "float"))
    strategy = _choice(weights, "strategy", "channel", ("tensor", "channel", "group", "block"))
    bits = _bits(weights, "num_bits")
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
        block = _block(weights, weights.raw.get("block_structure"))
        return Storage(layout=layout, sharing="block", block=block)
    return Storage(
        layout=layout,
        bits=bits,
        group_size=weights.count("group_size") if strategy == "group" else 0,
        symmetric=symmetric,
        sharing="tensor" if strategy == "tensor" else "group",
    )


# --- fields ---------------------------------------------------------------------------------------------------------


def _named(fields: ConfigFields, storage: Storage, rules: list[Rule]) -> Quantization:
    method = str(fields.raw["quant_method"])
    what = "fp8" if storage.layout == "float8" else f"int{storage.bits}"
    size = f" in groups of {storage.group_size}" if storage.group_size else ""
    name = what if what == method else f"{method} {what}{size}"
    return Quantization(name=name, method=method, rules=tuple(rules))


def _choice(fields: ConfigFields, key: str, default: str, known: tuple[str, ...]) -> str:
    value = fields.raw.get(key)
    value = default if value is None else value
    if value not in known:
        raise fields.refuse(key, f"is not supported; these are: {', '.join(known)}")
    return str(value)


def _bits(fields: ConfigFields, key: str) -> int:
    if (bits := fields.count(key)) not in (4, 8):
        raise fields.refuse(key, "4 and 8 bits are supported")
    return bits


def _group_size(fields: ConfigFields) -> int:
    return 0 if fields.raw.get("group_size") == -1 else fields.count("group_size")


def _block(fields: ConfigFields, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ConfigError(f"{fields.path}: quantization_config: {value!r} is no block: two whole numbers above 0")
    return (value[0], value[1])


def _excluded(fields: ConfigFields, key: str) -> list[Rule]:
    return [_rule(fields, module, None) for module in _flat(fields.raw.get(key))]


def _rule(fields: ConfigFields, target: str, storage: Storage | None) -> Rule:
    """Make a rule. An expression is refused that cannot be read, or could take for ever: with repeats in a repeat."""
    if target.startswith("re:"):
        repeats = re.findall(r"(?<!\\)[*+{]", target)
        try:
            re.compile(target[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise ConfigError(f"{fields.path}: quantization_config: {target!r} is no expression: {error}") from error
        if len(repeats) > _MAX_REPEATS or re.search(r"\)[*+{]", target):
            raise ConfigError(f"{fields.path}: quantization_config: {target!r} is too intricate an expression")
    return Rule(target, storage)


def _flat(value: object) -> Iterator[str]:
    """Yield the texts of a list, or of lists in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item)


_READERS: dict[str, Callable[[ConfigFields], Quantization]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "gguf": _gguf,
    "gptq": _gptq,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
