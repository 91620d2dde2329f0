"""An agent names the network devices over which it is reached in its metadata; one made during an outage names fewer.

UCX looks for devices when an agent is made, and never again: what is missing then stays so until the agent is replaced.
"""

from __future__ import annotations

import structlog

log = structlog.get_logger(__name__)


class Reach:
    """`Reach` compares the agents of one rank, which follow one another."""

    def __init__(self) -> None:
        self._most_bytes = 0

    def note(self, agent: str, metadata: bytes) -> None:
        """Take the next agent's. All else in it is as long as before or, as its name, longer."""
        if len(metadata) < self._most_bytes:
            log.warning(
                "transfer_agent_lacks_devices",
                agent=agent,
                reason="a network device that an earlier agent had was not found: transfers take another, or fail",
                remedy="bring it up; the agent finds it when it is replaced again",
            )
        self._most_bytes = max(self._most_bytes, len(metadata))
