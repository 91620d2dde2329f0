"""Fields that quantization tools have in common, and what is made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..common.errors import ConfigError
from .parts.config_fields import ConfigFields
from .quantization import Quantization, Rule
from .storage import Storage

_MAX_REPEATS = 4  # of an expression: with each more the time it may take grows by the length of a module's name


def named(fields: ConfigFields, rules: list[Rule]) -> Quantization:
    """Make what rules say. Workers tell forms of weights apart by its name, so all that a checkpoint has are in it."""
    method = str(fields.raw["quant_method"])
    forms = sorted({_form_of(rule.storage) for rule in rules if rule.storage is not None})
    name = method if forms == [method] else f"{method} {'+'.join(forms)}"
    return Quantization(name=name, method=method, rules=tuple(rules))


def _form_of(storage: Storage) -> str:
    return kind_of(storage) + (f" in groups of {storage.group_size}" if storage.group_size else "")


def kind_of(storage: Storage) -> str:
    if storage.layout == "float4":
        return "mxfp4" if storage.kind == "mxfp4" else "nvfp4"
    return "fp8" if storage.layout == "float8" else f"int{storage.bits}"


def choice(fields: ConfigFields, key: str, default: str, known: tuple[str, ...]) -> str:
    value = fields.raw.get(key)
    value = default if value is None else value
    if value not in known:
        raise fields.refuse(key, f"is not supported; these are: {', '.join(known)}")
    return str(value)


def choice_of_any(fields: ConfigFields, keys: tuple[str, ...], default: str, known: tuple[str, ...]) -> str:
    """Return what several names of one thing say, whatever their case. Those that are told must say the same."""
    told = {str(fields.raw[key]).lower(): key for key in keys if fields.has(key)}
    for value, key in told.items():
        if value not in known:
            raise fields.refuse(key, f"is not supported; these are: {', '.join(known)}")
    if len(told) > 1:
        raise fields.refuse(keys[0], f"and {keys[1]} = {fields.raw[keys[1]]!r}: they must say the same")
    return next(iter(told), default)


def bits_of(fields: ConfigFields, key: str) -> int:
    if (bits := fields.count(key)) not in (4, 8):
        raise fields.refuse(key, "4 and 8 bits are supported")
    return bits


def group_size_of(fields: ConfigFields) -> int:
    return 0 if fields.raw.get("group_size") == -1 else fields.count("group_size")


def block_of(fields: ConfigFields, value: object) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(n, int) and n > 0 for n in value):
        raise ConfigError(f"{fields.path}: quantization_config: {value!r} is no block: two whole numbers above 0")
    return (value[0], value[1])


def order_of(target: str) -> int:
    """Return the place of a rule among those of compressed-tensors: names, then expressions, then classes."""
    return 2 if is_class(target) else 1 if target.startswith("re:") else 0


def is_class(target: str) -> bool:
    return target[:1].isupper()


def excluded_by(fields: ConfigFields, key: str) -> list[Rule]:
    """Make rules of a list of modules that are plain: a star stands for anything, and dots around a name say nothing.

    Names with stars are one rule together: each module is tried with each rule that is no name, a mixture of experts
    has tens of thousands of modules, and a list may have a star for each layer.
    """
    rules: list[Rule] = []
    starred: list[Rule] = []
    for module in flat(fields.raw.get(key)):
        if module.startswith("re:"):
            rules.append(rule_of(fields, module, None))
        elif "*" in module:
            starred.append(rule_of(fields, f"re:{_expression(module.strip('.'))}", None))
        else:
            rules.append(Rule(module.strip("."), None))
    if starred:
        rules.append(Rule("re:" + "|".join(rule.target.removeprefix("re:") for rule in starred), None))
    return rules


def _expression(name: str) -> str:
    """Write a name with stars as an expression, which ends with a part of a name."""
    return rf"{re.escape(name).replace(re.escape('*'), '.*')}(?:\.|$)"


def rule_of(fields: ConfigFields, target: str, storage: Storage | None) -> Rule:
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


def flat(value: object) -> Iterator[str]:
    """Yield the texts of a list, or of lists in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from flat(item)
