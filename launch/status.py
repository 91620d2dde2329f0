"""`kvferry status` shows a deployment's address, and each process with its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .process import Child, ChildState
from .routers import RouterGroup


def describe_deployment(
    routers: RouterGroup | None, workers: Sequence[Mapping[str, object]], *, model: str, state: str, launcher: str
) -> dict[str, object]:
    """Put together what is known. `routers`: None before there are any; `workers`: rows as `describe_child` makes."""
    url = routers.url if routers is not None and routers.is_bound else None
    rows = [] if routers is None else [describe_router(routers, index) for index in range(len(routers.routers))]
    return {
        "state": state,
        "model": model,
        "launcher": launcher,
        "http": url,
        "admin": routers.admin_urls if routers is not None else [],
        "experts": routers.experts if routers is not None else None,
        "processes": [*rows, *workers],
    }


def describe_router(routers: RouterGroup, index: int) -> dict[str, object]:
    router = routers.routers[index]
    row = describe_child(router.child, "router")
    return row | {"waits_for": router.lacks} if router.child.state is ChildState.READY else row


def describe_child(child: Child, role: str) -> dict[str, object]:
    state = "draining" if child.is_ending else child.state.value
    return {"name": child.name, "role": role, "state": state, "pid": child.pid, "restarts": child.num_restarts}
