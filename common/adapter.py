"""Adapters of requests as workers see them: asked for by digest and path, held in a slot while they are used."""

from __future__ import annotations

from typing import Protocol

NO_ADAPTER = -1  # the slot of rows without one


class HeldAdapter(Protocol):
    """An adapter on one worker. What it says changes under the worker's lock alone."""

    @property
    def slot(self) -> int | None:
        """Return where the engine has it; None: nowhere yet, and no token of its requests may be computed."""
        ...

    @property
    def failure(self) -> str:
        """Say why it cannot be loaded; empty: it can, as far as is known."""
        ...


class Adapters(Protocol):
    """The adapters of a worker."""

    def get(self, digest: str, path: str) -> HeldAdapter:
        """Return the adapter at once, and begin to load it if it is not here. Who waits for it is woken."""
        ...


def find_adapter(digest: str, path: str, adapters: Adapters | None) -> HeldAdapter | None:
    """Return the adapter that a request names, loaded from now on; None: it names none, or none are applied."""
    return None if not digest or adapters is None else adapters.get(digest, path)
