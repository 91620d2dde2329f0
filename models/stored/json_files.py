"""The small JSON files of a model directory. What cannot be read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

from ...common.errors import ConfigError
from .pointer import refuse_pointer

_MAX_BYTES = 256 << 20


def read_json(path: Path, *, default: dict[str, object] | None = None) -> dict[str, object]:
    """Read the JSON object in a file; `default` where there is no such file. Raises ConfigError."""
    if default is not None and not path.is_file():
        return default
    value = _read(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def read_json_list(path: Path) -> list[dict[str, object]]:
    """Read the JSON objects in a file's list. Raises ConfigError."""
    value = _read(path)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ConfigError(f"{path} holds no list of JSON objects")
    return value


def _read(path: Path) -> object:
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ConfigError(f"{path} has {size} bytes; at most {_MAX_BYTES} are read")
        refuse_pointer(path, data := path.read_bytes())
        value: object = json.loads(data)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    return value
