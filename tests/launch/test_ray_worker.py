"""A worker of a Ray cluster: how soon is it run again, when is it ended? Its actor is a stub; no cluster is there."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvferry.common.clock import SystemClock
from kvferry.common.config import EngineConfig, WorkerConfig
from kvferry.common.errors import ConfigError, WorkerLost
from kvferry.launch import ray_calls, ray_worker
from kvferry.launch.on_ray import RayLauncher
from kvferry.launch.plan import plan
from kvferry.launch.process import ChildTimes
from kvferry.launch.progress import LogDisplay
from kvferry.launch.ray_calls import Pulse, RunEnd, WorkerActor, fair_threads
from kvferry.launch.ray_worker import RaySite, RayWorker
from kvferry.settings.fields import ServeSettings
from kvferry.wire.lifeline import Lifeline

pytest.importorskip("ray")
from ray.exceptions import ActorUnavailableError, RaySystemError

TIMES = ChildTimes(first_backoff_s=0.01, max_backoff_s=0.05)
SERVED = RunEnd(1, was_ready=True)


class Config:
    worker_id = "d-0"

    def model_copy(self, update: object) -> Config:
        return self

    def model_dump_json(self) -> str:
        return "{}"


class Plan:
    config = Config()


class Routers:
    controls = ()


class Actor:
    """Its `run` ends again and again, after so many seconds."""

    def __init__(self, lives_s: list[float], retired: asyncio.Event, end: RunEnd) -> None:
        self._lives_s = lives_s
        self._retired = retired
        self._end_of_each = end

    @property
    def run(self) -> Actor:
        return self

    def remote(self, *arguments: object) -> Awaitable[RunEnd]:
        return self._end()

    async def _end(self) -> RunEnd:
        await asyncio.sleep(self._lives_s.pop(0))
        if not self._lives_s:
            self._retired.set()
        return self._end_of_each


class Nowhere:
    """A place that no node has room for."""

    async def ready(self) -> None:
        await asyncio.Event().wait()


async def test_a_cluster_without_room_is_told_with_what_is_free_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"CPU": 2.0, "CPU_group_0_5f": 1.0, "node:__internal_head__": 1.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: there)
    monkeypatch.setattr("ray.available_resources", lambda: {"node:__internal_head__": 1.0})
    monkeypatch.setattr(ray_calls, "_PLACEMENT_TIMEOUT_S", 0.01)
    [worker, *_] = plan(ServeSettings(), Path("m"), "m").workers
    says = r"no room for \[\{'CPU': 1\.0\}\], each on one node: 0 of 2 CPU and 0 of 0 GPU are free$"
    with pytest.raises(ConfigError, match=says):
        await ray_calls.wait_for_places([worker], [cast(Any, Nowhere())])


class Forgotten:
    """A place of which Ray's head knows nothing any more."""

    async def ready(self) -> None:
        raise RaySystemError("the head has gone\nno such placement group")


async def test_a_place_that_is_lost_is_the_end_of_its_worker_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other error would end the deployment that it was added to."""
    freed: list[object] = []
    monkeypatch.setattr(ray_calls, "free_place", freed.append)
    worker = RayWorker(cast(Any, Plan()), cast(Any, place := Forgotten()), site([]))
    with pytest.raises(WorkerLost, match=r"^d-0 has lost its place: .*no such placement group"):
        await worker.keep()
    assert freed == [place]


class Pinged:
    """Its `ping` is answered at once, but for the second one, which is left to `second`; ready from the third on."""

    def __init__(self, second: Callable[[asyncio.Future[Pulse]], None]) -> None:
        self._second = second
        self._num_pings = 0
        self.third = asyncio.Event()

    @property
    def ping(self) -> Pinged:
        return self

    def options(self, **_: object) -> Pinged:
        return self

    def remote(self) -> asyncio.Future[Pulse]:
        answer: asyncio.Future[Pulse] = asyncio.get_running_loop().create_future()
        self._num_pings += 1
        if self._num_pings == 2:
            self._second(answer)
        else:
            answer.set_result(Pulse("a", self._num_pings > 2))
        if self._num_pings == 3:
            self.third.set()
        return answer


class Answered:
    """Its `run` does not end, and its pings are answered as told.

    One after the other: by the life of that letter, ready where it is a capital, by an error ("!"), or by nobody ("?").
    """

    def __init__(self, answers: str) -> None:
        self._answers = list(answers)
        self.was_heard = asyncio.Event()  # to the end

    @property
    def run(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future())

    @property
    def ping(self) -> Answered:
        return self

    def options(self, **_: object) -> Answered:
        return self

    def remote(self) -> asyncio.Future[Pulse]:
        future: asyncio.Future[Pulse] = asyncio.get_running_loop().create_future()
        if not self._answers:
            self.was_heard.set()
            return future
        answer = self._answers.pop(0)
        if answer == "!":
            future.set_exception(ActorUnavailableError("unavailable", None))
        elif answer != "?":
            future.set_result(Pulse(answer.lower(), answer.isupper()))
        return future


def site(told: list[dict[str, object]]) -> RaySite:
    routers = cast(Any, Routers())
    return RaySite(routers, lambda: (), "m:f", True, 1.0, TIMES, on_event=lambda _, event: told.append(event))


def call_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls to the cluster done at once."""

    async def in_thread(function: Callable[[], None], limit_s: float) -> bool:
        return True

    monkeypatch.setattr(ray_calls, "in_thread", in_thread)


def killed_by_watch(monkeypatch: pytest.MonkeyPatch, second: Callable[[asyncio.Future[Pulse]], None]) -> list[object]:
    """Return why its actor was killed, after three pings."""
    monkeypatch.setattr(ray_worker, "_PING_EVERY_S", 0.01)
    monkeypatch.setattr(ray_worker, "_HANG_AFTER_S", 0.8)
    call_nobody(monkeypatch)

    async def run() -> list[object]:
        told: list[dict[str, object]] = []
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site(told))
        worker.actor = cast(Any, actor := Pinged(second))
        watching = asyncio.ensure_future(worker._watch())
        await asyncio.wait_for(actor.third.wait(), 60.0)
        watching.cancel()
        return [event["reason"] for event in told]

    return asyncio.run(run())


def losses_in(answers: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return what is told of a worker whose pings are answered so. Raises what ends it."""
    monkeypatch.setattr(ray_worker, "_PING_EVERY_S", 0.001)
    monkeypatch.setattr(ray_worker, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(ray_worker, "_START_S", 0.2)
    monkeypatch.setattr(ray_worker, "_HANG_AFTER_S", 0.1)
    call_nobody(monkeypatch)

    async def run() -> list[object]:
        told: list[dict[str, object]] = []
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site(told))
        worker.actor = cast(Any, actor := Answered(answers))
        retired = asyncio.create_task(worker.retired.wait())
        serving = asyncio.create_task(worker._serve(retired))
        heard = asyncio.create_task(actor.was_heard.wait())
        await asyncio.wait((serving, heard), timeout=60.0, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
        serving.cancel()
        await asyncio.wait((serving,))
        return [event["reason"] for event in told]

    return asyncio.run(run())


def delays_after(lives_s: list[float], end: RunEnd = SERVED) -> list[float]:
    async def run() -> list[float]:
        told: list[dict[str, object]] = []
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site(told))
        worker.actor = cast(Any, Actor([*lives_s, 0.0], worker.retired, end))
        await asyncio.wait_for(worker._keep_running(), 30.0)
        return [cast(float, event["delay_s"]) for event in told]

    return asyncio.run(run())


def test_who_ends_again_and_again_waits_longer() -> None:
    assert delays_after([0.0, 0.0, 0.0]) == [0.01, 0.02, 0.04]


def test_who_ran_longer_than_the_longest_pause_has_not_failed_before() -> None:
    assert delays_after([0.0, 0.0, 0.1, 0.0]) == [0.01, 0.02, 0.01, 0.02]


def test_who_cannot_start_is_not_run_again() -> None:
    with pytest.raises(ConfigError, match=r"^d-0: no such model$"):
        delays_after([0.0, 0.0], RunEnd(2, "no such model"))
    assert delays_after([0.0], RunEnd(2, "refused", was_ready=True)) == [0.01], "it had started"


def test_who_ends_three_times_before_it_was_ever_ready_is_not_run_again() -> None:
    with pytest.raises(WorkerLost, match="d-0 did not start, 3 times: rank 1 ended"):
        delays_after([0.1] * 5, RunEnd(1, "rank 1 ended"))


LOST, SILENT = ray_worker._LIFE_LOST, "no sign of life for 0.1 s"


@pytest.mark.parametrize(
    "answers", ["aabcd", "a!!b!!c!d", "a?b?c?", "???", "ab?cd"], ids=lambda text: cast(str, text).replace("?", "-")
)
def test_who_is_lost_three_times_before_it_was_ever_ready_is_not_run_again(
    answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WorkerLost, match=r"^d-0 did not start, 3 times: "):
        losses_in(answers + "d", monkeypatch)


@pytest.mark.parametrize(
    ("answers", "losses"),
    [
        ("aabc", [LOST, LOST]),
        ("a!!!!!a!a", []),
        ("a!!!b!!!c", [LOST, LOST]),
        ("a?!!bc", [SILENT, LOST]),
        ("abcD", [LOST, LOST, LOST]),
        ("Abcdef", [LOST] * 5),
    ],
    ids=["calls that wait", "it was away", "calls that fail", "killed for silence", "ready at last", "ready at first"],
)
def test_each_life_is_lost_once_and_counts_until_one_was_ready(
    answers: str, losses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert losses_in(answers, monkeypatch) == losses


def test_who_was_retired_before_it_was_ready_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_PING_EVERY_S", 0.001)

    async def run() -> None:
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site([]))
        worker.actor = cast(Any, actor := Answered("abcdef"))
        worker.retired.set()
        watching = asyncio.create_task(worker._watch())
        await asyncio.wait_for(actor.was_heard.wait(), 60.0)
        assert not watching.done()
        watching.cancel()

    asyncio.run(run())


def test_a_worker_starts_until_its_actor_says_that_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_PING_EVERY_S", 0.01)

    async def run() -> list[str]:
        worker = RayWorker(cast(Any, Plan()), cast(Any, None), site([]))
        states = [worker.state]
        worker.actor = cast(Any, Pinged(lambda answer: answer.set_result(Pulse("a", False))))
        states.append(worker.state)
        watching = asyncio.ensure_future(worker._watch())
        await asyncio.wait_for(worker.was_ready.wait(), 60.0)
        watching.cancel()
        states.append(worker.state)
        worker.retired.set()
        return [*states, worker.state]

    assert asyncio.run(run()) == ["waits for a node", "starting", "up", "leaving"]


def test_an_actor_hears_what_its_worker_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may say so and end at once; between two lives it is not ready."""
    engine = EngineConfig(model_dir=Path(), served_model_name="m", num_threads=1)
    config = WorkerConfig(worker_id="d-0", role="decode", engine=engine, routers=())
    lives: list[Callable[[Lifeline], int]] = []

    async def serve(config: object, secret: object, lifeline: Lifeline) -> int:
        code = lives.pop(0)(lifeline)
        while code == 0 and not (await actor.ping()).is_ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return code

    def refuse(lifeline: Lifeline) -> int:
        lifeline.failed("no such model")
        return 2

    def become_ready(lifeline: Lifeline) -> int:
        lifeline.ready()
        return 0

    actor = WorkerActor()
    monkeypatch.setattr(ray_calls, "configure_logging", lambda *_, **__: None)
    monkeypatch.setattr(ray_calls, "_take_ordinary_priority", lambda: None)
    monkeypatch.setitem(sys.modules, "stand_in", cast(Any, SimpleNamespace(serve=serve)))

    async def run() -> list[RunEnd]:
        ends = []
        for life in (refuse, become_ready):
            lives.append(life)
            ends.append(await actor.run(config.model_dump_json(), (b"s" * 16,), "stand_in:serve", True))
            assert not (await actor.ping()).is_ready
        return ends

    assert asyncio.run(run()) == [RunEnd(2, "no such model"), RunEnd(0, was_ready=True)]


async def test_each_process_of_an_actor_is_another_life() -> None:
    first, second = WorkerActor(), WorkerActor()
    assert await first.ping() == await first.ping() != await second.ping()


def place(node: str, num_ranks: int, state: str = "CREATED") -> dict[str, Any]:
    """A row of Ray's table of placement groups."""
    return {"state": state, "bundles": {0: {"CPU": float(num_ranks)}}, "bundles_to_node_id": {0: node}}


@pytest.mark.parametrize(
    ("groups", "num_threads"),
    [
        ([place("a", 1), place("b", 1)], 16),
        ([place("a", 1), place("a", 1), place("b", 1)], 8),
        ([place("a", 4), place("a", 1)], 3),
        ([place("a", 1), place("a", 1, "REMOVED"), place("", 1, "PENDING")], 16),
        ([place("a", 20)], 1),
    ],
    ids=["one a node", "two on one", "of many ranks", "those that are gone or wait", "more ranks than cores"],
)
def test_a_node_s_cores_are_shared_among_the_ranks_that_are_placed_on_it(
    groups: list[dict[str, Any]], num_threads: int
) -> None:
    assert fair_threads("a", 16, groups) == num_threads


def test_an_actor_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed_by_watch(monkeypatch, lambda answer: None) == ["no sign of life for 0.8 s"]


def test_no_actor_is_ended_because_the_launcher_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer has come meanwhile, and nobody has looked."""

    def stand_still(answer: asyncio.Future[Pulse]) -> None:
        loop = asyncio.get_running_loop()

        def stand() -> None:
            time.sleep(1.2)
            loop.call_soon_threadsafe(answer.set_result, Pulse("a", False))

        loop.call_later(0.05, stand)

    assert killed_by_watch(monkeypatch, stand_still) == []


def test_an_end_that_is_asked_for_while_it_connects_is_none_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM is Ray's meanwhile, which leaves with the signal's number as the exit code."""
    monkeypatch.setattr(ray_calls, "connect", lambda *_: sys.exit(15))
    launcher = RayLauncher(plan(ServeSettings(), tmp_path, "m"), {}, SystemClock(), LogDisplay(is_text=False))
    asyncio.run(launcher.run())
    assert launcher.is_ending


def test_a_reload_that_fails_is_told_in_the_log_of_the_launcher(tmp_path: Path) -> None:
    """SIGHUP has no other answer."""
    notes: list[str] = []

    class Shown(LogDisplay):
        def note(self, text: str) -> None:
            notes.append(text)

    deployment = plan(ServeSettings(port=0), tmp_path, "m", (b"s" * 16,))
    launcher = RayLauncher(deployment, {}, SystemClock(), Shown(is_text=False))
    assert asyncio.run(launcher.reload()) == ["nothing serves yet"]
    assert notes == ["reload failed: nothing serves yet"]


def test_without_an_address_a_cluster_is_embedded_whatever_ray_would_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody is there
    monkeypatch.setattr(ray_calls, "usable_cpus", lambda: 1)
    ray_calls.connect(None, 3)
    try:
        assert ray.cluster_resources()["CPU"] == 3
    finally:
        ray.shutdown()


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(*_: object, **__: object) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError, match="no Ray cluster at host:1: refused"):
        ray_calls.connect("host:1", 1)
    with pytest.raises(ConfigError, match="no Ray cluster could be started here: refused"):
        ray_calls.connect(None, 1)
