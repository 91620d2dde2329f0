"""An agent names the network devices over which it is reached in its metadata; one made during an outage names fewer.

UCX looks for devices when an agent is made, and never again: what is missing then stays so until the agent is replaced.
"""

from __future__ import annotations

import structlog

REPAIR_S = 30.0  # after a replacement that left an agent without a device; twice as long after each that mended nothing
MAX_REPAIR_S = 1800.0

log = structlog.get_logger(__name__)


class Reach:
    """`Reach` compares the agents of one rank, which follow one another."""

    def __init__(self) -> None:
        self._most_bytes = 0
        self.is_whole = True  # the latest names every device that an earlier one had

    def take(self, metadata: bytes) -> bool:
        """Take the next agent's, and tell whether it is whole. All else in it is as long as before or, as its name,
        longer."""
        self.is_whole = len(metadata) >= self._most_bytes
        self._most_bytes = max(self._most_bytes, len(metadata))
        return self.is_whole


class Repair:
    """`Repair` says when agents that lack a device are to be replaced again."""

    def __init__(self) -> None:
        self.at: float | None = None  # None: they lack nothing
        self._pause_s = REPAIR_S

    def is_due(self, now: float) -> bool:
        return self.at is not None and now >= self.at

    def replaced(self, now: float, *, are_whole: bool) -> None:
        """Note that there are new ones."""
        if are_whole:
            self.at, self._pause_s = None, REPAIR_S
        else:
            self.at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, MAX_REPAIR_S)

    def put_off(self, now: float) -> None:
        """Try later: nothing was replaced, as handoffs are open."""
        self.at = now + REPAIR_S


def tell_lack(agent: str) -> None:
    """Warn that an agent is not whole."""
    log.warning(
        "transfer_agent_lacks_devices",
        agent=agent,
        reason="a network device that an earlier agent had was not found: transfers take another, or fail",
        remedy="bring it up; the agent finds it when it is replaced again",
    )
