"""A worker's heartbeat, put together in one place from the figures of its parts."""

from __future__ import annotations

from msgspec.structs import asdict

from ..engine.loop import StepFigures
from ..wire.workers import WorkerStatus
from .core import WorkerCore


def make_status(core: WorkerCore, router_id: str, steps: StepFigures) -> WorkerStatus:
    """Return the next heartbeat to a router, with what has gathered for it. The core's lock is held."""
    shipping = core.send_counters()
    roles, pool, cache, fetches = core.roles, core.pool, core.cache, core.fetches
    receiver, scheduler = core.receiver, core.decode.scheduler
    return WorkerStatus(
        seq=next(core.heartbeats),
        state="draining" if roles.draining else "ready",
        **asdict(steps),
        **asdict(roles.counters()),
        **asdict(scheduler.draft_counters),
        num_free_blocks=pool.num_free_blocks,
        num_cached_blocks=pool.num_cached_blocks,
        num_quarantined_blocks=receiver.reservations.num_quarantined_blocks,
        num_blocks=pool.num_blocks,
        num_swapped_blocks=scheduler.blocks.swap.num_saved_blocks,
        decode_context=scheduler.queues.num_context_tokens,
        transfer_bytes=shipping.num_bytes,
        wire_bytes=shipping.wire_bytes,
        transfer_failures=shipping.num_failures + receiver.counters.num_failures,
        num_fences=receiver.rotation.timer.num_rotations,
        num_failed_fences=receiver.rotation.timer.num_failures,
        quarantine_s=receiver.quarantine_s(),
        checksum_failures=receiver.counters.checksum_failures,
        grant_rejects=tuple(sorted(receiver.counters.grant_rejects.items())),
        host_blocks=len(cache.host),
        disk_blocks=cache.num_disk_blocks,
        promoted_blocks=cache.num_promoted_blocks,
        demoted_blocks=cache.num_demoted_blocks,
        tier_failures=cache.num_failures,
        num_fetches=fetches.num_fetches,
        failed_fetches=fetches.num_failures,
        fetched_bytes=fetches.num_bytes,
        fetch_s=fetches.seconds,
        role=roles.active_role,
        samples=core.samples.take(router_id),
        adapters=core.adapters.loaded if core.adapters is not None else (),
        loading_adapters=core.adapters.num_loading if core.adapters is not None else 0,
        experts=core.expert_reports.due(router_id),
        share=core.shares.share(router_id, roles.routers),
    )
