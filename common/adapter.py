"""Adapters of requests as workers see them: asked for by digest and path, held in one of the engine's slots.

    Adapters.get ─> HeldAdapter ─(loaded)─> a slot: its requests' tokens are computed with it

An adapter is no state of a request: one that lost its slot while nobody computed with it is loaded again. What decides
about slots is in `worker/adapters.py`, what loads in `engine/adapters.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec

NO_ADAPTER = -1  # the slot of rows without one
MAX_ADAPTERS = 1024  # slots of a worker


class AdapterTask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Load an adapter into a slot, on every rank, and forget others in host memory first."""

    digest: Annotated[str, msgspec.Meta(max_length=128)]
    path: Annotated[str, msgspec.Meta(max_length=4096)]
    slot: int
    forgotten: tuple[str, ...] = ()


class AdapterResult(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A rank's answer: it has the adapter in the slot, or why it has not."""

    digest: str
    slot: int
    error: str = ""


class AdapterLoader(Protocol):
    """A loader carries out tasks, in order. It is called under the worker's lock."""

    wake: Callable[[], None]  # called when there are results, on any thread
    num_slots: int
    num_host: int  # adapters that host memory keeps, those in slots among them

    def submit(self, task: AdapterTask) -> None: ...
    def results(self) -> list[AdapterResult]: ...


class HeldAdapter(Protocol):
    """An adapter on one worker. What it says changes under the worker's lock alone."""

    @property
    def slot(self) -> int | None:
        """Return where the engine has it; None: nowhere yet, and no token of its requests may be computed."""
        ...

    @property
    def is_open(self) -> bool:
        """Tell whether requests may begin with it; those that have begun go on where it has a slot."""
        ...

    @property
    def failure(self) -> str:
        """Say why it cannot be loaded; empty: it can, as far as is known."""
        ...


class Adapters(Protocol):
    """The adapters of a worker."""

    def get(self, digest: str, path: str) -> HeldAdapter:
        """Return the adapter at once, and see that it is loaded if it is not here. Who waits for it is woken."""
        ...
