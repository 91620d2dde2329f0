"""What a prompt's beginning is fetched into is not taken from the answers that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvferry.common.batch import RowOutput, StepOutput
from kvferry.common.config import TransferConfig
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.kvcache.prefix_cache import PrefixCache
from kvferry.tests.decode.bench import BLOCK, REGION, SPEC
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.send.counters import SendCounters
from kvferry.wire.fetches import KVFetch, KVFetchable
from kvferry.wire.fields import Message
from kvferry.wire.tasks import FetchFrom, LocalTask
from kvferry.worker.core import WorkerCore
from kvferry.worker.effects import CoreConfig


class Outside:
    """Nothing goes out of the core but what it asks of whoever lends."""

    def __init__(self) -> None:
        self.asked: list[KVFetch] = []

    def to_target(self, address: str, message: Message) -> None:
        if isinstance(message, KVFetch):
            self.asked.append(message)

    def leaving(self) -> Callable[[], None]:
        return lambda: None

    def counters(self) -> SendCounters:
        return SendCounters(0, 0, 0, 0)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


def _core(outside: Any, num_blocks: int) -> WorkerCore:
    pool = BlockPool(num_blocks, BLOCK)
    config = CoreConfig(
        worker_id="d",
        incarnation=1,
        version="0",
        served_model="m",
        role="decode",
        spec=SPEC,
        tp_size=1,
        kv_address="x:1",
        incoming="local",
        outgoing="local",
        transfer=TransferConfig(),
        eos_token_ids=frozenset(),
        max_model_len=1000,
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    core = WorkerCore(
        config,
        pool=pool,
        cache=PrefixCache(pool, spec=SPEC),
        clock=FakeClock(),
        effects=outside,
        shipping=outside,
        reading=outside,
        regions=(REGION,),
    )
    core.on_router_joined("R")
    return core


def _spec(name: str, num_tokens: int, arrival: int) -> RequestSpec:
    prompt = pack_ids(range(1000 * arrival, 1000 * arrival + num_tokens))
    return RequestSpec(
        request_id=name,
        attempt=0,
        prompt=prompt,
        sampling=SamplingParams(temperature=0.0, max_tokens=500),
        arrival=arrival,
    )


def _step(core: WorkerCore) -> None:
    batch = core.steps.schedule()
    if batch is not None:
        rows = [RowOutput(((SampledToken(7),),) if row.samples else ()) for row in batch.rows]
        core.steps.complete(batch, StepOutput(rows, 0.01, batch.num_tokens))


def test_a_fetch_preempts_no_answer() -> None:
    outside = Outside()
    core = _core(outside, num_blocks=21)
    for number in range(4):
        core.on_router_message("R", LocalTask(spec=_spec(f"s{number}", 14, number)))
    for _ in range(3):
        _step(core)
    assert core.decode.scheduler.num_running == 4 and core.pool.num_free_blocks == 5
    source = FetchFrom(worker_id="p", kv_address="p:1", num_tokens=16, within_s=5.0)
    core.on_router_message("R", LocalTask(spec=_spec("new", 40, 9), fetch=source))
    [asked] = outside.asked
    assert len(asked.hashes) == 16, "the one block that nobody needs to grow"
    core.on_fetch_answer(
        KVFetchable(fetch_id=asked.fetch_id, lease_s=5.0, block_ids=(0,), ranks=(REGION,)),
    )
    assert core.pool.num_free_blocks == 4
    for _ in range(3):
        _step(core)
    assert core.decode.scheduler.num_running == 4 and core.decode.scheduler.num_preemptions == 0
