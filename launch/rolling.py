"""A rolling restart: every worker and then every router, one at a time, while the others serve.

    all are there ─> for each: SIGTERM ─> it drains ─> exit ─> start ─> ready ─> all are there again ─> the next
    all: every router runs and has every worker as ready

It stops at the first that does not come back, and begins with none while another is missing: what still serves is left
alone, and the launcher goes on trying. What it waits for is told, and it waits for so long at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..common.clock import Clock
from .process import Child, ChildState
from .routers import RouterGroup

ALONE_DRAIN_S = 10.0  # nobody else does its work: what it still does goes on in its next life, and others wait
MISSING_LIMIT_S = 120.0  # for one that is missing; it may have a large model to load


class Roll:
    """One rolling restart, of everything or of the process of one name."""

    def __init__(
        self,
        routers: RouterGroup,
        workers: Sequence[Child],
        roles: Callable[[], Mapping[str, str]],
        clock: Clock,
        note: Callable[[str], None],
        *,
        only: str | None = None,
    ) -> None:
        """`workers`: as they come and go until it begins; `roles`: theirs at the moment, by name."""
        self.is_under_way = False  # before a process is asked to end: until then it may be cancelled
        self._routers = routers
        self._workers = workers
        self._roles = roles
        self._clock = clock
        self._note = note
        self._only = only

    async def run(self) -> bool:
        """Restart them; whether all came back."""
        only = self._only
        if only is not None:
            self._note(f"restart of {only}")
        if missing := await self._missing(but=only):
            self._note(f"no restart: {missing}")
            return False
        children = [child for child in (*self._workers, *self._routers.children) if only in (None, child.name)]
        children = [child for child in children if not child.is_retired]
        if not children:
            self._note(f"no restart: {only} has gone")
            return False
        if only is None:
            self._note(f"rolling restart of {len(children)} processes")
        began = self._clock.now()
        try:
            failure = await self._restart_each(children)
        finally:
            self.is_under_way = False
        seconds = self._clock.now() - began
        self._note(f"rolling restart stopped: {failure}" if failure else f"rolling restart done in {seconds:.1f} s")
        return not failure

    async def _restart_each(self, children: Sequence[Child]) -> str:
        """Restart one after the other; why it stopped. Empty: all are back."""
        for number, child in enumerate(children, start=1):
            if child.is_retired:
                continue
            roles = self._roles()  # routers change them meanwhile, and who comes back has its first one
            role = roles.get(child.name)
            is_alone = role is not None and list(roles.values()).count(role) == 1
            is_up = child.state is ChildState.READY
            self.is_under_way |= is_up
            what = "drains" if is_up else "is down, and waited for"
            self._note(f"rolling restart {number}/{len(children)}: {child.name} {what}")
            if not await child.restart(ALONE_DRAIN_S if is_alone else None):
                return f"{child.name} did not come back"
            if missing := await self._missing():
                return missing
        return ""

    async def _missing(self, but: str | None = None) -> str:
        """Wait until all but this one are there; say who is missing after all. Empty: nobody is."""

        def tell(missing: str) -> None:
            self._note(f"waits for others: {missing}")

        missing = await self._routers.wait_until_whole(self._workers, MISSING_LIMIT_S, tell, but=but)
        return f"others are missing after {MISSING_LIMIT_S:g} s: {missing}" if missing else ""
