"""Requests about the fleet as a launcher takes them, without processes: who is heard, for how long, what is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvferry.launch.fleet import Fleet
from kvferry.launch.host import Host
from kvferry.launch.plan import fit_to_host, plan
from kvferry.launch.routers import RouterGroup
from kvferry.launch.scale_requests import ScaleRequests
from kvferry.settings.fields import ServeSettings
from kvferry.settings.pools import PoolSettings

from ..fake_clock import FakeClock


class Site:
    """Two routers, of which the first decides, and one worker of each pool, up to two and three."""

    def __init__(self) -> None:
        settings = ServeSettings(
            prefill=PoolSettings(workers=1, max_workers=2), decode=PoolSettings(workers=1, max_workers=3)
        )
        host = Host(num_cpus=4, free_memory_bytes=1 << 30)
        self.clock = FakeClock()
        self.started: list[str] = []
        self.retired: list[tuple[str, bool]] = []
        self.notes: list[str] = []
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.children = [SimpleNamespace(name=name) for name in ("router-0", "router-1")]
        self.leader = self.children[0]
        self.requests = ScaleRequests(
            Fleet(fit_to_host(plan(settings, Path("model"), "m"), host)),
            self.clock,
            self.notes.append,
            start=lambda plan: self.started.append(plan.config.worker_id),
            retire=lambda name, drains: self.retired.append((name, drains)),
        )
        self.requests.serve(cast(RouterGroup, self))

    def tell(self, event: dict[str, Any], *, to: Any) -> None:
        self.told.append((to.name, event))

    def say(self, event: str, *, router: str = "router-0", **more: object) -> None:
        self.requests.on_event(router, {"event": event, **more})

    def scale(self, *, router: str = "router-0", **more: object) -> None:
        self.say("scale", router=router, reason="a test", **more)

    @property
    def fleets(self) -> dict[str, dict[str, Any]]:
        """The last word about the fleet to each router."""
        return {name: event for name, event in self.told if event["event"] == "fleet"}


@pytest.fixture
def site() -> Site:
    return Site()


def test_the_leaders_wishes_alone_are_carried_out_and_all_hear_of_it(site: Site) -> None:
    site.scale(seq=4, add={"decode": 1}, router="router-1")
    assert not site.started and site.fleets["router-0"]["seq"] == -1
    site.scale(seq=5, add={"decode": 1, "prefill": 1}, remove=["p-0"], lost=["d-0", "nobody"], desired=[1, 2])
    assert site.started == ["d-1", "p-1"]
    assert site.retired == [("p-0", False), ("d-0", True)]
    assert site.notes == ["workers +d-1 +p-1 -p-0 -d-0: a test"]
    for name, fleet in site.fleets.items():
        assert fleet["workers"] == {"d-1": "decode", "p-1": "prefill"} and fleet["leaving"] == ("d-0", "p-0")
        assert (fleet["seq"], fleet["desired"], fleet["leader"]) == (5, [1, 2], name == "router-0")
    site.requests.on_worker_ended("p-0")
    assert site.fleets["router-1"]["leaving"] == ("d-0",)


def test_what_another_router_saw_is_passed_on_to_the_leader(site: Site) -> None:
    num_told = len(site.told)
    for router in ("router-0", "router-1"):
        site.say("load", router=router, num_queued=1)
    assert site.told[num_told:] == [("router-0", {"event": "load", "num_queued": 1})]


def test_an_operators_counts_are_told_with_the_seconds_that_are_left_and_lapse(site: Site) -> None:
    site.say("hold", counts=[1, 2], for_s=60, router="router-1")
    site.clock.advance(20.0)
    site.say("ready", router="router-1")
    assert site.fleets["router-1"]["held"] == [1, 2, 40.0]
    site.clock.advance(40.0)
    site.say("ready", router="router-1")
    assert site.fleets["router-1"]["held"] is None


def test_after_a_worker_that_could_not_start_none_is_added_for_a_while(site: Site) -> None:
    site.scale(seq=0, add={"decode": 1})
    site.requests.on_worker_ended("d-1", "no memory")
    site.clock.advance(59.0)
    site.scale(seq=1, add={"decode": 1})
    assert site.started == ["d-1"] and site.fleets["router-0"]["seq"] == 1
    site.clock.advance(1.0)
    site.scale(seq=2, add={"decode": 9})
    assert site.started == ["d-1", "d-2", "d-3", "d-4"]  # five in all: no more than the deployment's bound
