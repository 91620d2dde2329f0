"""The identity of a model: one digest over every byte of its weights, and over what else decides its tokens.

    config.json, the ids that end an answer, each weight file's BLAKE3  ->  ModelDigest.result()

Workers pair, share prefixes and keep disk caches by it, so it has to be one that nobody can forge: with a mere checksum
(XXH3 reads 24 GB/s here) a checkpoint could be made that gets another's name. Of the hashes that are good for that
BLAKE3 takes the least: 4 GB/s on a core, where SHA-256 in the processor's own instructions takes 1.8 and BLAKE2b 0.9,
and a file can be shared out among threads.

It runs beside loading, and only once: what it found is kept in a side file, with what the file system says of the file.
That lies beside the weights, or, where nothing can be written there, in kvferry's cache directory. It is believed as
long as size, times and inode are the same. A file that was changed a moment ago gets none: it could be changed again
within the clock's step.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec
from blake3 import blake3

from ..common.errors import ConfigError
from .config import ModelConfig
from .default import cache_dir
from .files import write_whole
from .quantization import AT_LOAD
from .stored.json_files import read_json
from .stored.safetensors import safetensors_files

_READ_BYTES = 8 << 20  # at once: enough for several threads
_MAX_THREADS = 8
_SETTLED_NS = 2 * 10**9  # since a file was changed: longer than any file system's clock takes for a step


class ModelDigest:
    """Computed on a thread from now on."""

    def __init__(
        self,
        model_dir: Path,
        load_format: str,
        seed: int,
        quantization: str | None = None,
        mixed: tuple[str, ...] = (),
    ) -> None:
        self._work = (model_dir, load_format, seed, quantization, mixed)
        self._found = ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = model_digest(*self._work)
        except BaseException as error:  # whoever waits for the result gets it
            self._error = error

    def result(self) -> str:
        """Wait for it. Raises ConfigError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found


def model_digest(
    model_dir: Path, load_format: str, seed: int, quantization: str | None = None, mixed: tuple[str, ...] = ()
) -> str:
    """Return 32 hexadecimal digits. Raises ConfigError for what cannot be read.

    `quantization`: what the weights are rounded to while they are loaded, or what the checkpoint says itself.
    `mixed`: the forms that may take part in one KV cache; what any of them made has the name of them all.
    """
    digest = blake3(b"kvferry model 2")
    model = ModelConfig.from_dir(model_dir)
    eos_token_ids = sorted(model.eos_token_ids)
    config = read_json(model_dir / "config.json")
    digest.update(json.dumps([config, eos_token_ids], sort_keys=True).encode())
    if mixed:
        digest.update(f"mixed:{','.join(sorted(set(mixed)))}".encode())
    elif quantization in AT_LOAD and model.quantization is None:  # fp8 may be the checkpoint's own
        digest.update(f"rounded:{quantization}".encode())
    if load_format == "dummy":
        digest.update(f"dummy:{seed}".encode())
    else:
        for path in safetensors_files(model_dir):
            digest.update(file_digest(path))
    return digest.hexdigest(length=16)


# --- one file -------------------------------------------------------------------------------------------------------


class _Marks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Marks of a file by which a change shows without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int  # of the inode: nobody can set it back
    inode: int

    @classmethod
    def read(cls, path: Path) -> _Marks:
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A side file."""

    marks: _Marks
    blake3: str


def file_digest(path: Path, *, cache: Path | None = None, settled_ns: int = _SETTLED_NS) -> bytes:
    """Return 32 bytes over all of the file, from its side file where that is right. Raises ConfigError.

    `cache`: kvferry's cache directory. `settled_ns`: what was changed this long ago is kept.
    """
    cache = (cache or cache_dir()) / "digests"
    name = blake3(os.fsencode(path.absolute())).hexdigest(length=16)
    places = (path.with_name(f".{path.name}.kvferry-digest"), cache / f"{name}.json")
    try:
        with _one_at_a_time(cache / f".{name}.lock"):
            marks = _Marks.read(path)
            if (known := _known(places, marks)) is not None:
                return known
            digest = _hash_file(path)
            if _Marks.read(path) != marks:
                raise ConfigError(f"{path} is being changed while it is read")
            if time.time_ns() - max(marks.mtime_ns, marks.ctime_ns) > settled_ns:
                _keep(places, _Kept(marks, digest.hex()))
            return digest
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error


def _known(places: tuple[Path, ...], marks: _Marks) -> bytes | None:
    for place in places:
        with suppress(OSError, ValueError, msgspec.DecodeError):
            kept = msgspec.json.decode(place.read_bytes(), type=_Kept)
            if kept.marks == marks and len(digest := bytes.fromhex(kept.blake3)) == blake3.digest_size:
                return digest
    return None


def _keep(places: tuple[Path, ...], kept: _Kept) -> None:
    """Write to the first place that allows it, by one rename. Where none does, the file is hashed at each start."""
    for place in places:
        with suppress(OSError):
            write_whole(place, msgspec.json.encode(kept))
            return


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Let one of the workers hash that start together on this machine: the others find what it kept."""
    with ExitStack() as held:
        with suppress(OSError):  # nowhere to write: each for itself
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
        yield


def _hash_file(path: Path) -> bytes:
    digest = blake3(max_threads=max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // 2)))
    buffer = bytearray(_READ_BYTES)
    with path.open("rb", buffering=0) as file:  # not mapped: who cuts the file short would end this process
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.digest()
