"""Requests that name an adapter: it is asked for with their reservation, and they begin when it is open to them."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.wire.results import TaskRefused
from kvferry.wire.tasks import Abort, LocalTask, ReserveKV

from .bench import Bench, first_token


@dataclass
class _Held:
    """Implements `HeldAdapter`."""

    slot: int | None = None
    is_open: bool = False
    failure: str = ""


class _Adapters:
    """Implements `Adapters` with one of them."""

    def __init__(self) -> None:
        self.held = _Held()
        self.asked: list[tuple[str, str]] = []

    def get(self, digest: str, path: str) -> _Held:
        self.asked.append((digest, path))
        return self.held


def _bench() -> tuple[Bench, _Adapters]:
    bench, adapters = Bench(), _Adapters()
    bench.role = bench.make_role(adapters=adapters)
    return bench, adapters


def test_an_adapter_is_loaded_from_the_reservation_on() -> None:
    bench, adapters = _bench()
    bench.send(ReserveKV(spec=bench.spec("a", 6, adapter="ab", adapter_path="/there")))
    assert adapters.asked == [("ab", "/there")] and bench.role.adapters_in_use() == (set(), ["ab"])


def test_a_prompt_takes_neither_row_nor_blocks_before_its_adapter_is_open_to_it() -> None:
    bench, adapters = _bench()
    bench.send(LocalTask(spec=bench.spec("a", 9, adapter="ab")))
    for slot in (None, 3):  # it has its slot, and is to lose it
        adapters.held.slot = slot
        assert bench.role.schedule() is None and bench.pool.num_owned_blocks == 0
    adapters.held.is_open = True
    bench.run()
    assert len(bench.tokens("a")[0]) == 4 and bench.role.is_quiet


def test_an_answer_whose_adapter_has_no_slot_stands_still_while_others_go_on() -> None:
    bench, adapters = _bench()
    adapters.held = _Held(slot=0, is_open=True)
    bench.hand_over(bench.spec("a", 6, n=2, adapter="ab"), (first_token(0, 5), first_token(1, 5)))
    bench.hand_over(bench.spec("b", 6), (first_token(0, 5),))
    adapters.held.slot = None
    batch = bench.role.schedule()
    assert batch is not None and [row.seq.request_id for row in batch.rows] == ["b"]
    is_vain = [bench.role.scheduler.is_step_vain]
    bench.send(Abort(request_id="b", attempt=0))
    is_vain.append(bench.role.scheduler.is_step_vain)
    assert is_vain == [False, True], "whoever else runs has no row in it"
    bench.complete(batch)
    adapters.held.slot = 1
    bench.run()
    assert bench.tokens("a") == {choice: [(0, 5), (1, 9), (2, 9), (3, 9)] for choice in (0, 1)} and bench.role.is_quiet


def test_choices_of_a_prompt_that_is_computed_here_have_its_adapter() -> None:
    bench, adapters = _bench()
    adapters.held = _Held(slot=2, is_open=True)
    bench.send(LocalTask(spec=bench.spec("a", 6, n=2, adapter="ab")))
    for num_rows in (1, 2):
        batch = bench.step()
        assert batch is not None and [row.seq.adapter_slot for row in batch.rows] == [2] * num_rows


def test_an_adapter_that_is_lost_and_cannot_be_loaded_again_ends_its_answers() -> None:
    bench, adapters = _bench()
    adapters.held = _Held(slot=0, is_open=True)
    bench.send(LocalTask(spec=bench.spec("a", 6, adapter="ab")))
    bench.step()
    assert bench.role.adapters_in_use() == ({"ab"}, ["ab"])
    held = bench.role.scheduler.queues.running[0].held_adapter
    assert isinstance(held, _Held)
    held.slot, held.is_open, held.failure = None, False, "its file is gone"
    assert bench.role.schedule() is None and bench.role.is_quiet
    refused = bench.last(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "adapter" and "its file is gone" in refused.detail
