"""A checkpoint of an embedding model says which hidden states its vectors are made of, as sentence-transformers writes.

modules.json          the modules behind the model: Pooling, Normalize
1_Pooling/config.json which tokens are pooled

A checkpoint without these is a model that generates: its last token has seen the whole text.
"""

from __future__ import annotations

import json
from pathlib import Path

import structlog

from ..common.errors import ConfigError
from ..common.request import Pooling
from .files import read_json

log = structlog.get_logger(__name__)

_MODULES = "modules.json"
_POOLING_DIR = "1_Pooling"
_KNOWN = {"Transformer", "Pooling", "Normalize"}  # vectors are always of length 1, whether it normalises them or not
_FLAGS = {
    "pooling_mode_lasttoken": Pooling.LAST,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
}
_NAMES = {"lasttoken": Pooling.LAST, "mean": Pooling.MEAN, "cls": Pooling.CLS}
_MAX_MODULES_BYTES = 1 << 20


def read_pooling(model_dir: Path) -> Pooling:
    """Raises ConfigError where the checkpoint's vectors are made in a way that no worker knows."""
    file = model_dir / _pooling_dir(model_dir) / "config.json"
    if not file.is_file():
        return Pooling.LAST
    _tell_of_code(model_dir)
    config = read_json(file)
    if isinstance(named := config.get("pooling_mode"), str):
        modes = {named}
    else:
        modes = {name for name, value in config.items() if name.startswith("pooling_mode_") and value is True}
    [mode, *others] = sorted(modes) or [""]
    pooling = _FLAGS.get(mode) or _NAMES.get(mode)
    if pooling is None or others:
        known = ", ".join((*_FLAGS, *_NAMES))
        raise ConfigError(
            f"{file}: embeddings are pooled by one of {known}, not by {', '.join(sorted(modes)) or 'none'}"
        )
    return pooling


def _tell_of_code(model_dir: Path) -> None:
    """Warn of a checkpoint whose own code is said to make its vectors: embedding models' often attends both ways."""
    file = model_dir / "config.json"
    if file.is_file() and "auto_map" in read_json(file):
        log.warning(
            "embeddings",
            computed_by="the built-in class",
            reason=f"{file}: auto_map names code of the checkpoint, which is never run; compare some vectors with its",
        )


def _pooling_dir(model_dir: Path) -> str:
    """Return the folder that modules.json names, or the usual one."""
    file = model_dir / _MODULES
    if not file.is_file():
        return _POOLING_DIR
    modules = _read_modules(file)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = sorted(set(kinds) - _KNOWN)
    if unknown:
        raise ConfigError(f"{file}: {', '.join(unknown)[:200]} of this embedding model cannot be served")
    folders = [str(module.get("path", "")) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    folder = folders[0] if folders else _POOLING_DIR
    if Path(folder).name != folder or not folder:
        raise ConfigError(f"{file}: {folder[:200]!r} is no folder beside it")
    return folder


def _read_modules(file: Path) -> list[dict[str, object]]:
    try:
        if (size := file.stat().st_size) > _MAX_MODULES_BYTES:
            raise ConfigError(f"{file} has {size} bytes; at most {_MAX_MODULES_BYTES} are read")
        modules = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ConfigError(f"{file} holds no list of modules")
    return modules
