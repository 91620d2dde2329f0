"""A simulated worker's heartbeat, in the words of a real one's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.messages import WorkerStatus

if TYPE_CHECKING:
    from .worker import SimWorker


def status_of(worker: SimWorker, number: int) -> WorkerStatus:
    """Return the status as of now; a jump under way is looked at, not disturbed."""
    figures = worker.engine.figures()
    prefill, decode, pool = worker.prefill, worker.decode, worker.pool
    return WorkerStatus(
        seq=number,
        state="draining" if worker.draining else "ready",
        num_running=prefill.scheduler.num_running + decode.scheduler.num_running,
        num_waiting=prefill.scheduler.num_waiting + decode.num_waiting,
        waiting_tokens=prefill.scheduler.waiting_tokens + figures.waiting_tokens,
        num_free_blocks=figures.num_free_blocks,
        num_cached_blocks=pool.num_cached_blocks,
        num_granted_blocks=decode.reservations.num_granted_blocks,
        num_quarantined_blocks=0,
        num_blocks=pool.num_blocks,
        steps=figures.num_steps,
        busy_for_s=figures.busy_for_s,
        step_s=figures.last_step_s,
        step_tokens=figures.last_step_tokens,
        num_preemptions=decode.scheduler.num_preemptions,
        prefix_queries=worker.prefix_queries,
        prefix_hits=worker.prefix_hits,
        transfer_bytes=prefill.num_bytes,
        num_fetches=worker.fetches.num_fetches,
        fetched_bytes=worker.fetches.num_bytes,
        fetch_s=worker.fetches.seconds,
        host_blocks=len(worker.cache.host),
        promoted_blocks=worker.cache.num_promoted_blocks,
        demoted_blocks=worker.cache.num_demoted_blocks,
        role=worker.role,
        decode_context=figures.decode_context,
        samples=worker.engine.take_samples(),
    )
