"""What a prompt's beginning is fetched into is not taken from the answers that run."""

from __future__ import annotations

from kvferry.common.batch import RowOutput, StepOutput
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.wire.fetches import KVFetch, KVFetchable
from kvferry.wire.tasks import FetchFrom, LocalTask
from kvferry.worker.core import WorkerCore

from ..decode.bench import REGION
from ..fake_clock import FakeClock
from .core_bench import Outside, make_core


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
    core = make_core(outside, FakeClock(), 21)
    for number in range(4):
        core.on_router_message("R", LocalTask(spec=_spec(f"s{number}", 14, number)))
    for _ in range(3):
        _step(core)
    assert core.decode.scheduler.num_running == 4 and core.pool.num_free_blocks == 5
    source = FetchFrom(worker_id="p", kv_address="p:1", num_tokens=16, within_s=5.0)
    core.on_router_message("R", LocalTask(spec=_spec("new", 40, 9), fetch=source))
    [asked] = [message for _, message in outside.told("to_target") if isinstance(message, KVFetch)]
    assert len(asked.hashes) == 16, "the one block that nobody needs to grow"
    core.on_fetch_answer(
        KVFetchable(fetch_id=asked.fetch_id, lease_s=5.0, block_ids=(0,), ranks=(REGION,)),
    )
    assert core.pool.num_free_blocks == 4
    for _ in range(3):
        _step(core)
    assert core.decode.scheduler.num_running == 4 and core.decode.scheduler.num_preemptions == 0
