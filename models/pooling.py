"""A checkpoint of an embedding model says how its vectors are made, in files as sentence-transformers writes them.

modules.json                the modules behind the model: Pooling, Normalize
1_Pooling/config.json       which tokens are pooled
sentence_bert_config.json   how long its texts are at most, and whether they are in small letters

A checkpoint without these is a model that generates: its last token has seen the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog

from ..common.errors import ConfigError
from ..common.request import Pooling
from .stored.json_files import read_json, read_json_list

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
_OWN_MODULES = "sentence_transformers."  # how the types of its own modules begin
_TEXTS = tuple(  # the file's names, by the model that it was first written for
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(slots=True, frozen=True)
class EmbeddedTexts:
    """The texts that a model embeds."""

    max_tokens: int | None = None  # of one, with those around it; None: as many as the model's context has
    are_lower_case: bool = False


def read_embedded_texts(model_dir: Path) -> EmbeddedTexts:
    """Raises ConfigError for a file that does not say it in this way."""
    file = next((model_dir / name for name in _TEXTS if (model_dir / name).is_file()), None)
    if file is None:
        return EmbeddedTexts()
    config = read_json(file)
    most, lower = config.get("max_seq_length"), config.get("do_lower_case")
    if most is not None and (type(most) is not int or most < 1):
        raise ConfigError(f"{file}: max_seq_length must be a whole number of at least 1, got {most!r}")
    if not isinstance(lower, bool | None):
        raise ConfigError(f"{file}: do_lower_case must be true or false, got {lower!r}")
    return EmbeddedTexts(most, bool(lower))


def read_pooling(model_dir: Path) -> Pooling:
    """Raises ConfigError where the checkpoint's vectors are made in a way that no worker knows."""
    folder = _pooling_dir(model_dir)
    file = model_dir / (folder or _POOLING_DIR) / "config.json"
    if not file.is_file():
        if folder is not None:
            raise ConfigError(
                f"{model_dir / _MODULES} names {folder}, and there is no {file}, which says how embeddings are pooled: "
                "copy it from where the model comes from"
            )
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
        _warn_of_code(f"{file}: auto_map names code of the checkpoint")


def _warn_of_code(what: str) -> None:
    reason = f"{what}, which is never run; compare some vectors with its"
    log.warning("embeddings", computed_by="the built-in class", reason=reason)


def _pooling_dir(model_dir: Path) -> str | None:
    """Return the folder that modules.json names; None: there is no such file, or no pooling in it."""
    file = model_dir / _MODULES
    if not file.is_file():
        return None
    modules = read_json_list(file)
    types = [str(module.get("type", "")) for module in modules]
    kinds = [name.rpartition(".")[2] for name in types]
    if unknown := sorted(set(kinds) - _KNOWN):
        raise ConfigError(f"{file}: {', '.join(unknown)[:200]} of this embedding model cannot be served")
    if others := sorted({name for name in types if not name.startswith(_OWN_MODULES)}):
        _warn_of_code(f"{file}: {', '.join(others)[:200]} is code of the checkpoint")
    folders = [str(module.get("path", "")) for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    if len(folders) > 1:
        raise ConfigError(f"{file}: embeddings are pooled once, and it names {len(folders)} modules Pooling")
    if not folders:
        return None
    folder = folders[0].removesuffix("/")
    if Path(folder).name != folder or not folder:
        raise ConfigError(f"{file}: {folders[0][:200]!r} is no folder beside it")
    return folder
