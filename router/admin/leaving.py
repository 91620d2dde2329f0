"""An order for the launcher that comes when this router is ending already: nobody would carry it out."""

from __future__ import annotations

from collections.abc import Callable

from ...common.errors import RequestError

IsLeaving = Callable[[], bool]


def check_stays(is_leaving: IsLeaving) -> None:
    """Refuse the order in time. Raises RequestError."""
    if is_leaving():
        raise RequestError(
            "this router is ending, and perhaps its deployment: ask another router, or the next one here",
            code="shutting_down",
            status=409,
        )


def never_leaving() -> bool:
    """Return what is so of a router that nobody ends."""
    return False
