"""A request fits nowhere if no worker could ever hold it: it is refused, in the words by which clients know why."""

from __future__ import annotations

from collections.abc import Iterable

from ...common.errors import RequestError
from ..placement.policy import fits_decode, fits_prefill
from ..state.demand import Demand
from ..state.pools import Pools
from ..state.request import RouterRequest
from ..state.search import max_num_tokens
from ..state.views import WorkerView


def check_fits(request: RouterRequest, pools: Pools, *, needs_prefill_worker: bool) -> None:
    """Raises RequestError (400) if none of the workers that are there could ever run the request."""
    demand = Demand(
        num_prompt_tokens=request.num_prompt_tokens,
        num_tokens=request.num_prompt_tokens,
        max_num_tokens=max_num_tokens(request, pools),
        num_choices=request.n,
    )
    spec = pools.spec
    if spec is not None and demand.blocks_to_end(spec) <= pools.least_blocks:
        return
    view = pools.picture(0.0)
    if request.pooling is not None:
        if view.workers and not any(fits_prefill(worker, demand) for worker in view.workers):
            spec = view.workers[0].hello.spec
            raise _too_large(demand, spec.num_blocks_for(demand.num_prompt_tokens), list(view.workers))
        return
    decodes = [worker for worker in view.workers if worker.role == "decode"]
    prefills = [worker for worker in view.workers if worker.role == "prefill"]
    if decodes and not any(fits_decode(worker, demand) for worker in decodes):
        raise _too_large(demand, demand.blocks_to_end(decodes[0].hello.spec), decodes)
    if needs_prefill_worker and prefills and not any(fits_prefill(worker, demand) for worker in prefills):
        raise _too_large(demand, prefills[0].hello.spec.num_blocks_for(demand.num_prompt_tokens), prefills)


def has_shortened(request: RouterRequest, pools: Pools) -> bool:
    """Shorten the answers of a request that fits nowhere, if they are as long as there was room for; tell whether.

    Its limit was the model's, as no worker was there that could say what it holds.
    """
    longest = pools.longest_answer(request.num_prompt_tokens, request.n, request.sampling.max_tokens)
    if not request.takes_less or longest >= request.sampling.max_tokens or longest < request.sampling.min_tokens:
        return False
    request.shorten(longest)
    return True


def fits_nowhere(request: RouterRequest, pools: Pools) -> str:
    """Return what is told of a request that was taken, and that none of the workers can hold."""
    what = f"no worker can hold {request.num_prompt_tokens} prompt tokens and the answer of {request.n} choices"
    workers = pools.picture(0.0).workers
    return f"{_context(workers)}. {what}" if workers else what


def _too_large(demand: Demand, num_blocks: int, workers: list[WorkerView]) -> RequestError:
    new_tokens = demand.max_num_tokens - demand.num_prompt_tokens
    return RequestError(
        f"{_context(workers)}. "
        f"{demand.num_prompt_tokens} prompt tokens and {demand.num_choices} x up to {new_tokens} new ones need "
        f"{num_blocks} KV blocks of {workers[0].hello.spec.block_size} tokens; the largest {workers[0].role} worker "
        f"has {_most_blocks(workers)}",
        param="max_tokens",
        code="context_length_exceeded",
    )


def _context(workers: Iterable[WorkerView]) -> str:
    """Return what workers can hold as if it were the model's own limit: clients know a full context by these words."""
    num_tokens = max(worker.hello.num_blocks * worker.hello.spec.block_size for worker in workers)
    return f"This model's maximum context length is {num_tokens} tokens where it runs"


def _most_blocks(workers: Iterable[WorkerView]) -> int:
    return max(worker.hello.num_blocks for worker in workers)
