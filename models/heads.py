"""A checkpoint's head: one of its own, the embedding's matrix again, or none. The files know better than config.json.

told tied, and the head's bytes are there, others than the embedding's     not tied, as in `transformers`
told tied, and the head alone is there                                     it is the embedding's, too
told not tied, and no head in weights that were saved by themselves        an embedding model
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..common.errors import ConfigError
from .families.module_names import full_name, is_bare
from .stored.safetensors import Entry, read_header, safetensors_files

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE_BYTES = 4 << 20  # compared at once: matrices that differ do so in the first piece

T = TypeVar("T")


class _Stored(NamedTuple):
    path: Path
    entry: Entry


def lacks_head(model_dir: Path) -> bool:
    """Tell whether weights were saved without a head, and by themselves, as embedding models' are."""
    try:
        files = safetensors_files(model_dir)
        if not any(map(is_bare, read_header(files[0]).entries)):  # of large models one header is read, not all
            return False
        return not any(name.startswith("lm_head.") for file in files for name in read_header(file).entries)
    except ConfigError:  # whoever loads the weights says what is wrong with them
        return False


def has_other_head(model_dir: Path) -> bool:
    """Tell whether the weights have a head that is not the embedding's matrix once more."""
    try:
        found = _find(model_dir)
        return len(found) == 2 and not _are_equal(found[_HEAD], found[_EMBEDDING])
    except (ConfigError, OSError):  # as above
        return False


def with_embedding(found: dict[str, T], *, is_tied: bool) -> dict[str, T]:
    """Return what is known of each tensor by its name: a tied head stands for the embedding where that was left out.

    Tools that save a matrix of several names once (safetensors' `save_model`) keep the first name of the alphabet.
    """
    if is_tied and _HEAD in found and _EMBEDDING not in found:
        return found | {_EMBEDDING: found[_HEAD]}
    return found


def _find(model_dir: Path) -> dict[str, _Stored]:
    """Return where the head and the embedding lie, as far as they are there."""
    files = safetensors_files(model_dir)
    stored = ((full_name(name), path, entry) for path in files for name, entry in read_header(path).entries.items())
    return {name: _Stored(path, entry) for name, path, entry in stored if name in (_HEAD, _EMBEDDING)}


def _are_equal(one: _Stored, other: _Stored) -> bool:
    begin, other_begin, num_bytes = one.entry.begin, other.entry.begin, one.entry.end - one.entry.begin
    if one.entry.dtype != other.entry.dtype or num_bytes != other.entry.end - other_begin:
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        for at in range(0, num_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, num_bytes - at)
            piece = os.pread(first.fileno(), size, begin + at)
            if piece != os.pread(second.fileno(), size, other_begin + at):
                return False
            if not piece:
                break  # both end before their headers say: whoever loads the weights says so
    return True
