"""Request classes: what a request is to get, by the name that it comes with.

A request names its class in the header x-request-class; one that names none is of the class "default", which the
flags describe. A class has what its own entry says: it inherits no objective, only the stretch. A request's own
`priority` goes before its class's; of its x-request-timeout-s and its class's deadline the sooner counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...common.errors import RequestError
from ...common.router_config import RequestClass, RouterConfig
from .errors import clip
from .objectives import DEFAULT_CLASS, NO_OBJECTIVES, Objectives

CLASS_HEADER = "x-request-class"
TIMEOUT_HEADER = "x-request-timeout-s"
MAX_TIMEOUT_S = 86400.0


class RequestClasses:
    """The classes of one router: the default one and those that its configuration names."""

    def __init__(self, default: Objectives = NO_OBJECTIVES, others: Mapping[str, Objectives] | None = None) -> None:
        self._by_name = {DEFAULT_CLASS: default, **(others or {})}

    @classmethod
    def from_config(cls, config: RouterConfig) -> RequestClasses:
        default = Objectives(
            ttft_s=_seconds(config.ttft_objective_ms),
            ttft_stretch=config.ttft_stretch,
            tpot_s=_seconds(config.tpot_objective_ms),
        )
        return cls(default, {known.name: _objectives(known, config) for known in config.classes})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def named(self, name: str) -> Objectives:
        """Raises RequestError (400) where there is no such class."""
        known = self._by_name.get(name)
        if known is None:
            raise RequestError(
                f"{CLASS_HEADER}: there is no class {clip(name)}; known: {', '.join(sorted(self._by_name))}",
                param=CLASS_HEADER,
                code="unknown_request_class",
            )
        return known

    def timeout_s(self, name: str, asked: str | None) -> float | None:
        """Return the seconds that a request of this class has; None: no limit. `asked`: what its own header says.

        Raises RequestError (400).
        """
        limits = (None if asked is None else _parse_timeout(asked), self.named(name).deadline_s)
        return min((limit for limit in limits if limit is not None), default=None)


def _objectives(known: RequestClass, config: RouterConfig) -> Objectives:
    return Objectives(
        ttft_s=_seconds(known.ttft_objective_ms),
        ttft_stretch=config.ttft_stretch if known.ttft_stretch is None else known.ttft_stretch,
        tpot_s=_seconds(known.tpot_objective_ms),
        priority=known.priority,
        deadline_s=known.deadline_s,
        weight=known.weight,
    )


def _parse_timeout(text: str) -> float:
    """Seconds that the client gives the whole answer. Raises RequestError (400)."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:  # also NaN
        raise RequestError(
            f"{TIMEOUT_HEADER}: {clip(text)} is no number of seconds above 0 and up to {MAX_TIMEOUT_S:g}",
            param=TIMEOUT_HEADER,
        )
    return seconds


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
