"""Planted bugs of the autoscaler and of what it asks the launcher for."""

from __future__ import annotations

from typing import Any

from kvferry.router.autoscaler import scaling, way
from kvferry.router.autoscaler.members import FleetMembers

from .planting import Planted

_MANY = 99


def _spare_all(*_: Any) -> int:
    """A pool's other workers are on their way: the one that takes work may change its role."""
    return _MANY


def _forget(*_: Any) -> None:
    """A worker counts as of its old role until it says otherwise."""


BUGS = (
    Planted(
        "a pool's last worker is taken away",
        frozenset({"A1"}),
        patches=((way, "_num_spared", _spare_all),),
        within_seeds=400,
    ),
    Planted(
        "a role given a moment ago is forgotten",
        frozenset({"A1"}),
        patches=((FleetMembers, "give_role", _forget),),
        within_seeds=400,
    ),
    Planted(
        "the launcher is asked again before it has answered",
        frozenset({"A2"}),
        patches=((scaling, "_ANSWER_S", 0.0),),
        within_seeds=400,
    ),
)
