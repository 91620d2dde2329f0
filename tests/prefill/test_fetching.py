"""A prompt whose prefix is being read from another worker waits, others do not, and it begins with what has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from kvferry.kvcache.blocks import hash_blocks, prefix_salt
from kvferry.kvcache.thin import ThinRule
from kvferry.prefill.role import PrefillRole
from kvferry.wire.tasks import Abort, FetchFrom

from .test_role import BLOCK, SPEC, _Bench

SOURCE = FetchFrom(worker_id="d-1", kv_address="d-1:1", num_tokens=8)
HASHES = hash_blocks(list(range(8)), BLOCK, prefix_salt(SPEC, b""))


class _Fetches:
    """Ends when the test says so."""

    def __init__(self, *, is_needed: bool = True) -> None:
        self.is_needed = is_needed
        self.begun: dict[str, tuple[list[bytes], Callable[[], None]]] = {}
        self.cancelled: list[str] = []
        self.spare: set[str] = set()

    def begin(
        self,
        key: str,
        hashes: Sequence[bytes],
        source: FetchFrom,
        rule: ThinRule,
        done: Callable[[], None],
        *,
        spare: bool = False,
    ) -> bool:
        self.begun[key] = (list(hashes), done)
        self.spare.update([key] if spare else [])
        return self.is_needed

    def cancel(self, key: str) -> None:
        self.cancelled.append(key)


def _bench(fetches: _Fetches) -> _Bench:
    bench = _Bench()
    bench.role.fetches = fetches  # type: ignore[assignment]
    return bench


def _fetching_task(bench: _Bench, name: str) -> None:
    task = msgspec.structs.replace(bench.prefill_task(name, 10), fetch=SOURCE)
    bench.role.on_router_message("R", task)


def test_what_is_fetched_for_another_worker_to_keep_is_spare() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    for name, retains_prefix in (("a", True), ("b", False)):
        task = msgspec.structs.replace(bench.prefill_task(name, 10), fetch=SOURCE, retains_prefix=retains_prefix)
        bench.role.on_router_message("R", task)
    assert fetches.spare == {"task b"}


def _arrive(role: PrefillRole) -> None:
    """What a fetch does."""
    blocks = role.pool.allocate(len(HASHES))
    for block, block_hash in zip(blocks, HASHES, strict=True):
        role.pool.publish(block, block_hash)
    role.pool.free(blocks)


def test_a_prompt_waits_for_its_fetch_while_others_are_computed() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    _fetching_task(bench, "a")
    assert fetches.begun["task a"][0] == HASHES
    assert bench.role.schedule() is None
    bench.task("b", 3, first=50)
    batch = bench.role.schedule()
    assert batch is not None and [row.seq.request_id for row in batch.rows] == ["b"]


def _open_waiting(bench: _Bench) -> None:
    bench.clock.advance(1.1)  # of the two seconds in which a grant lapses
    bench.role.tick()
    assert bench.shipping.opened == ["a"]


def test_its_grant_is_opened_before_it_lapses() -> None:
    bench = _bench(_Fetches())
    _fetching_task(bench, "a")
    bench.role.tick()
    assert bench.shipping.opened == []  # another prefill worker may still be given it
    _open_waiting(bench)


def test_what_has_come_is_not_computed_and_is_shipped_as_a_hit() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    _fetching_task(bench, "a")
    _arrive(bench.role)
    fetches.begun["task a"][1]()
    batch = bench.role.schedule()
    assert batch is not None
    assert (batch.rows[0].start, batch.rows[0].num_scheduled_tokens) == (8, 2)
    assert bench.shipping.opened == ["a"]
    bench.role.begin_step(batch)
    assert [plan.all_layers for plan in bench.shipping.plans] == [True, False]
    assert len(bench.shipping.plans[0].local_blocks) == 2


def test_a_fetch_that_brought_nothing_leaves_the_prompt_to_be_computed() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    _fetching_task(bench, "a")
    fetches.begun["task a"][1]()
    batch = bench.role.schedule()
    assert batch is not None and batch.rows[0].start == 0


def test_a_prompt_that_needs_no_fetch_begins_as_ever() -> None:
    bench = _bench(_Fetches(is_needed=False))
    _fetching_task(bench, "a")
    assert bench.shipping.opened == []
    assert bench.role.schedule() is not None
    assert bench.shipping.opened == ["a"]


def test_an_aborted_prompt_gives_its_fetch_up() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    _fetching_task(bench, "a")
    _open_waiting(bench)
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert fetches.cancelled == ["task a"]
    assert list(bench.shipping.cancelled) == [1]
    bench.role.on_source_free(1)
    assert bench.role.schedule() is None
    assert bench.pool.num_owned_blocks == 0


def test_a_grant_that_is_refused_while_its_prefix_is_fetched_ends_the_task() -> None:
    fetches = _Fetches()
    bench = _bench(fetches)
    _fetching_task(bench, "a")
    _open_waiting(bench)
    bench.role.on_source_free(1)
    assert fetches.cancelled == ["task a"]
    assert bench.role.schedule() is None
