"""A rolling restart: every worker and then every router, one at a time, while the others serve.

    for each: SIGTERM ─> it drains ─> exit ─> start ─> ready ─> every router has every worker again ─> the next

It stops at the first that does not come back: what still serves is left alone, and the launcher goes on trying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..common.clock import Clock
from .process import Child
from .routers import RouterGroup

ALONE_DRAIN_S = 10.0  # nobody else does its work: what it still does goes on in its next life, and others wait


async def roll(
    routers: RouterGroup,
    workers: Sequence[Child],
    roles: Mapping[str, str],
    clock: Clock,
    note: Callable[[str], None],
    *,
    only: str | None = None,
) -> bool:
    """Restart everything, or `only` the process of that name; whether all came back. `roles`: of workers, by name."""
    children = [child for child in (*workers, *routers.children) if only in (None, child.name)]
    began = clock.now()
    note(f"rolling restart of {len(children)} processes" if only is None else f"restart of {only}")
    await routers.wait_until_whole(workers)
    for number, child in enumerate(children, start=1):
        if child.is_retired:
            continue
        role = roles.get(child.name)
        is_alone = role is not None and list(roles.values()).count(role) == 1
        note(f"rolling restart {number}/{len(children)}: {child.name} drains")
        if not await child.restart(ALONE_DRAIN_S if is_alone else None):
            note(f"rolling restart stopped: {child.name} did not come back")
            return False
        await routers.wait_until_whole(workers)
    note(f"rolling restart done in {clock.now() - began:.1f} s")
    return True
