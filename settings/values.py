"""Types of settings, and how their texts are read: numbers with units, lists, request classes, adapters.

Flags, variables and scalars of YAML are all texts. Lists and mappings of YAML are such already, and a program may give
values of their types: every reader hands on what it has nothing to do with.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from ..common.config import WeightsForm
from ..common.errors import ConfigError
from ..common.router_config import RequestClass
from .windows import Window

MAX_PORT = 65535
MAX_COUNT = 2**53  # as on the wire (wire/fields.py), where names are bounded too
MAX_NAME_CHARS = 200  # a transfer agent has numbers behind its worker's
_LEAST_BYTES = 1024  # below, a size is a slip
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1000**_power, _letter.upper(): 1024**_power}  # as vLLM reads them: 1k = 1000, 1K = 1024
    _UNITS |= {f"{_letter.upper()}iB": 1024**_power, f"{_letter.upper()}B": 1000**_power}
_SWITCHED = {"true": "on", "yes": "on", "on": "on", "false": "off", "no": "off", "off": "off"}
# Bounded, exponents above all: a number of a million digits is not to be computed.
_NUMBER = re.compile(r"([+-]?\d[\d_]{0,39}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,2})?)\s*([A-Za-z]*)")


def parse_number(value: object) -> object:
    """Read `32K`, `1.5k`, `2GiB`, `32_768` and `8.5e+09` (as templates of YAML files write large ones).

    What is no text goes on to pydantic as it is.
    """
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value.strip())
    number = Fraction(match[1].replace("_", "")) * _UNITS[match[2]] if match and match[2] in _UNITS else None
    if number is None or number.denominator != 1:  # 4.1GB are whole bytes, which 4.1 as a float is not
        raise ValueError("must be a whole number, perhaps with a unit such as 32K or 2GiB")
    return int(number)


def check_size(num_bytes: int) -> int:
    """Refuse what was meant in a larger unit, as vLLM's `--swap-space 4` of 4 GiB."""
    if 0 < num_bytes < _LEAST_BYTES:
        raise ValueError(f"{num_bytes} bytes hold nothing; say {num_bytes}GiB if that is meant")
    return num_bytes


def _split(value: object) -> object:
    """Read `a,b` (from the environment) and a lone value (from YAML) as a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_each(value: object) -> object:
    """Read a list whose texts may be lists themselves: of a flag that is given once or several times."""
    return _split(",".join(map(str, value)) if isinstance(value, list | tuple) else value)


def _names_of_model(value: object) -> object:
    """Read names as `_split_each` does, and keep the blank one of an unset variable, which is refused."""
    if not isinstance(value, str | list | tuple):
        return value
    texts = [value] if isinstance(value, str) else value
    return [part for text in texts for part in (text.split(",") if isinstance(text, str) else [text])]


def parse_kv_dtype(value: object) -> object:
    """Read vLLM's other name of FP8: it is e4m3 here, with or without saying so."""
    return "fp8" if value == "fp8_e4m3" else value


def parse_classes(value: object) -> object:
    """Read request classes: a mapping by name (YAML, or JSON in a text), or texts `name:key=value,key=value`."""
    if value is None:  # `classes:` with comments alone behind it
        return []
    if isinstance(value, Mapping):
        entries = [(name, {} if own is None else own) for name, own in value.items()]
        return [{**own, "name": name} if isinstance(own, Mapping) else own for name, own in entries]
    if _is_json(value):
        return parse_classes(parse_object(value))
    texts = value.split() if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    return [entry for text in texts for entry in (_parse_class(text) if isinstance(text, str) else [text])]


def parse_object(value: object) -> object:
    """Read a JSON object in a text (flags, variable); a mapping (YAML) is one already."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_as_in_yaml)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"must be a JSON object: {error}") from None


def _as_in_yaml(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that is given twice, and leave `true` a word: pydantic would take the truth value for a number."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key}: given twice")
        found[key] = json.dumps(value) if isinstance(value, bool) else value
    return found


def _is_json(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


def _parse_class(text: str) -> list[object]:
    if _is_json(text):
        found = parse_classes(text)
        return found if isinstance(found, list) else [found]
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    if not all(sign for _, sign, _ in pairs):
        raise ValueError(f"{text!r} is not like 'batch:priority=10,deadline_s=600'")
    return [{"name": name.strip(), **{key.strip(): value.strip() for key, _, value in pairs}}]


def on_or_off(value: object) -> object:
    """Read other words for the two states of a switch that has a third one, in any case as those of other switches."""
    return _SWITCHED.get(str(value).lower(), value)


def check_windows(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        try:
            Window.parse(text)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return texts


def check_host(text: str) -> str:
    """Refuse what no address and no name can be: to look it up would fail with something else than an OSError."""
    try:
        is_name = bool(text.encode("idna")) and text.isprintable() and not any(map(str.isspace, text))
    except UnicodeError:  # a label of it is empty, too long or spelled so that no name has it
        is_name = False
    if not is_name:
        raise ValueError("must be an address or a name of a host")
    if set(text) & set("/[]") or (":" in text and not _is_ipv6(text)):
        raise ValueError("must be an address or a name of a host, without scheme, port and brackets")
    return text


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def check_name(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    if len(text) > MAX_NAME_CHARS:
        raise ValueError(f"has {len(text)} characters; the limit is {MAX_NAME_CHARS}")
    return text


def check_names(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        check_name(text)
    return tuple(dict.fromkeys(text.strip() for text in texts))


def expanded(path: str) -> str:
    """Put a user's home in the place of `~`: shells do not where it stands behind a `=`, and files are none of theirs.

    Raises ValueError.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError("a path with ~ must name a user of this machine")
    return found


def _check_path(value: object) -> object:
    """Refuse the path of an unset variable (`--data-dir "$DIR"`): it would be the folder that the command runs in."""
    if value == "" or (isinstance(value, str) and "\0" in value):  # which YAML can write, and no system call takes
        raise ValueError("must be a path")
    return expanded(value) if isinstance(value, str) else value


def check_host_names(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what no request's Host can be once its port is off: all requests would be refused beside such a name."""
    for text in texts:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
            raise ValueError(f"{text} is no name such as chat.example: without scheme, port, path and *")
    return texts


def check_origins(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
            raise ValueError(f"{text} is no origin: scheme://host, with the port if there is one, and no path; or *")
    return texts


def _adapters(value: object) -> object:
    """Read texts and mappings of adapters (YAML), one or several; also as JSON in one text (variable)."""
    if isinstance(value, str):
        value = parse_object(value) if _is_json(value) else _split(value)
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list | tuple):
        return entries
    return [_as_text(each) if isinstance(each, Mapping) else each for each in entries]


def _as_text(entry: Mapping[object, object]) -> str:
    return json.dumps({str(key): value for key, value in entry.items()}, default=str)


def _as_pair(text: str) -> str:
    """Read vLLM's other form of an adapter, `{"name": ..., "path": ...}`; its base model is ours."""
    if not text.startswith("{"):
        return text
    fields = parse_object(text)
    if not isinstance(fields, dict) or not {"name", "path"} <= fields.keys() <= {"name", "path", "base_model_name"}:
        fields = {}
    if not all(isinstance(fields.get(key), str | int | float) for key in ("name", "path")):  # `name:` alone is nothing
        raise ValueError('each is NAME=DIRECTORY or {"name": NAME, "path": DIRECTORY}')
    if "=" in str(fields["name"]):
        raise ValueError("a name has no =")
    return f"{fields['name']}={fields['path']}"


def check_adapters(texts: tuple[str, ...]) -> tuple[str, ...]:
    texts = tuple(_as_pair(text) for text in texts)
    names = [text.partition("=")[0] for text in texts]
    if any(not name or not text.partition("=")[2] for name, text in zip(names, texts, strict=True)):
        raise ValueError("each is NAME=DIRECTORY")
    if len(set(names)) < len(names):
        raise ValueError("each name once")
    paths = [Path(expanded(text.partition("=")[2])).absolute() for text in texts]  # whatever folder a child runs in
    return tuple(f"{name}={path}" for name, path in zip(names, paths, strict=True))


FilePath = Annotated[Path, BeforeValidator(_check_path)]  # of a file or a folder
Count = Annotated[PositiveInt, Field(le=MAX_COUNT), BeforeValidator(parse_number)]
NumBytes = Annotated[Count, AfterValidator(check_size)]
NumBytesOr0 = Annotated[int, BeforeValidator(parse_number), Field(ge=0, le=MAX_COUNT), AfterValidator(check_size)]
# More than any one machine or cluster has, so that a slip of the finger is told and not planned for.
NumThreads = Annotated[PositiveInt, Field(le=4096), BeforeValidator(parse_number)]
NumRouters = Annotated[PositiveInt, Field(le=1000)]
NumWorkers = Annotated[int, Field(ge=0, le=10_000)]
Host = Annotated[str, AfterValidator(check_host)]
Name = Annotated[str, AfterValidator(check_name)]
Port = Annotated[int, Field(ge=0, le=MAX_PORT)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_each)]  # that have no comma
ModelNames = Annotated[tuple[str, ...], BeforeValidator(_names_of_model), AfterValidator(check_names)]
Adapters = Annotated[tuple[str, ...], BeforeValidator(_adapters), AfterValidator(check_adapters)]
WeightsForms = Annotated[tuple[WeightsForm, ...], BeforeValidator(_split_each)]
Share = Annotated[float, Field(gt=0, le=1)]
Classes = Annotated[tuple[RequestClass, ...], BeforeValidator(parse_classes)]
Objective = Annotated[float, Field(gt=0)] | None
