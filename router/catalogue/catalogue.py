"""The versions of models that this router serves.

    a request names a model ─> `version` ─> its tokenizer, template, limits and dispatcher
    a worker says hello     ─> one of the versions as groups of workers (dispatch/worker_group.py)
    metrics, /v1/models, operators, the timer ─> every version in turn

One version is entered today (assembly.py); nothing else relies on that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from ...common.errors import ConfigError, RequestError
from ..state.adapter_use import AdapterUse
from ..state.errors import clip
from ..state.views import PoolView
from .version import Version

_MAX_NAME = 256  # characters; of the wire's names (wire/fields.py)
_MAX_LISTED = 32  # names in an error


class Catalogue:
    """Versions by the names that clients give. A request that names none gets the first."""

    def __init__(self, versions: Sequence[Version]) -> None:
        self._by_name = {version.model.name: version for version in versions}
        assert versions and len(self._by_name) == len(versions)
        self._default = versions[0]
        self._aliases: dict[str, Version] = {}
        self._adapted: dict[str, Version] = {}

    def add_alias(self, alias: str, name: str) -> None:
        """Let requests ask for the model `name` by another name too. Answers, metrics and workers have its own."""
        assert alias not in self._by_name
        self._aliases[alias] = self._by_name[name]

    # --- adapters ---------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, adapter: AdapterUse, base: str | None = None) -> None:
        """Serve an adapter of the model `base` (None: of the first) as a model. Raises ConfigError for a taken name."""
        if self._model(name) is not None:
            raise ConfigError(f"{name!r} is the name of the model")
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise ConfigError(f"an adapter's name has 1 to {_MAX_NAME} printable characters")
        self._adapted[name] = self._of_model(base).with_adapter(name, adapter)

    def _of_model(self, name: str | None) -> Version:
        if name is None:
            return self._default
        if (version := self._model(name)) is None:
            raise ConfigError(f"the base model {clip(name)} does not exist")
        return version

    def _model(self, name: str) -> Version | None:
        return self._by_name.get(name) or self._aliases.get(name)

    def remove_adapter(self, name: str) -> bool:
        """False: there is none of this name."""
        return self._adapted.pop(name, None) is not None

    def adapter(self, name: str) -> Version | None:
        return self._adapted.get(name)

    def shown(self) -> list[tuple[str, Version]]:
        """Return all that requests may name: models, their other names, then their adapters."""
        return [*self._by_name.items(), *self._aliases.items(), *self._adapted.items()]

    def __iter__(self) -> Iterator[Version]:
        return iter(self._by_name.values())

    def version(self, name: str | None, *, generates: bool = False) -> Version:
        """Return the version that a request for this model gets. Raises RequestError (404).

        `generates`: the request asks for an answer, which a model without a head has not (400).
        """
        version = self._default if name is None else self._named(name)
        if generates and not version.model.generates:
            text = f"the model '{version.model.name}' has no head: it makes embeddings alone (/v1/embeddings)"
            raise RequestError(text, param="model")
        return version

    def _named(self, name: str) -> Version:
        version = self._model(name) or self._adapted.get(name)
        if version is None:
            names = ", ".join(f"'{known}'" for known, _ in self.shown()[:_MAX_LISTED])
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
