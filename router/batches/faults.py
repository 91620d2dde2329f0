"""A batch is told as a whole why it has failed, or what it waits for."""

from __future__ import annotations

from collections.abc import Iterable

from ..state.errors import shown
from .input import MAX_FAULTS
from .record import InputFault
from .verdict import MODEL_NOT_FOUND

GONE = InputFault("input_gone", "the batch's input file is gone from the server's data folder")
FULL = InputFault(
    "insufficient_storage", "the server's folder for files is full: lines are asked again when files are deleted"
)
_MISSING = "no router that has looked serves the model {}: "
_WAITS = "its lines wait for one until the window is over"
_SOON = "the batch fails if none does soon"


def missing(models: Iterable[str | None], *, has_begun: bool) -> list[InputFault]:
    """Return what a batch is told whose lines wait for these models. `has_begun`: they were there once."""
    texts = sorted(_MISSING.format(shown(model)) + (_WAITS if has_begun else _SOON) for model in models)
    return [InputFault(MODEL_NOT_FOUND, text, param="body.model") for text in texts[:MAX_FAULTS]]
