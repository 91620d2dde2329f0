"""The versions of models that this router serves.

    a request names a model ─> `version` ─> its tokenizer, template, limits and dispatcher
    a worker says hello     ─> one of the versions as groups of workers (dispatch/worker_group.py)
    metrics, /v1/models, operators, the timer ─> every version in turn

One version is entered today (assembly.py); nothing else relies on that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from ...common.errors import RequestError
from ..state.errors import clip
from ..state.views import PoolView
from .version import Version


class Catalogue:
    """Versions by the names that clients give. A request that names none gets the first."""

    def __init__(self, versions: Sequence[Version]) -> None:
        self._by_name = {version.model.name: version for version in versions}
        assert versions and len(self._by_name) == len(versions)
        self._default = versions[0]

    def __iter__(self) -> Iterator[Version]:
        return iter(self._by_name.values())

    def version(self, name: str | None) -> Version:
        """Return the version that a request for this model gets. Raises RequestError (404)."""
        if name is None:
            return self._default
        version = self._by_name.get(name)
        if version is None:
            names = ", ".join(f"'{known}'" for known in self._by_name)
            raise RequestError(
                f"the model {clip(name)} does not exist; this server has {names}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return version

    @property
    def max_model_len(self) -> int:
        """The longest context of all models."""
        return max(version.model.max_model_len for version in self)

    def views(self) -> list[tuple[str, PoolView]]:
        """Return each model's name and workers."""
        return [(version.model.name, version.dispatcher.view()) for version in self]

    def ready(self) -> list[str]:
        """Return why some request would not be answered now; empty: every version can serve."""
        return list(dict.fromkeys(reason for version in self for reason in version.dispatcher.ready()))

    def start(self) -> None:
        """Do now what would make the first client wait."""
        for version in self:
            if version.renderer is not None:
                version.renderer.start()

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, of any version; what is left after `timeout_s` fails."""
        await asyncio.gather(*(version.dispatcher.drain(timeout_s) for version in self))

    def close(self) -> None:
        """End the processes that render chats and compile grammars."""
        for version in self:
            for helper in (version.renderer, version.grammars):
                if helper is not None:
                    helper.close()
