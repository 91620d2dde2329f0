"""A placement's `fetch_from` becomes an order to the worker that computes the prompt.

A prefix is read only between workers whose ranks hold the same heads: equal tensor-parallel sizes. Everything else that
must fit does, as all workers of a router have one KV layout; whoever lends says no where it does not.
"""

from __future__ import annotations

from ...kvcache.blocks import hash_blocks, prefix_salt
from ...wire.tasks import FetchFrom
from ..state.pools import Pools
from ..state.request import RouterRequest
from ..state.worker import RouterWorker

# Of the time that computing takes which a fetch is to spare: whoever lends computes meanwhile, and answers between its
# steps. What is not there by then is computed, and so much later. Less gives up long prefixes that are on their way.
_FETCH_SHARE = 0.5
_LEAST_FETCH_S = 2.0


def may_fetch(source: RouterWorker, reader: RouterWorker) -> bool:
    """Return whether the reader can read from the source."""
    return (
        source is not reader
        and bool(source.hello.kv_address)
        and source.hello.tp_size == reader.hello.tp_size
        and source.hello.transport == reader.hello.transport
    )


def fetch_from(pools: Pools, request: RouterRequest, source_id: str | None, reader: RouterWorker) -> FetchFrom | None:
    """Return the task's fetch; None: nothing is to be read, or the source has gone or lost it meanwhile."""
    source = pools.named(source_id) if source_id is not None else None
    if source is None or not may_fetch(source, reader):
        return None
    found = pools.held_blocks(request.block_hashes, request.num_prompt_tokens)
    num_blocks, num_held = found.get(source.link.number, 0), found.get(reader.link.number, 0)
    if num_blocks <= num_held:
        return None
    size = source.hello.spec.block_size
    spared_s = pools.predictor.prefill_s(reader.link.number, (num_blocks - num_held) * size, num_held * size)
    return FetchFrom(
        worker_id=source.worker_id,
        kv_address=source.hello.kv_address,
        num_tokens=num_blocks * size,
        within_s=max(_LEAST_FETCH_S, _FETCH_SHARE * spared_s),
    )


def hash_prompt(pools: Pools, request: RouterRequest) -> None:
    """Hash a request's prompt once a worker is there, as its workers will, so that the index knows its blocks."""
    if pools.spec is not None and not request.block_hashes and request.reuses_prefix:
        adapter = "" if request.adapter is None else request.adapter.digest
        salt = prefix_salt(pools.spec, request.cache_salt, adapter)
        request.block_hashes = hash_blocks(request.prompt_token_ids, pools.spec.block_size, salt)
