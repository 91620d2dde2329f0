"""What the ranks of a worker have done is one result: it is there when all of theirs are, and failed if one has."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from kvferry.common.adapter import AdapterResult, AdapterTask
from kvferry.common.errors import ConfigError
from kvferry.engine import disk
from kvferry.engine.adapters import RankAdapters
from kvferry.engine.disk import RankDisk
from kvferry.engine.weights.slot_matrices import AdapterWeights
from kvferry.kvcache.disk_tier import SPOILT, DiskResult, DiskTask

ANSWER_S = 30.0


class _Slots:
    """A rank's slots, which note what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.put_errors: list[Exception] = []

    def clear(self, slot: int) -> None:
        self.calls.append(f"clear {slot}")

    def read(self, path: Path) -> tuple[str, AdapterWeights]:
        self.calls.append(f"read {path}")
        if path.name == "broken":
            raise ConfigError("it is broken")
        return path.name, AdapterWeights()

    def put(self, slot: int, weights: AdapterWeights) -> None:
        self.calls.append(f"put {slot}")
        if self.put_errors:
            raise self.put_errors.pop()


class _Loader(RankAdapters):
    """Adapters of an engine without one."""

    def __init__(self, size: int = 1) -> None:
        self.slots, self.sent = _Slots(), list[bytes]()
        self.group = cast("Any", SimpleNamespace(send_adapter=self.sent.append))
        engine: Any = SimpleNamespace(
            adapters=self.slots, tp_size=size, config=SimpleNamespace(max_loras=2, max_cpu_loras=None)
        )
        super().__init__(engine, self.group if size > 1 else None)
        self.has_come = threading.Event()
        self.wake = self.has_come.set

    def ended(self) -> list[AdapterResult]:
        """Wait for this rank's own answer."""
        assert self.has_come.wait(ANSWER_S)
        self.has_come.clear()
        return self.results()


def _task(name: str, slot: int = 0, forgotten: tuple[str, ...] = (), path: str = "") -> AdapterTask:
    return AdapterTask(name, path or f"/{name}", slot, forgotten)


def test_an_adapter_is_read_once_until_it_is_forgotten() -> None:
    loader = _Loader()
    assert (loader.num_slots, loader.num_host) == (2, 2)
    for task in (_task("a"), _task("a", 1), _task("b", 0), _task("a", 0, ("a",))):
        loader.submit(task)
        assert loader.ended() == [AdapterResult(task.digest, task.slot)]
    loader.close()
    loader._thread._thread.join(ANSWER_S)
    assert not loader._thread._thread.is_alive()
    first, second = ["clear 0", "read /a", "put 0"], ["clear 1", "put 1"]
    assert loader.slots.calls == [*first, *second, "clear 0", "read /b", "put 0", *first]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/broken", "it is broken"),
        ("/other", "the adapter at /other has changed: its digest is other, a is asked for"),
        ("/a", "RuntimeError('no memory')"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_read_anew(path: str, told: str) -> None:
    loader = _Loader()
    loader.slots.put_errors = [RuntimeError("no memory")] * (path == "/a")
    loader.submit(_task("a", path=path))
    assert loader.ended() == [AdapterResult("a", 0, told)]
    loader.submit(_task("a"))
    assert loader.ended() == [AdapterResult("a", 0)]
    loader.close()
    failed = ["clear 0", f"read {path}", *["put 0"] * (path == "/a")]
    assert loader.slots.calls == [*failed, "clear 0", "read /a", "put 0"]


@pytest.mark.parametrize(("path", "of_other"), [("/a", ""), ("/a", "no memory"), ("/broken", ""), ("/broken", "too")])
@pytest.mark.parametrize("asks_before", [True, False])
def test_an_adapter_is_loaded_when_every_rank_has_it(path: str, of_other: str, asks_before: bool) -> None:
    loader, task = _Loader(2), _task("a", path=path)
    loader.submit(task)
    assert loader.has_come.wait(ANSWER_S)
    other, wanted = AdapterResult("a", 0, of_other), {"it is broken" * (path == "/broken"), of_other}
    if asks_before:
        assert loader.results() == []
    loader.group.on_adapter(other)
    [result] = loader.results()
    loader.close()
    assert result.error in wanted and bool(result.error) == any(wanted) and loader.results() == []
    assert loader.sent == [msgspec.msgpack.encode(task)]


def test_a_task_for_disks_has_ended_when_it_has_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its errors that of a disk goes before that of a block: it says more."""
    own, sent, woken = list[DiskTask](), list[bytes](), list[None]()
    monkeypatch.setattr(disk, "_open_set", lambda *_: SimpleNamespace(stored=list))
    monkeypatch.setattr(disk, "DiskThread", lambda *_: SimpleNamespace(submit=own.append))
    group: Any = SimpleNamespace(send_disk=sent.append)
    engine: Any = SimpleNamespace(tp_size=3, num_disk_slots=4, host_slots=SimpleNamespace(slot=None))
    disks = RankDisk(engine, group)
    disks.wake = lambda: woken.append(None)
    tasks = [DiskTask(False, bytes([number]) * 32, number, number) for number in range(4)]
    answers = [("", "", ""), ("", SPOILT, ""), (SPOILT, "full", ""), ("", "full", SPOILT)]
    for task, errors in zip(tasks, answers, strict=True):
        disks.submit(task)
        for took_s, error in zip((2.0, 3.0, 1.0), errors, strict=True):
            assert disks.results() == []
            group.on_disk(DiskResult(task, error, took_s))
        worst = "full" if "full" in errors else SPOILT * (SPOILT in errors)
        assert disks.results() == [DiskResult(task, worst, 3.0)]
    assert own == tasks and [msgspec.msgpack.decode(each, type=DiskTask) for each in sent] == tasks
    assert len(woken) == 12 and not disks._under_way
