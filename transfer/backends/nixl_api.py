"""NIXL's Python API, which has no annotations: where its wheel is, its agents, and its errors as ours.

There is a wheel for each version of CUDA, and the one for torch's is taken.

There is no progress thread, which would spin on a core: whoever waits polls, and polling makes progress.

An agent is gone for certain only when no object of this API refers to it any more: prepared descriptors and
the handles of writes do. Destroying one keeps its registered memory.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import structlog

from ...common.errors import ConfigError, TransferError
from ...common.extras import nixl

log = structlog.get_logger(__name__)


class NixlApi:
    """`NixlApi` opens agents. Raises ConfigError where there is no wheel."""

    def __init__(self) -> None:
        self._module = load_api()
        bindings = importlib.import_module(f"{self._module.__package__}._bindings")
        self.errors: tuple[type[Exception], ...] = tuple(
            value for key, value in vars(bindings).items() if key.startswith("nixl") and key.endswith("Error")
        )
        self._counts = True  # NIXL does, as far as is known

    def open_agent(self, name: str) -> Any:
        """Make an agent. Raises TransferError."""
        config = self._module.nixl_agent_config(enable_prog_thread=False, capture_telemetry=True, backends=["UCX"])
        with self.raising("making an agent", name):
            return self._module.nixl_agent(name, config)

    def counted_bytes(self, agent: Any, request: object) -> int | None:
        """Return how many bytes a request that is done has moved, as NIXL counted; None: it counts nothing.

        The operator may have turned its counts off (NIXL_TELEMETRY_ENABLE=n). Then it is not asked again: it writes a
        line about each time.
        """
        if self._counts:
            try:
                return int(agent.get_xfer_telemetry(request).totalBytes)
            except self.errors as error:
                self._counts = False
                log.warning("nixl_counts_no_bytes", reason=str(error), instead="what is posted is counted when it ends")
        return None

    @contextmanager
    def raising(self, what: str, peer: str) -> Iterator[None]:
        """Raise NIXL's own exceptions as TransferError."""
        try:
            yield
        except self.errors as error:
            raise TransferError(f"{what} ({peer}): {error}", peer=peer) from error


def load_api(packages: Sequence[str] | None = None) -> ModuleType:
    """NIXL's Python API, from the wheel for torch's CUDA if that is there. Raises ConfigError where there is none."""
    library, reason = nixl(), ""
    for package in library.modules if packages is None else packages:
        try:
            api = importlib.import_module(f"{package}._api")
        except ImportError as error:  # of the package `nixl` too, where it finds no build for this CUDA
            is_absent = isinstance(error, ModuleNotFoundError) and error.name in (package, f"{package}._api")
            reason = reason if is_absent else f" ({error})"
            continue
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it announces every agent on stdout
        return api
    raise ConfigError(f"transfer: {library.missing}{reason}; or choose --transfer ucx")
