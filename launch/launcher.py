"""What every launcher does, and what both share."""

from __future__ import annotations

from typing import Protocol

from ..common.plan import Deployment
from ..common.process import ChildTimes

_DRAIN_SLACK_S = 10.0  # to SIGKILL, after a child should have ended by itself


class Launcher(Protocol):
    """Owns the processes of one deployment."""

    async def run(self) -> None:
        """Until `stop`, or until something cannot start (raises). Nothing is left behind either way."""
        ...

    def stop(self) -> None:
        """End everything soon; at once, if it is ending already."""
        ...

    def drain(self) -> None:
        """Take nothing new, let what runs finish within its limit, then end; at once, if it is ending already."""
        ...

    def restart(self) -> None:
        """Restart every process, one after the other, while the others serve."""
        ...


def child_times(deployment: Deployment) -> ChildTimes:
    return ChildTimes(drain_s=deployment.router.drain_timeout_s + _DRAIN_SLACK_S)
