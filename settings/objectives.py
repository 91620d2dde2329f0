"""Settings of what requests are to get, and of who decides where they run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..common.config import Settings
from ..common.router_config import PolicyName
from .option import ALL, FRONTS, Option
from .values import Classes, Objective


class ObjectiveSettings(Settings):
    """Objectives and classes."""

    policy: Annotated[PolicyName, Option("Objectives", "Who decides where a request runs.", FRONTS)] = "slo"
    ttft_objective_ms: Annotated[
        Objective,
        Option(
            "Objectives",
            "Time to the first token; what would wait longer is refused at once (429). Default: all wait.",
            FRONTS,
        ),
    ] = None
    ttft_stretch: Annotated[
        Annotated[float, Field(ge=1)],
        Option("Objectives", "A long prompt may take so many times its time on empty workers instead.", FRONTS),
    ] = 3.0
    tpot_objective_ms: Annotated[
        Objective, Option("Objectives", "Mean time per token after the first. Default: none.", ALL)
    ] = None
    classes: Annotated[
        Classes,
        Option(
            "Objectives",
            "A class that requests name by header x-request-class: NAME:KEY=VALUE,KEY=VALUE with ttft_objective_ms, "
            "ttft_stretch, tpot_objective_ms, priority, deadline_s or weight. Repeatable.",
            FRONTS,
        ),
    ] = ()
    explain: Annotated[
        bool, Option("Objectives", "Keep every placement's candidates for /admin/requests, not some's.", FRONTS)
    ] = False
