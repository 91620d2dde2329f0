"""Each router is told how often experts were chosen: not with every heartbeat, as there may be thousands of numbers."""

from __future__ import annotations

from collections.abc import Callable

from ..common.clock import Clock
from ..wire.workers import MAX_EXPERT_COUNTS, ExpertLoads

REPORT_S = 5.0  # between two reports: an imbalance over less is noise, one over more is late


class ExpertReports:
    """`ExpertReports` says when a router's next report is due, and what is in it."""

    def __init__(self, count: Callable[[], ExpertLoads], clock: Clock) -> None:
        self._count = count
        self._clock = clock
        self._told: dict[str, tuple[float, ExpertLoads]] = {}  # by router: when, and what

    def due(self, router_id: str) -> ExpertLoads:
        """Return what the router's next heartbeat tells; () where nothing is due, or nothing new."""
        now, (told_s, told) = self._clock.now(), self._told.get(router_id, (float("-inf"), ()))
        if now < told_s + REPORT_S:
            return ()
        found = self._count()
        self._told[router_id] = (now, found)
        if found == told or sum(len(layer.taken) for layer in found) > MAX_EXPERT_COUNTS:
            return ()
        return found

    def forget(self, router_id: str) -> None:
        """Have a router that is gone, or new, told everything."""
        self._told.pop(router_id, None)
