"""Decisions carried out: roles by message, growth by wishes to the launcher, operators, other routers' loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
import msgspec
import pytest

from kvferry.common.errors import RequestError
from kvferry.common.router_config import AutoscaleConfig, AutoscaleMode, PoolBounds
from kvferry.router.access.keys import ApiKeys
from kvferry.router.admin.admin import Admin, build_admin
from kvferry.router.admin.scaling import scaling_routes
from kvferry.router.autoscaler.load_record import LoadRecord, RecordingMetrics, SeenLoad
from kvferry.router.autoscaler.scale_types import AnswerLengths, Counts, Kept
from kvferry.router.autoscaler.scaling import Scaling
from kvferry.router.state.objectives import Objectives
from kvferry.router.state.predictor import Predictor
from kvferry.wire.workers import Drain, SetRole, StepSample

from ..fleet import Fleet, Link, status

# A prompt token takes 0.1 ms, a decode step 10 ms and 0.5 ms for each row.
SAMPLES = tuple(
    [StepSample(0.002 + 1e-4 * n, prefill_tokens=n, prefill_pairs=n * n // 2) for n in (16, 64, 256, 512) * 4]
    + [StepSample(0.01 + 5e-4 * n, decode_rows=n, decode_context=100 * n) for n in (1, 4, 16, 32) * 4]
)
CONFIG = AutoscaleConfig(
    mode="on",
    prefill=PoolBounds(at_least=1, at_most=6),
    decode=PoolBounds(at_least=1, at_most=6),
    max_workers=8,
    scale_interval=1.0,
    scale_down_after=20.0,
    role_change_after=2.0,
)


class Site:
    """A router's scaling beside its dispatcher; what it tells the launcher is kept."""

    def __init__(self, mode: AutoscaleMode = "on", *, launcher: bool = True) -> None:
        self.fleet = Fleet()
        self.told: list[dict[str, Any]] = []
        self.record = LoadRecord()
        self.links: dict[str, Link] = {}
        predictor: Predictor = self.fleet.predictor
        self.scaling = Scaling(
            CONFIG.model_copy(update={"mode": mode}),
            Objectives(ttft_s=0.5, tpot_s=0.03),
            self.fleet.dispatcher,
            predictor,
            self.record,
            self.fleet.clock,
            lambda: 0.0,
            launcher=self._tell if launcher else None,
        )

    def _tell(self, event: Mapping[str, object]) -> None:
        self.told.append(dict(event))

    def join(self, *names: str) -> None:
        for name in names:
            self.links[name] = self.fleet.join(
                name, samples=SAMPLES, can_change_role=True, num_blocks=4096, max_num_seqs=64
            )

    def fleet_is(self, *, leader: bool = True, seq: int = -1, leaving: tuple[str, ...] = (), **more: object) -> None:
        """The launcher's word: who is connected is there, and those in `starting` besides."""
        starting: Any = more.pop("starting", {})
        workers = {name: "prefill" if name[0] == "p" else "decode" for name in self.links if name not in leaving}
        event = {"event": "fleet", "leader": leader, "workers": {**workers, **starting}, "leaving": list(leaving)}
        self.scaling.on_launcher({**event, "seq": seq, "held": None, "desired": [], "reason": "", **more})

    def load(self, rate: int, *, prompt: int = 500, output: int = 50) -> None:
        """So many requests in this interval, seen by another router."""
        seen = SeenLoad((prompt,) * rate, (AnswerLengths(prompt, 0, output),) * rate)
        self.scaling.on_launcher(seen.as_event())

    def interval(self, **statuses: object) -> None:
        self.fleet.clock.advance(1.0)
        for name, link in self.links.items():
            change = statuses.get(name.replace("-", "_"))
            self.fleet.dispatcher.on_message(
                link, status(num_blocks=4096, **(change if isinstance(change, dict) else {}))
            )
        self.scaling.tick()

    def run(self, seconds: int, rate: int, **lengths: int) -> None:
        for _ in range(seconds):
            self.load(rate, **lengths)
            self.interval()

    def wishes(self) -> list[dict[str, Any]]:
        return [event for event in self.told if event["event"] == "scale"]

    def roles_given(self) -> dict[str, str]:
        return {
            name: message.role
            for name, link in self.links.items()
            for message in link.sent
            if isinstance(message, SetRole)
        }


@pytest.fixture
def site() -> Site:
    site = Site()
    site.join("p-0", "d-0")
    site.fleet_is()
    return site


def test_more_load_is_a_wish_that_is_said_once_until_it_is_answered(site: Site) -> None:
    site.run(5, rate=60)
    [wish] = site.wishes()[-1:]
    assert wish["add"]["prefill"] >= 2
    assert wish["desired"][0] == 1 + wish["add"]["prefill"]
    num_wishes, desired = len(site.wishes()), site.scaling.desired
    site.fleet_is(desired=[6, 2])  # no answer to it: a worker ended, and what another router decided is told with that
    assert site.scaling.desired == desired
    site.run(5, rate=60)
    assert len(site.wishes()) == num_wishes
    added = {f"p-{n}": "prefill" for n in range(1, 1 + wish["add"]["prefill"])}
    added |= {f"d-{n}": "decode" for n in range(1, 1 + wish["add"]["decode"])}
    site.fleet_is(seq=wish["seq"], starting=added)  # they start: that is enough
    site.run(10, rate=60)
    assert not any(wish["add"]["prefill"] for wish in site.wishes()[num_wishes:])
    assert site.scaling.current().total == 2 + len(added)
    num_wishes = len(site.wishes())
    site.fleet_is(seq=wish["seq"])  # they could not start: others are asked for
    site.run(1, rate=60)
    assert any(wish["add"]["prefill"] for wish in site.wishes()[num_wishes:])


def test_an_unanswered_wish_is_repeated_after_a_while(site: Site) -> None:
    site.run(5, rate=60)
    num_wishes = len(site.wishes())
    site.run(32, rate=60)
    assert len(site.wishes()) > num_wishes


def test_a_role_is_given_to_the_emptiest_worker(site: Site) -> None:
    site.join("d-1", "d-2")
    site.fleet_is()
    for _ in range(8):
        site.load(60, output=5)
        site.interval(d_0={"num_running": 3}, d_1={"num_running": 2}, d_2={"num_running": 0})
    assert site.roles_given()["d-2"] == "prefill"
    assert "d-0" not in site.roles_given()


@pytest.mark.parametrize(
    ("first", "second", "given"),
    [
        ({"num_running": 1}, {"waiting_tokens": 32}, {"d-1": "prefill"}),  # which is half a step's
        ({"waiting_tokens": 32}, {}, {"d-1": "prefill"}),
        ({"num_running": 1}, {"state": "starting"}, {}),  # and the other is the last one that takes work
    ],
)
def test_a_prompt_that_waits_is_load_and_who_starts_keeps_its_role(
    site: Site, first: dict[str, object], second: dict[str, object], given: dict[str, str]
) -> None:
    site.join("d-1")
    site.fleet_is(held=[2, 1, None])
    site.interval(d_0=first, d_1=second)
    assert site.roles_given() == given


def test_a_worker_that_was_given_a_role_counts_in_its_new_pool_at_once(site: Site) -> None:
    site.join("d-1", "d-2", "d-3")
    site.fleet_is()
    site.run(4, rate=40, output=5)
    given = site.roles_given()
    assert given
    assert site.scaling.current().prefill == 1 + len(given)
    messages = [message for link in site.links.values() for message in link.sent if isinstance(message, SetRole)]
    assert len(messages) == len(given)  # each was told once
    site.fleet.clock.advance(5.0)
    assert site.scaling.current().prefill == 1  # none of them says that it has changed


def test_advice_changes_nothing() -> None:
    site = Site("advise")
    site.join("p-0", "d-0", "d-1", "d-2")
    site.fleet_is()
    site.run(8, rate=60)
    assert not site.roles_given()
    assert all(not any(wish["add"].values()) and not wish["remove"] for wish in site.wishes())
    desired = site.scaling.desired
    assert desired is not None and desired.prefill > 1
    assert "requests/s" in str(site.scaling.describe()["reason"])


def test_switched_off_it_decides_nothing_but_an_operators_counts_hold() -> None:
    site = Site("off")
    site.join("p-0", "d-0")
    site.fleet_is()
    site.run(5, rate=60)
    assert not site.wishes()
    assert site.scaling.desired is None
    site.scaling.hold(Counts(2, 2), None)
    assert site.told[-1] == {"event": "hold", "counts": [2, 2], "for_s": None}
    site.fleet_is(held=[2, 2, None])
    site.run(2, rate=60)
    assert site.wishes()[-1]["add"] == {"prefill": 1, "decode": 1}
    site.fleet_is(held=None)
    assert site.scaling.describe()["held"] is None


@pytest.mark.parametrize("leader", [True, False])
def test_switched_off_nothing_is_wanted_once_an_operators_counts_are_over(leader: bool) -> None:
    site = Site("off")
    site.join("p-0", "d-0")
    site.run(2, rate=60)
    held: Any = {"leader": leader, "held": [1, 2, 4.0], "desired": [1, 2]}
    site.fleet_is(**held)
    assert site.scaling.describe()["held"] == {"prefill": 1, "decode": 2, "for_s": 4.0}
    site.run(3, rate=60)
    assert site.scaling.describe()["desired"] == {"prefill": 1, "decode": 2}
    site.run(3, rate=60)
    described = site.scaling.describe()
    assert (described["desired"], described["held"]) == (None, None)
    assert {tuple(wish["desired"]) for wish in site.wishes()} <= {(1, 2)}
    site.fleet_is(**held | {"held": None})  # another router was asked, and the launcher told all
    assert site.scaling.describe()["desired"] is None


def test_fewer_workers_are_a_wish_too_and_name_who_leaves(site: Site) -> None:
    site.join("d-1", "d-2")
    site.fleet_is()
    site.run(30, rate=1)
    removed = {name for wish in site.wishes() for name in wish["remove"]}
    assert removed and removed <= {"d-0", "d-1", "d-2"}


def test_what_a_busy_launcher_has_not_carried_out_is_asked_for_again(site: Site) -> None:
    site.join("d-1")
    site.fleet_is(held=[1, 1, None])
    for _ in range(31):
        site.interval()
    assert [wish["remove"] for wish in site.wishes()] == [["d-0"]] * 2
    for _ in range(30):
        site.interval(d_0={"state": "draining"})
    assert [(wish["remove"], wish["lost"]) for wish in site.wishes()[2:]] == [([], ["d-0"])]


def test_a_worker_that_drains_is_not_counted_and_shall_not_come_back(site: Site) -> None:
    site.join("d-1")
    site.fleet_is()
    site.load(1)
    site.interval(d_1={"state": "draining"})
    assert site.wishes()[-1]["lost"] == ["d-1"]
    assert site.scaling.current() == Counts(1, 1)


def test_a_worker_that_takes_nothing_until_a_hanging_step_ends_is_not_given_up(site: Site) -> None:
    """It comes back by itself, or its launcher starts it again: nobody is started in its place, nor it ended."""
    site.join("d-1")
    site.fleet_is()
    site.load(1)
    num_wishes = len(site.wishes())
    site.interval(d_1={"state": "starting"})
    assert all(not wish["lost"] for wish in site.wishes()[num_wishes:])
    assert site.scaling.current() == Counts(1, 2)
    site.interval()
    assert site.scaling.current() == Counts(1, 2)


def test_one_that_the_launcher_retires_is_no_loss(site: Site) -> None:
    site.join("d-1")
    site.fleet_is(leaving=("d-1",))
    site.load(1)
    site.interval(d_1={"state": "draining"})
    assert all(not wish["lost"] for wish in site.wishes())


def test_a_router_that_does_not_decide_sends_its_load_and_shows_the_leaders_decision(site: Site) -> None:
    site.fleet_is(leader=False, desired=[3, 2], reason="as it was told")
    site.fleet.submit(20)
    site.interval()
    [load] = [event for event in site.told if event["event"] == "load"]
    assert SeenLoad.from_event(load).num_queued == load["num_queued"]
    assert not site.wishes()
    assert site.scaling.desired == Counts(3, 2)
    assert site.scaling.describe()["decides_here"] is False


def test_what_came_while_nobody_decided_is_not_taken_for_one_intervals_load() -> None:
    site = Site("off")
    site.join("p-0", "d-0")
    site.fleet_is()
    site.run(10, rate=5)
    site.fleet_is(held=[1, 1, None])
    site.run(1, rate=5)
    forecast = site.scaling.describe()["forecast"]
    assert isinstance(forecast, dict) and forecast["requests_per_s"] == 5
    site.run(3, rate=5)
    assert len(site.wishes()) == 1  # what is desired is told when it is news


def test_without_a_launcher_roles_change_and_the_rest_is_a_metric() -> None:
    site = Site(launcher=False)
    site.join("p-0", "d-0", "d-1", "d-2")
    site.run(8, rate=60, output=5)
    assert site.roles_given()
    assert not site.told
    metrics = RecordingMetrics("m", site.record)
    metrics.replicas = site.scaling.replicas
    text = metrics.scrape([("m", site.fleet.dispatcher.view())], num_in_flight=0)()[0].decode()
    desired = site.scaling.desired
    assert desired is not None
    assert f'kvferry_desired_replicas{{pool="prefill"}} {desired.prefill}.0' in text
    assert 'kvferry_current_replicas{pool="decode"}' in text


def test_the_launcher_has_a_worker_drained(site: Site) -> None:
    site.scaling.on_launcher({"event": "drain", "worker_id": "d-0", "limit_s": 7.0})
    [message] = [message for message in site.links["d-0"].sent if isinstance(message, Drain)]
    assert message.deadline_s == 7.0


def test_nothing_is_sized_while_no_step_times_are_known() -> None:
    site = Site()
    for name in ("p-0", "d-0"):
        site.links[name] = site.fleet.join(name)
    site.fleet_is()
    site.run(5, rate=60)
    assert all(not any(wish["add"].values()) and not wish["remove"] for wish in site.wishes())
    assert site.scaling.desired == Counts(1, 1)


def test_an_operators_counts_hold_before_any_worker_is_there() -> None:
    site = Site("off")
    site.fleet_is(starting={"p-0": "prefill", "d-0": "decode"}, held=[1, 3, None])
    site.run(2, rate=0)
    assert site.wishes()[-1]["add"] == {"prefill": 0, "decode": 2}


def test_without_a_launcher_nothing_is_said_before_a_worker_is_there() -> None:
    """Whoever starts workers by the metric would end those that have not come back to a new router yet."""
    site = Site(launcher=False)
    site.run(5, rate=60)
    assert site.scaling.desired is None
    held = Site(launcher=False)  # an operator says it
    held.scaling.hold(Counts(2, 2), None)
    held.scaling.tick()
    assert held.scaling.desired == Counts(2, 2)
    site.join("p-0", "d-0")
    site.run(2, rate=60)
    assert site.scaling.desired is not None


def test_workers_are_replaced_though_all_of_them_drain(site: Site) -> None:
    site.run(5, rate=1)
    site.load(1)
    site.interval(p_0={"state": "draining"}, d_0={"state": "draining"})
    wish = site.wishes()[-1]
    assert sorted(wish["lost"]) == ["d-0", "p-0"]
    assert wish["add"] == {"prefill": 1, "decode": 1}


def test_a_pool_is_not_sized_by_the_other_ones_limits_while_its_workers_are_away() -> None:
    site = Site()
    site.links["d-0"] = site.fleet.join("d-0", samples=SAMPLES, num_blocks=4096, max_num_seqs=256)
    site.links["p-0"] = site.fleet.join("p-0", samples=SAMPLES, num_blocks=4096, max_num_seqs=1)
    site.fleet_is()
    site.run(5, rate=2)
    before = site.scaling.desired
    assert before is not None and before.decode == 1
    site.fleet.dispatcher.worker_left(site.links.pop("d-0"), "gone")
    site.fleet_is(starting={"d-0": "decode"})
    site.run(5, rate=2)
    assert site.scaling.desired == before


def test_a_load_comes_through_an_event_as_it_was() -> None:
    seen = SeenLoad(
        tuple(range(1000)), tuple(AnswerLengths(n, 0, n) for n in range(1000)), Kept(9, 10), Kept(5, 6), num_queued=3
    )
    again = SeenLoad.from_event(msgspec.json.decode(msgspec.json.encode(seen.as_event())))
    assert len(again.prompts) == 1000
    assert sum(again.prompts) == pytest.approx(sum(seen.prompts), rel=0.05)
    assert len(again.answers) == 256 and again.answers[-1].num_output_tokens > 950
    assert (again.ttft, again.tpot, again.num_queued) == (seen.ttft, seen.tpot, 3)


# --- over the admin listener ------------------------------------------------------------------------------------


def admin(site: Site, *, is_leaving: bool = False) -> httpx.AsyncClient:
    operations = site.fleet.dispatcher
    app = build_admin(
        Admin([operations], lambda: lambda: (b"", "text/plain"), 30.0, None),
        ApiKeys(),
        scaling_routes(site.scaling, lambda: is_leaving),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9")


async def test_scaling_is_shown_held_and_released(site: Site) -> None:
    site.run(5, rate=10)
    async with admin(site) as client:
        told = (await client.get("/admin/scaling")).json()
        assert told["mode"] == "on" and told["decides_here"] and told["current"] == {"prefill": 1, "decode": 1}
        assert told["forecast"]["requests_per_s"] > 5
        assert (await client.post("/admin/scaling", json={"prefill": 5, "decode": 3, "for_s": 60})).status_code == 202
        assert site.told[-1] == {"event": "hold", "counts": [5, 3], "for_s": 60}
        assert (await client.delete("/admin/scaling")).status_code == 202
        assert site.told[-1] == {"event": "hold", "counts": None}


async def test_a_router_that_is_ending_passes_no_counts_on(site: Site) -> None:
    site.run(5, rate=10)
    async with admin(site, is_leaving=True) as client:
        answers = [
            await client.post("/admin/scaling", json={"prefill": 2, "decode": 3}),
            await client.delete("/admin/scaling"),
        ]
        assert [answer.status_code for answer in answers] == [409, 409]
        assert {answer.json()["error"]["code"] for answer in answers} == {"shutting_down"}
        assert (await client.get("/admin/scaling")).status_code == 200
    assert not [event for event in site.told if event["event"] == "hold"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prefill": 1}, "decode"),
        ({"prefill": -1, "decode": 1}, "prefill"),
        ({"prefill": 1, "decode": True}, "decode"),
        ({"prefill": 1, "decode": 0}, "decode"),
        ({"prefill": 5, "decode": 5}, "decode"),
        ({"prefill": 1, "decode": 1, "for_s": -1}, "for_s"),
        ({"prefill": 1, "decode": 1, "x": 1}, "x"),
    ],
)
async def test_counts_that_make_no_sense_are_refused(site: Site, body: dict[str, object], param: str) -> None:
    async with admin(site) as client:
        answer = await client.post("/admin/scaling", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert not site.told


def test_a_router_refuses_prefill_workers_where_there_is_no_such_pool() -> None:
    site = Site()
    config = CONFIG.model_copy(update={"prefill": PoolBounds(at_least=0, at_most=0)})
    scaling = Scaling(
        config, Objectives(), site.fleet.dispatcher, site.fleet.predictor, LoadRecord(), site.fleet.clock, lambda: 0.0
    )
    with pytest.raises(RequestError, match="no prefill workers"):
        scaling.hold(Counts(1, 1), None)
    scaling.hold(Counts(0, 1), None)


def test_a_router_that_comes_later_takes_no_workers_connecting_for_its_start() -> None:
    site = Site()
    site.fleet_is(seq=3, starting={"p-0": "prefill", "d-0": "decode"})  # they have been there for long
    site.fleet.clock.advance(0.5)
    site.join("p-0", "d-0")
    site.interval()
    assert site.scaling.describe()["start_s"] is None
    site.fleet_is(seq=4, starting={"d-1": "decode"})
    site.fleet.clock.advance(38.0)
    site.join("d-1")
    site.interval(d_1={"state": "starting"})
    assert site.scaling.describe()["start_s"] is None
    site.interval()
    assert site.scaling.describe()["start_s"] == 40.0


def test_workers_that_serve_when_a_deployment_begins_are_not_taken_for_quick_starts(site: Site) -> None:
    """Though the launcher answers a first request, an operator's, before the first interval is over."""
    site.fleet_is(seq=0)
    site.interval()
    assert site.scaling.describe()["start_s"] is None


def test_a_router_that_decides_later_knows_how_long_starts_took(site: Site) -> None:
    site.join("p-0", "d-0")
    site.fleet_is(leader=False)
    site.fleet_is(leader=False, seq=6, starting={"d-1": "decode"})
    site.fleet.clock.advance(39.0)
    site.join("d-1")
    site.run(600, rate=0)
    site.fleet_is(leader=True, seq=6)
    site.interval()
    assert site.scaling.describe()["start_s"] == 40.0
    assert site.wishes()[0]["seq"] == 7  # else the launcher's last answer to the router before would be one to it


def test_what_an_operator_asks_for_between_two_intervals_counts_as_no_longer_than_it_was(site: Site) -> None:
    site.run(60, rate=20)
    seen = site.scaling.describe()["forecast"]
    site.load(10)
    site.fleet.clock.advance(0.5)
    site.fleet_is(held=[2, 2, None])
    site.scaling.tick()
    assert site.scaling.desired == Counts(2, 2)
    assert site.scaling.describe()["forecast"] == seen
    num_wishes = len(site.wishes())
    site.fleet_is(held=[2, 2, None], seq=site.wishes()[-1]["seq"])  # there was no room for them
    site.scaling.tick()
    assert len(site.wishes()) == num_wishes  # asked again once an interval, not at each answer


def test_a_router_that_hung_takes_what_came_meanwhile_for_what_came_in_that_time(site: Site) -> None:
    site.run(60, rate=5)
    site.fleet.clock.advance(9.0)
    site.run(1, rate=50)
    forecast = site.scaling.describe()["forecast"]
    assert isinstance(forecast, dict) and forecast["requests_per_s"] == 5


def test_prompts_that_wait_in_the_queue_need_workers_too() -> None:
    needed = []
    for num_queued in (0, 3000):
        site = Site()
        site.join("p-0", "d-0")
        site.fleet_is()
        site.run(20, rate=5)
        seen = SeenLoad((500,) * 5, (AnswerLengths(500, 0, 50),) * 5, num_queued=num_queued)
        site.scaling.on_launcher(seen.as_event())
        site.interval()
        forecast = site.scaling.describe()["forecast"]
        assert isinstance(forecast, dict)
        needed.append(forecast["needed"]["prefill"])
    assert needed[0] < needed[1]


def test_a_start_is_expected_to_take_as_long_as_the_last_ones_did(site: Site) -> None:
    for seq, seconds in enumerate((40.0, 20.0)):
        site.fleet_is(seq=seq, starting={f"d-{seq + 1}": "decode"})
        site.fleet.clock.advance(seconds - 1.0)
        site.join(f"d-{seq + 1}")
        site.interval()
    assert site.scaling.describe()["start_s"] == 30.0


def test_a_worker_that_is_to_leave_is_no_more_of_the_fleet_though_it_is_ready_still(site: Site) -> None:
    site.join("d-1")
    site.fleet_is(seq=0, leaving=("d-1",))
    for state in ("ready", "starting"):  # a step of it hangs
        site.interval(d_1={"state": state})
        assert site.scaling.current() == Counts(1, 1)


@pytest.mark.parametrize("launcher", [True, False])
def test_an_operators_counts_are_carried_out_before_the_interval_is_over(launcher: bool) -> None:
    site = Site(launcher=launcher)
    site.join("p-0", "p-1", "d-0")
    site.fleet_is()
    site.interval()
    for counts in (Counts(1, 2), Counts(2, 1)):
        site.scaling.hold(counts, None)
        site.scaling.tick()
        if launcher:  # its word comes to every router, and first after a tick
            site.fleet_is(held=[counts.prefill, counts.decode, None])
            site.scaling.tick()
        assert site.scaling.desired == counts
    assert site.roles_given()["p-0"] == "decode"
    site.scaling.release()
    assert bool(site.scaling.describe()["held"]) == launcher  # which tells all when it is over


def test_a_router_that_starts_again_leaves_what_is_held_alone_until_workers_have_connected() -> None:
    """The launcher knows the roles in which they began: one has another by now."""
    site = Site()
    site.fleet_is(seq=3, starting={"p-0": "prefill", "p-1": "prefill", "d-0": "decode"}, held=[1, 2, None])
    site.fleet.clock.advance(0.2)
    site.scaling.tick()
    site.join("p-0", "p-1", "d-0")
    site.interval(p_1={"role": "decode"})
    assert site.scaling.desired == site.scaling.current() == Counts(1, 2)
    assert not site.roles_given() and not any(wish["remove"] or any(wish["add"].values()) for wish in site.wishes())


def test_what_operators_ask_for_makes_no_more_of_what_another_router_saw_in_a_whole_interval(site: Site) -> None:
    site.run(20, rate=20)
    seen = site.scaling.describe()["forecast"]
    site.load(20)
    site.fleet.clock.advance(0.2)
    site.fleet_is(held=[2, 1, None])
    site.scaling.tick()
    assert site.scaling.desired == Counts(2, 1)
    assert site.scaling.describe()["forecast"] == seen
    site.fleet.clock.advance(0.8)
    site.scaling.tick()
    assert site.scaling.describe()["forecast"] == seen
