"""Slots of adapters: never taken from a running sequence, given in order, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from kvferry.common.adapter import AdapterResult, AdapterTask, HeldAdapter
from kvferry.worker.adapters import LOAD_LIMIT_S, PATIENCE_S, AdapterCache

from ..fake_clock import FakeClock


class FakeLoader:
    """Implements `common.adapter.AdapterLoader`: ends a task when a test says so."""

    def __init__(self, num_slots: int, num_host: int) -> None:
        self.num_slots, self.num_host = num_slots, num_host
        self.wake: Callable[[], None] = lambda: None
        self.tasks: list[AdapterTask] = []
        self.host: set[str] = set()
        self.num_reads = 0
        self._results: list[AdapterResult] = []

    def submit(self, task: AdapterTask) -> None:
        self.host -= set(task.forgotten)
        self.num_reads += task.digest not in self.host
        self.host.add(task.digest)
        assert len(self.host) <= self.num_host
        self.tasks.append(task)

    def end(self, error: str = "", *, on_every_rank: bool = True) -> None:
        task = self.tasks.pop(0)
        if error and on_every_rank:
            self.host.discard(task.digest)
        self._results.append(AdapterResult(task.digest, task.slot, error))

    def results(self) -> list[AdapterResult]:
        found, self._results = self._results, []
        return found


def make(num_slots: int = 1, num_host: int = 2) -> tuple[AdapterCache, FakeLoader, FakeClock]:
    loader, clock = FakeLoader(num_slots, num_host), FakeClock()
    return AdapterCache(loader, clock), loader, clock


def slot_of(held: HeldAdapter) -> int | None:
    return held.slot


def takes_more(held: HeldAdapter) -> bool:
    return held.is_open


def test_it_is_loaded_when_it_is_asked_for_and_stays() -> None:
    cache, loader, _ = make()
    held = cache.get("aa", "/a")
    assert slot_of(held) is None and not loader.tasks
    cache.serve(set(), ["aa"])
    assert loader.tasks == [AdapterTask("aa", "/a", 0)] and not cache.loaded and cache.num_loading == 1
    loader.end()
    cache.serve(set(), ["aa"])
    assert slot_of(held) == 0 and held.is_open and cache.loaded == ("aa",)
    assert cache.get("aa", "/a") is held and cache.num_loads == 1


def test_who_runs_keeps_its_slot_and_takes_no_more_once_another_one_has_waited() -> None:
    cache, loader, clock = make()
    first = cache.get("aa", "/a")
    cache.serve(set(), ["aa"])
    loader.end()
    cache.serve({"aa"}, [])
    second = cache.get("bb", "/b")
    cache.serve({"aa"}, ["aa", "bb"])
    assert takes_more(first) and not loader.tasks
    clock.advance(PATIENCE_S)
    cache.serve({"aa"}, ["aa", "bb"])
    assert slot_of(first) == 0 and not takes_more(first) and not loader.tasks  # its sequence goes on
    cache.serve(set(), ["aa", "bb"])  # which has ended
    assert slot_of(first) is None and loader.tasks[0].digest == "bb"
    loader.end()
    cache.serve(set(), ["aa", "bb"])
    assert second.is_open


def load(cache: AdapterCache, loader: FakeLoader, digest: str, *live: str) -> HeldAdapter:
    """Ask for it and have it loaded, while requests for others wait."""
    held = cache.get(digest, "/x")
    cache.serve(set(), [*live, digest])
    loader.end()
    cache.serve(set(), [*live, digest])
    return held


def test_the_least_recently_asked_for_makes_way_in_slots_and_in_host_memory() -> None:
    cache, loader, clock = make(num_slots=2, num_host=3)
    load(cache, loader, "aa")
    load(cache, loader, "bb")
    cache.get("aa", "/x")
    load(cache, loader, "cc")
    assert set(cache.loaded) == {"aa", "cc"}
    load(cache, loader, "dd")
    assert set(cache.loaded) == {"cc", "dd"} and loader.host == {"aa", "cc", "dd"}
    cache.get("cc", "/x")
    cache.get("aa", "/x")
    cache.serve(set(), ["cc", "dd", "aa"])  # all are asked for, and none has begun
    clock.advance(PATIENCE_S)
    cache.serve(set(), ["cc", "dd", "aa"])
    assert cache.loaded == ("cc",) and cache.num_loading == 1


def test_one_alone_takes_no_more_and_takes_more_again_when_nobody_waits_or_when_it_is_back() -> None:
    cache, loader, clock = make(num_slots=2, num_host=3)
    first, second = load(cache, loader, "aa"), load(cache, loader, "bb")
    third = cache.get("cc", "/x")
    cache.serve({"aa", "bb"}, ["cc"])
    clock.advance(PATIENCE_S)
    for digest in ("aa", "bb"):  # whichever was asked for later
        cache.serve({"aa", "bb"}, ["cc"])
        assert not takes_more(first) and takes_more(second)
        cache.get(digest, "/x")
    cache.serve({"aa", "bb"}, [])
    assert takes_more(first) and takes_more(second)
    third = cache.get("cc", "/x")
    cache.serve({"aa", "bb"}, ["cc"])
    clock.advance(PATIENCE_S)
    cache.serve({"aa", "bb"}, ["aa", "cc"])
    assert not takes_more(first)
    cache.serve({"bb"}, ["aa", "cc"])
    loader.end()
    cache.get("dd", "/x")
    cache.serve({"bb"}, ["aa", "cc", "dd"])
    assert third.is_open and slot_of(first) is None
    clock.advance(PATIENCE_S)
    cache.serve({"bb"}, ["aa", "dd"])
    loader.end()
    cache.serve({"bb"}, ["aa", "dd"])
    assert takes_more(first), "while another one waits"


def test_what_nobody_waits_for_any_more_is_loaded_all_the_same() -> None:
    cache, loader, _ = make()
    held = cache.get("aa", "/a")
    cache.serve(set(), ["aa"])
    cache.serve(set(), [])
    cache.check()
    assert cache.get("aa", "/a") is held
    loader.end()
    cache.serve(set(), [])
    assert held.is_open and cache.num_loads == 1


def test_it_is_loaded_again_from_where_it_was_last_said_to_be() -> None:
    cache, loader, clock = make(num_host=1)
    load(cache, loader, "aa")
    cache.get("aa", "/moved")
    cache.get("bb", "/b")
    cache.serve(set(), ["aa", "bb"])
    clock.advance(PATIENCE_S)
    cache.serve(set(), ["aa", "bb"])
    loader.end()
    cache.serve(set(), ["aa"])
    assert loader.tasks == [AdapterTask("aa", "/moved", 0, ("bb",))]


def test_who_was_not_waited_for_is_forgotten_though_others_wait() -> None:
    cache, loader, clock = make()
    first = cache.get("aa", "/a")
    cache.serve(set(), ["aa"])
    loader.end()
    cache.get("bb", "/b")
    for number in range(5):
        cache.get(f"x{number}", "/x")
        cache.serve({"aa"}, ["aa", "bb", f"x{number}"])
    cache.serve({"aa"}, ["aa", "bb"])
    assert len(cache._known) == 2
    clock.advance(PATIENCE_S / 2)
    cache.serve({"aa"}, ["aa"])  # nobody waits for bb any more
    clock.advance(PATIENCE_S / 2)
    cache.get("bb", "/b")
    cache.serve({"aa"}, ["aa", "bb"])
    assert takes_more(first)  # who asks anew has just begun to wait


def test_a_failure_is_told_once_and_tried_again_by_the_next_request() -> None:
    cache, loader, _ = make()
    held = cache.get("aa", "/a")
    cache.serve(set(), ["aa"])
    loader.end("no such file")
    cache.serve(set(), ["aa"])
    assert held.failure == "no such file" and held.slot is None
    cache.get("bb", "/b")
    cache.serve(set(), ["bb"])
    assert set(cache._known) == {"bb"}
    loader.end()
    again = cache.get("aa", "/a")
    assert again is not held
    cache.serve(set(), ["aa"])
    loader.end()
    cache.serve(set(), ["aa"])
    assert again.is_open


def run(cache: AdapterCache, clock: FakeClock, seconds: float, waiting: list[str]) -> None:
    """Let time pass as on a worker that runs: it looks several times a second."""
    for _ in range(int(seconds / 0.5)):
        clock.advance(0.5)
        cache.serve(set(), waiting)
        cache.check()


def test_a_load_that_does_not_end_is_not_waited_for_nor_what_would_come_behind_it() -> None:
    cache, loader, clock = make(num_slots=3, num_host=3)
    ready = cache.get("cc", "/c")
    cache.serve(set(), ["cc"])
    loader.end()
    clock.advance(10 * LOAD_LIMIT_S)  # stopped: that is no time of its loads
    held = cache.get("aa", "/a")
    run(cache, clock, LOAD_LIMIT_S, ["aa"])
    assert held.failure == "" and cache.num_loading == 1
    with capture_logs() as logs:
        run(cache, clock, 1.0, ["aa"])
    assert [line["event"] for line in logs] == ["adapter_late"]
    assert held.failure == "loading /a takes more than 60 s" and cache.num_loading == 0
    assert cache.get("aa", "/a") is held, "who asks meanwhile is told the same at once"
    behind = cache.get("bb", "/b")
    cache.serve(set(), ["bb"])
    assert behind.failure == "loading /a takes more than 60 s, and it would be loaded after that"
    assert [task.digest for task in loader.tasks] == ["aa"] and ready.is_open, "no slot is given up for it"


def test_a_late_load_that_ends_after_all_serves_and_so_does_what_comes_behind_it() -> None:
    cache, loader, clock = make(num_slots=2, num_host=2)
    held = cache.get("aa", "/a")
    run(cache, clock, LOAD_LIMIT_S + 1, ["aa"])
    assert held.failure
    loader.end()
    again = cache.get("bb", "/b")
    cache.serve(set(), ["bb"])
    assert held.is_open and held.failure == "" and cache.get("aa", "/a") is held
    loader.end()
    cache.serve(set(), ["bb"])
    assert again.is_open


def test_no_load_is_late_because_the_worker_stood_still() -> None:
    cache, loader, clock = make()
    held = cache.get("aa", "/a")
    cache.serve(set(), ["aa"])
    clock.advance(10 * LOAD_LIMIT_S)
    cache.serve(set(), ["aa"])
    assert held.failure == ""
    loader.end()
    cache.serve(set(), ["aa"])
    assert held.is_open


def test_what_one_rank_alone_failed_to_load_takes_no_more_of_the_others_memory_than_what_was_loaded() -> None:
    """The loader asserts that its host memory has no more than it may."""
    cache, loader, _ = make(num_slots=1, num_host=2)
    for digest in ("aa", "bb", "cc", "dd"):
        held = cache.get(digest, "/a")
        cache.serve(set(), [digest])
        loader.end("no room" if digest in ("aa", "bb", "cc") else "", on_every_rank=False)
        cache.serve(set(), [digest])
        cache.check()
    assert slot_of(held) == 0 and loader.host == {"aa", "dd"}


def test_host_memory_spares_a_read() -> None:
    cache, loader, _ = make(num_slots=1, num_host=2)
    for digest, num_reads in (("aa", 1), ("bb", 2), ("aa", 2), ("cc", 3), ("aa", 3), ("bb", 4)):
        cache.get(digest, "/x")
        cache.serve(set(), [digest])
        loader.end()
        cache.serve(set(), [digest])
        assert loader.num_reads == num_reads, digest


_Move = tuple[int, int]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.integers(0, 3), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=80))
def test_invariants_hold_whatever_comes(num_slots: int, more: int, moves: list[_Move]) -> None:
    """Requests come, begin, end and fail in any order; then all that wait are served."""
    cache, loader, clock = make(num_slots, num_slots + more)
    waiting: list[str] = []
    begun: list[str] = []
    kept: dict[str, int] = {}

    def serve() -> None:
        cache.serve(set(begun), waiting)
        cache.check()
        for digest in begun:
            assert cache.get(digest, "/x").slot == kept[digest], "a slot was taken from a running sequence"
        for digest in list(waiting):
            held = cache.get(digest, "/x")
            if held.is_open:
                waiting.remove(digest)
                begun.append(digest)
                kept[digest] = held.slot if held.slot is not None else -1

    for kind, number in moves:
        if kind <= 1:
            waiting.append(f"{number:02x}")
            cache.get(waiting[-1], "/x")
        elif kind == 2 and begun:
            begun.pop(number % len(begun))
        elif kind == 3 and loader.tasks:
            loader.end()
        elif kind == 4 and loader.tasks:
            digest = loader.tasks[0].digest
            loader.end("gone")
            waiting = [other for other in waiting if other != digest]
        else:
            clock.advance(PATIENCE_S / 2)
        serve()
    for _ in range(20 * (len(waiting) + len(begun) + 1)):
        begun.clear()
        while loader.tasks:
            loader.end()
        clock.advance(PATIENCE_S)
        serve()
    assert not waiting
