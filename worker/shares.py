"""Several routers share a worker: each that has work here, or has sent some lately, may use an equal part.

What a router does not use flows back to the others with the next heartbeat, which tells each of them its share.
"""

from __future__ import annotations

from collections.abc import Collection

from ..common.clock import Clock

LATELY_S = 1.0


class RouterShares:
    """Kept by a worker."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._work_s: dict[str, float] = {}  # when each sent work

    def note_work(self, router_id: str) -> None:
        """Note that a router has sent work, whether that is taken or not."""
        self._work_s[router_id] = self._clock.now()

    def share(self, router_id: str, working: Collection[str]) -> float:
        """Return a router's share of the worker, used now or from now on. `working`: those that have work here."""
        since = self._clock.now() - LATELY_S
        self._work_s = {other: at_s for other, at_s in self._work_s.items() if at_s > since}
        return 1.0 / len({router_id, *working, *self._work_s})
