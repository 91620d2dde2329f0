"""The interface of launchers, and what both share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .plan import Deployment
from .process import ChildTimes

_DRAIN_SLACK_S = 10.0  # to SIGKILL, after a child should have ended by itself


class Launcher(Protocol):
    """Owns the processes of one deployment."""

    async def run(self) -> None:
        """Serve until `stop`, or until something cannot start (raises). Nothing is left behind either way."""
        ...

    @property
    def is_ending(self) -> bool:
        """Say whether `stop` or `drain` was called."""
        ...

    def stop(self) -> None:
        """End everything soon; at once, if it is ending already."""
        ...

    def drain(self) -> None:
        """Take nothing new, let what runs finish within its limit, then end; at once, if it is ending already."""
        ...

    async def restart(self, note: Callable[[str], None], name: str | None = None) -> bool:
        """Restart every process, or the one of this name, one after the other while the others serve.

        Each step is told by `note`. False: it could not begin, or stopped at one that did not come back. Cancelled, it
        is given up if it only waits yet; what has begun goes on.
        """
        ...

    async def reload(self) -> list[str]:
        """Let every process read its keys, secrets and certificates again; why some could not. Nothing restarts."""
        ...

    def status(self) -> dict[str, object]:
        """Describe the deployment as `kvferry status` shows it; all of it is JSON."""
        ...


def child_times(deployment: Deployment) -> ChildTimes:
    return ChildTimes(drain_s=deployment.router.drain_timeout + _DRAIN_SLACK_S)
