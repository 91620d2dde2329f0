"""The adapters that a router serves beside its models: read, checked and named here, loaded by workers.

    name, directory ─> `read` ─> `Catalogue.add_adapter`: from then on requests name it like a model

A request keeps the bytes' digest that its name stood for when it came. So a name that is loaded anew changes no answer
under way, and finds no KV of what it was before.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import structlog

from ...common.errors import ConfigError, RequestError
from ...models.adapter import inspect_adapter
from ...models.config import ModelConfig
from ..state.adapter_use import AdapterUse
from ..state.errors import clip
from .catalogue import Catalogue

_MAX_READS = 4  # at once

log = structlog.get_logger(__name__)


class AdapterNames:
    """Loads and unloads under names. Used on the event loop."""

    def __init__(self, catalogue: Catalogue, model: ModelConfig, max_rank: int) -> None:
        self._catalogue = catalogue
        self._model = model
        self._max_rank = max_rank
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by name, while somebody has it
        # A file of a mount that hangs holds one of these, and none of the threads by which the router does all else.
        self._reading = ThreadPoolExecutor(_MAX_READS, thread_name_prefix="adapters")

    def add(self, name: str, path: str, base: str | None = None) -> None:
        """Serve an adapter. Reads its files. Raises ConfigError."""
        self._catalogue.add_adapter(name, self._read(path), base)

    def _read(self, path: str) -> AdapterUse:
        try:
            where = Path(path).expanduser().absolute()
            adapter = inspect_adapter(where)
        except (OSError, RuntimeError, ValueError) as error:  # a name that no file can have, or of nobody's folder
            raise ConfigError(f"{clip(path, 256)} cannot be read: {error}") from error
        try:
            adapter.check(self._model, self._max_rank)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        return AdapterUse(adapter.digest, str(where), adapter.num_bytes)

    async def load(self, name: str, path: str, *, in_place: bool, base: str | None = None) -> None:
        """Serve an adapter from now on. Raises RequestError (400, 404), and leaves what there was then."""
        async with self._turn(name):
            known = self._catalogue.adapter(name)
            if known is not None and not in_place:
                raise RequestError(
                    f"The lora adapter {clip(name)} has already been loaded. If you want to load the adapter in place, "
                    "set 'load_inplace' to True.",
                    param="lora_name",
                )
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._reading, self._read, path)
                self._catalogue.add_adapter(name, found, base)
            except ConfigError as error:
                raise RequestError(str(error), param="lora_path") from error
            log.info("adapter_loaded", name=name, path=found.path, digest=found.digest)

    async def unload(self, name: str) -> None:
        """Serve it no longer; answers under way go on. Raises RequestError (404)."""
        async with self._turn(name):
            if not self._catalogue.remove_adapter(name):
                raise RequestError(f"The lora adapter {clip(name)} cannot be found.", param="lora_name", status=404)
            log.info("adapter_unloaded", name=name)

    def _turn(self, name: str) -> asyncio.Lock:
        """Return what lets one after the other load and unload under this name."""
        return self._turns.setdefault(name, asyncio.Lock())
