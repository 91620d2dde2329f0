"""Imports without collections of garbage between them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """Import within: what imports make stays, and to look through it for garbage takes a fifth of what torch's take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # nor need later collections go through it
        gc.enable()
