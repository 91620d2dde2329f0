"""A simulated cluster: production's own router and workers' core in virtual time, engines as step-time models.

    from kvferry.simulator import Fleet, Router, Scenario, Traffic, capacity, simulate

    scenario = Scenario(
        traffic=Traffic(trace="mooncake-conversation", part="first", rate_per_s=4.0),
        fleet=Fleet(prefill=4, decode=4, gpu="H100", model="70B", gpus_per_worker=4),
        router=Router(policy="slo"),
    )
    outcome = simulate(scenario)          # Outcome: .attainment, .goodput_per_s, .ttft_ms, .tpot_ms, .hit_rate, ...
    best = capacity(scenario, share=0.9)  # Capacity: .rate_per_s, .goodput_per_s

A trace is a name (downloaded and checked), "sample:NAME" (its beginning, from the repository), a path, or rows.
`Fleet(prefill=0, ...)` is colocated. `Router(make_policy=...)` takes a policy that has no name yet.
"""

from __future__ import annotations

from .outcome import Outcome, RequestOutcome
from .scenario import Adapters, Day, Drafts, Failure, Fleet, Goals, RoleChange, Router, Scaled, Scenario, Spike, Traffic
from .simulate import Capacity, at_rate, capacity, quiet_simulation, simulate

__all__ = [
    "Adapters",
    "Capacity",
    "Day",
    "Drafts",
    "Failure",
    "Fleet",
    "Goals",
    "Outcome",
    "RequestOutcome",
    "RoleChange",
    "Router",
    "Scaled",
    "Scenario",
    "Spike",
    "Traffic",
    "at_rate",
    "capacity",
    "quiet_simulation",
    "simulate",
]
