"""A fetch has as much time as what it spares is worth, and is of whoever computes the prompt."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvferry.kvcache.blocks import hash_blocks, prefix_salt
from kvferry.router.dispatch.prefix_fetch import fetch_from, may_fetch
from kvferry.router.placement.least_loaded import LeastLoaded
from kvferry.router.state.adapter_use import AdapterUse
from kvferry.router.state.demand import Demand, Placement, Wait
from kvferry.router.state.views import PoolView
from kvferry.wire.results import TaskRefused
from kvferry.wire.tasks import LocalTask, PrefillTask
from kvferry.wire.workers import CacheChange

from ..fleet import SPEC, Fleet, Link

BLOCK = 16
TOKEN_S = 0.001  # to compute


def _worker(name: str, number: int) -> Any:
    hello = SimpleNamespace(kv_address=f"{name}:1", tp_size=1, transport="tcp", spec=SimpleNamespace(block_size=BLOCK))
    return SimpleNamespace(worker_id=name, link=SimpleNamespace(number=number), hello=hello)


@pytest.mark.parametrize(
    ("num_held", "num_lent", "within_s"),
    [(0, 10, 2.0), (0, 1000, 8.0), (500, 1000, 4.0), (1000, 1000, None), (0, 0, None)],
)
def test_a_long_prefix_has_half_the_time_that_computing_it_takes(
    num_held: int, num_lent: int, within_s: float | None
) -> None:
    source, reader = _worker("lender", 1), _worker("reader", 2)
    pools = SimpleNamespace(
        named={"lender": source}.get,
        held_blocks=lambda hashes, num_tokens: {1: num_lent, 2: num_held},
        predictor=SimpleNamespace(prefill_s=lambda session, tokens, context: tokens * TOKEN_S if session == 2 else 0.0),
    )
    request = SimpleNamespace(block_hashes=[b""], num_prompt_tokens=num_lent * BLOCK)
    found = fetch_from(cast("Any", pools), cast("Any", request), "lender", reader)
    assert (None if found is None else found.within_s) == within_s
    assert found is None or found.num_tokens == num_lent * BLOCK


@pytest.mark.parametrize("change", [{"kv_address": ""}, {"tp_size": 2}, {"transport": "local"}])
def test_nothing_is_read_from_a_worker_that_cannot_lend_it(change: dict[str, object]) -> None:
    source, reader = _worker("lender", 1), _worker("reader", 2)
    assert may_fetch(source, reader)
    vars(source.hello).update(change)
    assert not may_fetch(source, reader)


def test_a_prompts_blocks_have_the_names_that_workers_give_them() -> None:
    fleet = Fleet()
    fleet.join("d-0")
    plain = fleet.submit(40).request
    own = fleet.submit(40, cache_salt=b"mine", adapter=AdapterUse("digest", "/adapter", 1)).request
    prompt = range(40)
    assert plain.block_hashes == hash_blocks(prompt, BLOCK, prefix_salt(SPEC, b"", ""))
    assert own.block_hashes == hash_blocks(prompt, BLOCK, prefix_salt(SPEC, b"mine", "digest"))


class _Fetching(Fleet):
    """A fleet whose every prompt goes to the first prefill worker, and reads its beginning from the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **decode: object) -> None:
        place = LeastLoaded.place

        def placed(policy: LeastLoaded, view: PoolView, demand: Demand) -> Placement | Wait:
            found = place(policy, view, demand)
            return replace(found, prefill_worker="p-0", fetch_from="p-1") if isinstance(found, Placement) else found

        monkeypatch.setattr(LeastLoaded, "place", placed)
        super().__init__()
        self.first, self.lender = self.join("p-0"), self.join("p-1")
        self.decoder = self.join("d-0", **decode)
        self.holds(self.lender, 64)

    def holds(self, link: Link, num_tokens: int) -> None:
        hashes = hash_blocks(range(num_tokens), BLOCK, prefix_salt(SPEC, b""))
        self.dispatcher.on_message(link, CacheChange(seq=0, stored=b"".join(hashes)))

    def refused_task(self) -> PrefillTask:
        """The first prefill worker's, which it will not have."""
        self.submit(80)
        self.grant(self.decoder)
        task = self.first.take(PrefillTask)
        assert task.fetch is not None and task.fetch.worker_id == "p-1" and task.fetch.num_tokens == 64
        message = TaskRefused(request_id=task.spec.request_id, attempt=task.spec.attempt, reason="blocks")
        self.dispatcher.on_message(self.first, message)
        return task


async def test_a_worker_that_takes_a_refused_task_reads_nothing_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = _Fetching(monkeypatch)
    fleet.refused_task()
    assert fleet.lender.take(PrefillTask).fetch is None


async def test_a_worker_that_takes_a_refused_task_reads_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = _Fetching(monkeypatch)
    third = fleet.join("p-2")
    fleet.beat(fleet.lender, state="draining")
    planned = fleet.refused_task().fetch
    assert third.take(PrefillTask).fetch == planned


@pytest.mark.parametrize(("num_held", "is_read"), [(48, True), (64, False)])
async def test_a_decode_worker_that_computes_instead_reads_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, num_held: int, is_read: bool
) -> None:
    fleet = _Fetching(monkeypatch)
    fleet.holds(fleet.decoder, num_held)
    fleet.submit(80)
    fleet.refuse(fleet.decoder, "held")
    assert (fleet.decoder.take(LocalTask).fetch is not None) is is_read


async def test_a_decode_worker_with_other_ranks_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = _Fetching(monkeypatch, tp_size=2)
    fleet.submit(80)
    fleet.refuse(fleet.decoder, "held")
    assert fleet.decoder.take(LocalTask).fetch is None
