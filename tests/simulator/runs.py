"""Small runs that the tests share. Router logs are of no interest here."""

from __future__ import annotations

from dataclasses import replace

from kvferry.simulator import Fleet, Outcome, Router, Scenario, Traffic
from kvferry.simulator.world import World
from kvferry.tools.load.traces import TraceRow


def azure(rate_per_s: float = 10.0, num_requests: int = 120, **fleet: object) -> Scenario:
    return Scenario(
        traffic=Traffic("sample:azure-2023-conv", rate_per_s=rate_per_s, num_requests=num_requests),
        fleet=replace(Fleet(prefill=2, decode=2), **fleet),  # type: ignore[arg-type]
    )


def mooncake(rate_per_s: float = 2.0, num_requests: int = 60, **fleet: object) -> Scenario:
    return Scenario(
        traffic=Traffic("sample:mooncake-conversation", rate_per_s=rate_per_s, num_requests=num_requests),
        fleet=replace(Fleet(prefill=2, decode=2), **fleet),  # type: ignore[arg-type]
    )


def one_request(num_prompt_tokens: int, num_output_tokens: int, **fleet: object) -> Scenario:
    row = TraceRow(0.0, num_prompt_tokens, num_output_tokens)
    return Scenario(
        traffic=Traffic((row,)),
        fleet=replace(Fleet(prefill=1, decode=1), **fleet),  # type: ignore[arg-type]
        router=Router(knows_objectives=False),
        message_s=0.0,
    )


def run(scenario: Scenario) -> tuple[World, Outcome]:
    world = World(scenario)
    return world, world.run()
