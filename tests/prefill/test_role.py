"""Tasks in, first tokens out, shipments begun, ended and given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest

from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.grammar import Grammar, Grammars, pack_mask
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import FinishReason, RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.common.served import Served
from kvferry.kvcache.blocks import BlockPool
from kvferry.prefill.role import PrefillRole
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.protocol.handoff import Endpoint
from kvferry.transfer.send.counters import SendCounters
from kvferry.transfer.send.plan import ShipPlan
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo
from kvferry.wire.results import ChoiceTokens, FirstToken, PromptLogprobs, TaskRefused, WorkerFailure
from kvferry.wire.tasks import Abort, PrefillTask
from kvferry.wire.workers import LiveRequests

BLOCK, EOS = 4, 2
FIRST_MASK = b"\6\0\0\1" * 2
SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")
REGION = RegionInfo(
    rank=0,
    tp_size=1,
    agent="d.1.0.0",
    generation=0,
    agent_metadata=b"",
    base_addr=0,
    num_blocks=64,
    page_bytes=SPEC.page_bytes(),
    device="DRAM",
    device_id=0,
    transport="local",
)


@dataclass
class _Shipping:
    """Records what the role asks of the senders."""

    opened: list[str] = field(default_factory=list)
    opens: list[tuple[str, int]] = field(default_factory=list)
    plans: list[ShipPlan] = field(default_factory=list)
    finished: dict[int, tuple[ChoiceTokens, ...]] = field(default_factory=dict)
    cancelled: dict[int, str] = field(default_factory=dict)

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        self.opened.append(request_id)
        self.opens.append((request_id, attempt))
        return len(self.opened)

    def begin_step(self, plans: list[ShipPlan]) -> None:
        self.plans += plans

    def on_layer(self, layer: int) -> None:
        pass

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int = 0) -> None:
        self.finished[open_id] = first_tokens

    def cancel(self, open_id: int, reason: str) -> None:
        self.cancelled.setdefault(open_id, reason)

    def counters(self) -> SendCounters:
        return SendCounters(0, 0, 0, 0)


class _Bench:
    """A prefill role over fakes, stepped by hand; each step samples `token`."""

    def __init__(
        self, num_blocks: int = 16, budget: int = 8, grammars: Grammars | None = None, max_model_len: int = 1000
    ) -> None:
        self.shipping, self.sent = _Shipping(), list[tuple[str, Message]]()
        self.pool, self.clock = BlockPool(num_blocks, BLOCK), FakeClock()
        self.role = PrefillRole(
            pool=self.pool,
            endpoint=Endpoint(SPEC, "0", "local", 1),
            clock=self.clock,
            shipping=self.shipping,
            to_router=lambda router, message: self.sent.append((router, message)),
            eos_token_ids=frozenset({EOS}),
            max_model_len=max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=4,
            served=Served(grammars=grammars),
        )

    def task(self, name: str, num_tokens: int, **more: object) -> None:
        self.role.on_router_message("R", self.prefill_task(name, num_tokens, **more))  # type: ignore[arg-type]

    def prefill_task(
        self,
        name: str,
        num_tokens: int,
        *,
        attempt: int = 0,
        sample: bool = True,
        spec: KVCacheSpec = SPEC,
        priority: int = 0,
        remaining_s: float | None = None,
        first: int = 0,
        grammar: Grammar | None = None,
        **sampling: object,
    ) -> PrefillTask:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})  # type: ignore[arg-type]
        request = RequestSpec(
            request_id=name,
            attempt=attempt,
            prompt=pack_ids(list(range(first, first + num_tokens))),
            sampling=params,
            choices=(0, 1),
            priority=priority,
            remaining_s=remaining_s,
            grammar=grammar,
        )
        grant = GrantInfo(
            grant_id=GrantId("d", 1, 1),
            spec=spec,
            kv_address="127.0.0.1:1",
            block_ids=tuple(range(-(-num_tokens // BLOCK))),
            num_tokens=num_tokens,
            num_computed_tokens=0,
            ranks=(REGION,),
            open_within_s=2.0,
            mac=b"",
        )
        mask = pack_mask(FIRST_MASK) if sample and grammar is not None else b""
        return PrefillTask(spec=request, grant=grant, sample=sample, first_mask=mask)

    def begin(self) -> Batch | None:
        batch = self.role.schedule()
        if batch is not None:
            self.role.begin_step(batch)
        return batch

    def end(self, batch: Batch, token: int = 9) -> None:
        rows = []
        for row in batch.rows:
            tokens = tuple(SampledToken(token) for _ in row.choices) if row.samples else ()
            wants = row.seq.sampling.prompt_logprobs is not None
            logprobs = tuple(SampledToken(t, -1.0) for t in row.seq.token_ids[row.start + 1 : row.end + 1])
            rows.append(RowOutput(tuple((token,) for token in tokens), logprobs if wants else ()))
        self.role.complete(batch, StepOutput(rows, 0.01, batch.num_tokens))

    def run(self, token: int = 9) -> None:
        while (batch := self.begin()) is not None:
            self.end(batch, token)

    def messages(self, kind: type[Message]) -> list[Message]:
        return [message for _, message in self.sent if isinstance(message, kind)]


def test_a_prompt_is_opened_once_shipped_by_chunk_and_finished_with_its_first_tokens() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.run()
    assert bench.shipping.opened == ["a"]
    assert [plan.remote_blocks for plan in bench.shipping.plans if not plan.all_layers] == [(0, 1), (2, 3), (4,)]
    [first] = bench.messages(FirstToken)
    assert isinstance(first, FirstToken)
    assert [choice.choice for choice in first.choices] == [0, 1] and first.num_cached_tokens == 0
    assert bench.shipping.finished == {1: first.choices}


def _one_waits() -> tuple[_Bench, Batch]:
    """The prompt of b waits while a step computes that of a, all of it."""
    bench = _Bench()
    bench.task("a", 8)
    running = bench.begin()
    assert running is not None
    bench.task("b", 8)
    return bench, running


def test_a_grant_is_opened_before_it_lapses_though_a_long_step_is_computed() -> None:
    """A step of 512 tokens takes over two seconds on a few cores; that a prompt waits for one costs it no attempt."""
    bench, running = _one_waits()
    bench.clock.advance(0.9)
    bench.role.tick()
    assert bench.shipping.opened == ["a"]  # for another prefill worker may still be given it
    bench.clock.advance(0.2)
    bench.role.tick()
    bench.role.tick()
    assert bench.shipping.opened == ["a", "b"]
    bench.end(running)
    bench.run()
    assert bench.shipping.opened == ["a", "b"] and set(bench.shipping.finished) == {1, 2}
    bench.role.check()


def test_a_prompt_that_waits_and_is_aborted_ends_its_open_shipment() -> None:
    bench, running = _one_waits()
    bench.clock.advance(1.1)
    bench.role.tick()
    bench.role.on_router_message("R", Abort(request_id="b", attempt=0))
    assert bench.shipping.cancelled.keys() == {2}
    bench.end(running)
    bench.role.on_source_free(2)
    bench.role.check()


def test_a_prompt_that_waits_beyond_its_deadline_ends_its_open_shipment() -> None:
    bench = _Bench()
    bench.task("a", 8)
    running = bench.begin()
    assert running is not None
    bench.task("b", 8, first=100, remaining_s=1.5)
    bench.clock.advance(1.1)
    bench.role.tick()
    bench.clock.advance(0.4)
    bench.end(running)
    assert bench.begin() is None and bench.shipping.cancelled.keys() == {2}


def test_an_abort_that_comes_late_leaves_the_attempt_behind_the_one_that_it_names() -> None:
    bench = _Bench()
    bench.task("a", 8, attempt=1)
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    bench.run()
    assert set(bench.shipping.finished) == {1} and not bench.shipping.cancelled


def test_a_router_that_knows_a_request_no_more_ends_its_shipment_though_its_prompt_is_computed() -> None:
    bench = _Bench()
    for number, name in enumerate("ab"):
        bench.task(name, 8, first=100 * number)
    bench.run()
    assert set(bench.shipping.finished) == {1, 2} and bench.role.routers == {"R"}
    bench.role.on_router_message("R", LiveRequests(attempts=(("b", 0),)))
    bench.role.on_router_message("Q", LiveRequests(attempts=()))
    assert bench.shipping.cancelled.keys() == {1}


@pytest.mark.parametrize("retains_prefix", [True, False])
def test_blocks_that_another_worker_keeps_are_spare(retains_prefix: bool) -> None:
    bench = _Bench()
    task = msgspec.structs.replace(bench.prefill_task("a", 8), retains_prefix=retains_prefix)
    bench.role.on_router_message("R", task)
    bench.run()
    blocks = [bench.pool.block_of(name) for name in bench.pool.published()]
    assert [bench.pool.is_spare(block) for block in blocks if block is not None] == [not retains_prefix] * 2


def test_blocks_that_two_shipments_read_are_held_once() -> None:
    bench = _Bench()
    for request_id in ("a", "b"):
        bench.task(request_id, 18)
        bench.run()
    held = bench.pool.num_owned_blocks
    assert held < 10 and bench.role.counters().num_granted_blocks == held


def test_blocks_are_held_until_their_shipment_reads_them_no_more() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.run()
    assert bench.pool.num_owned_blocks == bench.role.counters().num_granted_blocks == 5
    bench.role.on_source_free(1)
    bench.role.on_source_free(1)  # idempotent
    assert bench.pool.num_owned_blocks == 0
    assert bench.role.num_unfinished == 1, "the decode worker may not have heard of the arrival"
    assert bench.role.router_of(1) == "R"
    assert bench.role.is_quiet and bench.role.num_unfinished == 0
    bench.role.check()


def test_a_retry_ships_from_the_prefix_cache() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.run()
    bench.role.on_source_free(1)
    bench.task("a", 18, attempt=1)
    batch = bench.begin()
    assert batch is not None and [row.num_scheduled_tokens for row in batch.rows] == [2]
    hits = next(plan for plan in bench.shipping.plans if plan.open_id == 2 and plan.all_layers)
    assert len(hits.local_blocks) == 4


def test_choices_that_all_end_with_their_first_token_need_no_arrival_and_the_router_ends_their_handoff() -> None:
    bench = _Bench()
    bench.task("a", 6)
    bench.run(token=EOS)
    [first] = bench.messages(FirstToken)
    assert isinstance(first, FirstToken) and {c.finish for c in first.choices} == {FinishReason.STOP}
    assert not bench.shipping.cancelled and not bench.shipping.finished
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert list(bench.shipping.cancelled) == [1]


def test_a_resumed_prompt_is_shipped_without_a_first_token() -> None:
    bench = _Bench()
    bench.task("a", 6, sample=False)
    bench.run()
    assert not bench.messages(FirstToken) and bench.shipping.finished == {1: ()}


def test_an_abort_before_the_first_chunk_costs_nothing() -> None:
    bench = _Bench()
    bench.task("a", 6)
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert bench.begin() is None and not bench.shipping.opened and bench.role.num_unfinished == 0


def test_an_abort_between_chunks_cancels_the_shipment_and_returns_the_blocks_after_it() -> None:
    bench = _Bench()
    bench.task("a", 18)
    batch = bench.begin()
    assert batch is not None
    bench.end(batch)
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert 1 in bench.shipping.cancelled and bench.pool.num_owned_blocks == 5
    bench.role.on_source_free(1)
    assert bench.pool.num_owned_blocks == 0
    assert bench.begin() is None


def test_an_abort_during_a_step_returns_the_blocks_after_both_the_step_and_the_shipment() -> None:
    for shipment_first in (True, False):
        bench = _Bench()
        bench.task("a", 18)
        batch = bench.begin()
        assert batch is not None
        bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
        ends = [partial(bench.role.on_source_free, 1), partial(bench.end, batch)]
        for end in ends if shipment_first else reversed(ends):
            assert bench.pool.num_owned_blocks == 5
            end()
        assert bench.pool.num_owned_blocks == 0 and not bench.messages(FirstToken)
        bench.pool.check()


def test_a_shipment_that_ends_early_stops_the_computation_and_what_is_computed_stays_cached() -> None:
    bench = _Bench()
    bench.task("a", 18)
    batch = bench.begin()
    assert batch is not None
    bench.end(batch)
    bench.role.on_source_free(1)
    assert bench.begin() is None
    assert (bench.pool.num_owned_blocks, bench.pool.num_cached_blocks) == (0, 2)


def test_an_older_attempt_is_dropped_and_a_newer_one_replaces_it() -> None:
    bench = _Bench()
    bench.task("a", 18, attempt=3)
    bench.task("a", 18, attempt=2)
    assert bench.role.counters().stale_messages == 1
    bench.task("a", 18, attempt=4)
    bench.run()
    assert [m.attempt for m in bench.messages(FirstToken) if isinstance(m, FirstToken)] == [4]


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    bench = _Bench(num_blocks=2)
    bench.task("a", 18)
    [refused] = bench.messages(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "never_fits" and "5 blocks" in refused.detail


def test_a_grant_that_does_not_fit_is_refused_with_both_values() -> None:
    bench = _Bench()
    bench.role.on_router_message("R", bench.prefill_task("a", 4, spec=msgspec.structs.replace(SPEC, head_dim=16)))
    [refused] = bench.messages(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "incompatible"
    assert "head_dim 8 here, 16 there" in refused.detail


def test_a_draining_worker_takes_nothing_new() -> None:
    bench = _Bench()
    bench.role.draining = True
    bench.task("a", 4)
    [refused] = bench.messages(TaskRefused)
    assert isinstance(refused, TaskRefused) and refused.reason == "draining"


def test_requests_that_their_router_no_longer_knows_end() -> None:
    bench = _Bench()
    bench.task("a", 4)
    bench.task("b", 4)
    bench.role.on_router_message("R", LiveRequests(attempts=(("b", 0),)))
    bench.run()
    assert bench.shipping.opened == ["b"]


def test_prompt_logprobs_come_for_every_token_but_the_first() -> None:
    bench = _Bench()
    bench.task("a", 18, prompt_logprobs=0)
    bench.run()
    got = [m for m in bench.messages(PromptLogprobs) if isinstance(m, PromptLogprobs)]
    tokens = {m.start + i: token.token_id for m in got for i, token in enumerate(m.tokens)}
    assert tokens == {index: index for index in range(1, 18)}


def test_what_has_expired_is_not_begun() -> None:
    bench = _Bench(num_blocks=4)
    bench.task("now", 4, remaining_s=0.0)
    bench.task("first", 12)
    batch = bench.begin()
    bench.task("late", 12, remaining_s=1.0, first=100)
    assert batch is not None
    bench.end(batch)
    bench.clock.advance(1.1)
    bench.run()
    refused = [(m.request_id, m.reason) for m in bench.messages(TaskRefused) if isinstance(m, TaskRefused)]
    assert refused == [("now", "expired"), ("late", "expired")]
    assert bench.shipping.opened == ["first"] and 1 in bench.shipping.finished
    bench.role.check()


def test_a_drain_lasts_until_every_shipment_has_ended() -> None:
    bench = _Bench()
    bench.task("a", 18)
    bench.role.draining = True
    bench.run()
    bench.role.on_source_free(1)
    assert bench.messages(FirstToken) and bench.role.num_unfinished == 1
    bench.role.router_of(1)
    assert bench.role.num_unfinished == 0


def test_logits_that_are_no_distribution_end_their_request_alone() -> None:
    """The router hears it before the decode worker hears that the handoff is over: there is no second attempt."""
    bench = _Bench()
    bench.task("a", 4)
    bench.task("b", 4, first=50)
    batch = bench.begin()
    assert batch is not None and [row.seq.request_id for row in batch.rows] == ["a", "b"]
    rows = [RowOutput((), is_finite=False), RowOutput(((SampledToken(9),), (SampledToken(9),)))]
    bench.role.complete(batch, StepOutput(rows, 0.01, 8))
    [failure] = bench.messages(WorkerFailure)
    assert isinstance(failure, WorkerFailure)
    assert (failure.request_id, failure.code) == ("a", "nonfinite_logits") and not bench.shipping.cancelled
    [first] = bench.messages(FirstToken)
    assert isinstance(first, FirstToken) and first.request_id == "b"
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    assert list(bench.shipping.cancelled) == [1] and list(bench.shipping.finished) == [2]
    for open_id in (1, 2):
        bench.role.on_source_free(open_id)
    bench.role.router_of(1), bench.role.router_of(2)
    bench.role.check()
    assert bench.role.is_quiet and bench.role.counters().nonfinite_rows == 1
    assert bench.pool.num_owned_blocks == 0 and bench.pool.num_cached_blocks == 1, "b's alone"


def test_blocks_of_a_prompt_without_a_distribution_are_found_no_more_those_of_its_first_chunks_too() -> None:
    bench = _Bench()
    bench.task("a", 12)
    batch = bench.begin()
    assert batch is not None
    bench.end(batch)
    assert len(list(bench.pool.published())) == 2
    batch = bench.begin()
    assert batch is not None
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False)], 0.01, 4))
    assert not list(bench.pool.published())


@pytest.mark.parametrize(("tokens", "num_handed_over"), [((EOS, 9), 1), ((9, EOS), 1), ((EOS, EOS), 0)])
def test_a_prompt_is_handed_over_unless_every_choice_ended_with_its_first_token(
    tokens: tuple[int, int], num_handed_over: int
) -> None:
    bench = _Bench()
    bench.task("a", 8)
    batch = bench.begin()
    assert batch is not None
    row = RowOutput(tuple((SampledToken(token),) for token in tokens))
    bench.role.complete(batch, StepOutput([row], 0.01, 8))
    assert len(bench.messages(FirstToken)) == 1 and len(bench.shipping.finished) == num_handed_over


def test_a_first_token_tells_how_long_its_prompt_waited_and_was_computed() -> None:
    bench = _Bench()
    bench.task("a", 8)
    bench.clock.advance(2.0)
    batch = bench.begin()
    assert batch is not None
    bench.clock.advance(3.0)
    bench.end(batch)
    [first] = bench.messages(FirstToken)
    assert isinstance(first, FirstToken)
    assert first.queue_s == pytest.approx(2.0) and first.prefill_s == pytest.approx(3.0)


@pytest.mark.parametrize(("num_tokens", "finish"), [(7, None), (8, FinishReason.LENGTH)])
def test_a_first_token_that_fills_the_model_is_the_last(num_tokens: int, finish: FinishReason | None) -> None:
    bench = _Bench(max_model_len=9)
    bench.task("a", num_tokens)
    bench.run()
    [first] = bench.messages(FirstToken)
    assert isinstance(first, FirstToken) and [choice.finish for choice in first.choices] == [finish] * 2


def test_what_a_step_copies_is_no_time_of_its_prompts() -> None:
    speeds = []
    for swap_s in (0.0, 5.0):
        bench = _Bench(num_blocks=64, budget=64)
        bench.task("a", 64)
        batch = bench.begin()
        assert batch is not None
        row = RowOutput(((SampledToken(9),), (SampledToken(9),)))
        bench.role.complete(batch, StepOutput([row], 0.01 + swap_s, 64, swap_s=swap_s))
        speeds.append(bench.role.scheduler._s_per_token)
    assert speeds[0] == pytest.approx(speeds[1])


def test_log_probabilities_of_a_chunk_end_a_request_before_its_last_one() -> None:
    bench = _Bench()
    bench.task("a", 18, prompt_logprobs=1)
    batch = bench.begin()
    assert batch is not None and batch.num_tokens == 8
    bench.role.complete(batch, StepOutput([RowOutput((), is_finite=False)], 0.01, 8))
    assert bench.messages(WorkerFailure) and not bench.messages(PromptLogprobs) and bench.begin() is None
    bench.role.on_router_message("R", Abort(request_id="a", attempt=0))
    bench.role.on_source_free(1)
    bench.role.router_of(1)
    bench.role.check()
    assert bench.role.is_quiet and bench.pool.num_free_blocks == bench.pool.num_blocks
    assert not bench.pool.num_cached_blocks
