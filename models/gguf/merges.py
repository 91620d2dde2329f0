"""Merges of a byte pair encoding, in the files' words: "left right", the best first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .fields import GgufFields

if TYPE_CHECKING:
    from tokenizers import models

_MERGES = "tokenizer.ggml.merges"

Pairs = list[tuple[str, str]]


def has_merges(fields: GgufFields) -> bool:
    return fields.find(_MERGES) is not None


def read_merges(fields: GgufFields) -> Pairs:
    """Return the file's pairs. Raises ValueError for one that is not of two parts."""
    found: Pairs = []
    for text in fields.texts(_MERGES):
        left, space, right = text.partition(" ")
        if not space or " " in right:
            raise ValueError(f"the merge {text!r} is not of two parts")
        found.append((left, right))
    return found


def byte_pairs(vocabulary: Mapping[str, int], pairs: Pairs, **options: Any) -> models.BPE:
    """Return the encoding. Raises ValueError for what it cannot be made of.

    The library says of some of it nothing that can be caught: it panics.
    """
    from tokenizers import models

    for left, right in pairs:
        for part in (left, right, left + right):
            if part not in vocabulary:
                raise ValueError(f"the merge of {left!r} and {right!r} needs the token {part!r}, which is not there")
    try:
        return models.BPE(vocab=dict(vocabulary), merges=pairs, **options)
    except Exception as error:  # it has no kinds of its own
        raise ValueError(f"no tokenizer can be made of its tokens and merges: {error}") from error
