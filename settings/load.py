"""Loads settings and knows where each comes from: command line over environment over YAML file over default.

    raw values with their origin, by layer  ->  the highest of each key  ->  ServeSettings, or one line per mistake

Every mistake is found before anything starts, and names its file and line (or flag, or variable), the rule, and the
nearest right name. The YAML is read with its line numbers and without tags that build objects; its words and numbers
are read as the same texts are that flags and variables have.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ValidationError

from ..common.config import CACHE_VARIABLE, FAILPOINTS_VARIABLE, SECRET_VARIABLE, SpeculativeConfig
from ..common.errors import ConfigError
from ..common.router_config import RequestClass
from .fields import ENV_PREFIX, ServeSettings, setting_keys
from .http import KEY_SETTINGS
from .values import expanded, parse_classes
from .yaml_values import construct

DEFAULT = "default"
_RULES = {  # in our words
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "extra_forbidden": "is not known here",
    "finite_number": "must be a finite number",
    "model_type": "must be a mapping",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must be 1 to 32 lower-case letters, digits, - and _, with neither of these two first",
    "tuple_type": "must be a list",
}
# Settings whose values have keys of their own.
_PARTS: dict[str, type[BaseModel]] = {"classes": RequestClass, "speculative_config": SpeculativeConfig}
_NO_SETTINGS = (SECRET_VARIABLE, CACHE_VARIABLE, FAILPOINTS_VARIABLE)
# Kubernetes sets these in each container for every Service of the namespace, such as one that is called `kvferry`.
_SERVICE_VARIABLE = re.compile(
    r"KVFERRY(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://\S+")  # of NAME_PORT, which for some names is a setting too
_NOTHING, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _Texts(yaml.SafeLoader):
    """Leaves words and numbers as they are written: YAML's own are yes for true, 80:30 for 4830 and 017500 for 8000.

    What is not there, null and ~ are nothing still.
    """


_Texts.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in (_NOTHING, _MERGE)]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Raw(NamedTuple):
    """A value as it was given, and where."""

    value: object
    origin: str  # "--port", "KVFERRY_PORT", "cluster.yaml:3"


class Loaded(NamedTuple):
    settings: ServeSettings
    origins: dict[str, str]  # dotted key -> where its value comes from


def load(*, flags: Mapping[str, Raw], env: Mapping[str, str], file: Path | None) -> Loaded:
    """Merge the layers and check them. `flags` are by dotted key; absent ones were not given.

    Raises ConfigError with a line for each mistake, whatever its kind.
    """
    mistakes: list[str] = []
    in_file = read_yaml(file, mistakes) if file is not None else {}
    merged = {**in_file, **read_environment(env, mistakes), **flags}
    try:
        settings = ServeSettings.model_validate(_nested({key: raw.value for key, raw in merged.items()}))
    except ValidationError as error:
        mistakes += _explain(error, merged)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    origins = {key: merged[key].origin if key in merged else DEFAULT for key in setting_keys().values()}
    return Loaded(settings, origins)


def value_of(settings: BaseModel, dotted_key: str) -> object:
    value: object = settings
    for part in dotted_key.split("."):
        value = getattr(value, part)
    return value


def read_environment(env: Mapping[str, str], mistakes: list[str]) -> dict[str, Raw]:
    """Read every KVFERRY_ variable but those that are no settings; an unknown one is added to the mistakes."""
    keys = {ENV_PREFIX + name.upper(): key for name, key in setting_keys().items()}
    as_in_file = {ENV_PREFIX + key.replace(".", "_").upper(): name for name, key in keys.items()}  # `prefill.workers`
    found: dict[str, Raw] = {}
    for name, value in env.items():
        if not name.startswith(ENV_PREFIX) or name in _NO_SETTINGS or _is_of_a_service(name, value):
            continue
        if name in keys:
            found[keys[name]] = Raw(value, name)
        else:
            hint = f"; did you mean {as_in_file[name]}?" if name in as_in_file else _nearest(name, keys)
            mistakes.append(f"{name}: unknown variable{hint}")
    return found


def _is_of_a_service(name: str, value: str) -> bool:
    return bool(_SERVICE_VARIABLE.fullmatch(name)) or (name.endswith("_PORT") and bool(_SERVICE_URL.fullmatch(value)))


def read_yaml(path: Path, mistakes: list[str]) -> dict[str, Raw]:
    """Read dotted keys of a YAML file, each with its line; what is wrong with a key is added to the mistakes.

    Raises ConfigError for a file that cannot be read at all.
    """
    try:
        path = Path(expanded(str(path)))
    except ValueError as error:
        raise ConfigError(f"config: {error}, not {str(path)!r}") from None
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Texts)
    except UnicodeDecodeError:
        raise ConfigError(f"config: {path} is no text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}:{root.start_mark.line + 1}: a mapping of settings is needed")
    found: dict[str, Raw] = {}
    for key, raw in _entries(root, path, "", mistakes):
        if key in found:
            mistakes.append(f"{raw.origin}: {key}: given twice, first at {found[key].origin}")
        else:
            found[key] = raw
    return found


def _entries(mapping: yaml.MappingNode, path: Path, prefix: str, mistakes: list[str]) -> Iterator[tuple[str, Raw]]:
    keys = set(setting_keys().values())
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for key_node, node in mapping.value:
        origin = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            mistakes.append(f"{origin}: a key must be the name of a setting")
            continue
        if key_node.tag == _MERGE:
            mistakes.append(f"{origin}: {prefix}<<: merge keys are not read here; write the settings themselves")
            continue
        key = prefix + key_node.value
        if key in sections and isinstance(node, yaml.MappingNode):
            yield from _entries(node, path, f"{key}.", mistakes)
            continue
        if key in sections and node.tag == _NOTHING:  # `prefill:` with comments alone behind it
            continue
        if key in sections:  # `prefill: 2`
            key = f"{key}.workers"
        if key not in keys:
            mistakes.append(f"{origin}: {key}: unknown key{_nearest(key, keys | sections)}")
            continue
        mistakes += [f"{path}:{line}: {key}: {why}" for line, why in _given_twice(node, path)]
        try:
            yield key, Raw(construct(node, origin), origin)
        except ConfigError as error:
            mistakes.append(str(error))


def _given_twice(value: yaml.Node, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines where a mapping within a value has a key again: of two, YAML would keep the last."""
    waiting, seen = [(value, "")], set[int]()
    for node, place in waiting:  # it grows meanwhile
        if id(node) in seen:  # an alias, which may stand within itself
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(each, place) for each in node.value]
        lines: dict[str, int] = {}
        for key_node, own in node.value if isinstance(node, yaml.MappingNode) else ():
            line, name = key_node.start_mark.line + 1, place + str(key_node.value)
            waiting.append((own, f"{name}."))
            if name in lines:
                yield line, f"{name}: given twice, first at {path}:{lines[name]}"
            lines.setdefault(name, line)


def _nested(values: Mapping[str, object]) -> dict[str, object]:
    nested: dict[str, object] = {}
    for key, value in values.items():
        section, _, own = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        assert isinstance(target, dict), key
        target[own] = value
    return nested


def _explain(error: ValidationError, merged: Mapping[str, Raw]) -> Iterator[str]:
    """Make one line for each mistake, with the origin of the value."""
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        message = _RULES.get(item["type"], item["msg"]).removeprefix("Value error, ")
        message = message.replace("Input should be", "must be")
        key = next((key for n in range(len(names), 0, -1) if (key := ".".join(names[:n])) in merged), ".".join(names))
        if not key:  # a rule between settings: its text begins with the setting that breaks it
            key, _, message = message.partition(": ")
            key = key if key in merged or f"{key}.workers" not in setting_keys().values() else f"{key}.workers"
        raw = merged.get(key)
        if raw is None:
            yield f"{key}: {message}"
            continue
        inner = names[len(key.split(".")) :]
        if place := _inside(key, raw.value, inner):
            message = f"{place}: {message}"
        if item["type"] == "extra_forbidden":  # the key is what is wrong, whatever its value
            message += _nearest(names[-1], set(_PARTS[key].model_fields) if key in _PARTS else set())
        elif names and key not in KEY_SETTINGS and not message.startswith("'"):  # else it begins with what is wrong
            choices = str(item.get("ctx", {}).get("expected", "")).split("'")[1::2]
            value = item["input"] if inner else raw.value
            message += f", not {value!r}{_nearest(str(value), choices)}"
        # A flag or a variable says by its own name which setting it is; a line of a file does not.
        yield f"{raw.origin}: {key}: {message}" if ":" in raw.origin else f"{raw.origin}: {message}"


def _inside(key: str, value: object, names: list[str]) -> str:
    """Name a place in a value with parts: `batch.weight` for the part `weight` of the class `batch`.

    One of a list of texts has no name: what it is is told, not where it stands.
    """
    entries = parse_classes(value) if key == "classes" and names else None  # without: it could not be read
    if isinstance(entries, list) and names[0].isdigit():
        entry = entries[int(names[0])]
        names = [str(entry.get("name", names[0])), *names[1:]] if isinstance(entry, Mapping) else names
    return "" if len(names) == 1 and names[0].isdigit() else ".".join(names)


def _nearest(word: str, known: Mapping[str, str] | set[str] | list[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""
