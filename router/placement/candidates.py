"""Candidates explain a placement: every way that the policy saw, what it expects of each, and the others' lack.

A policy that predicts lists its own candidates (`Explaining`). Of any other the pairs are listed that it chose from.
Workers that could not take the request are listed with the reason. This is for people: called for one request in
`EXPLAIN_EVERY`, or for all where the operator asks for it, and never where a placement is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from ..state.decisions import Candidate
from ..state.demand import Demand
from ..state.views import PoolView, WorkerView
from .policy import (
    MAX_BIND_WAIT_S,
    RoutingPolicy,
    fits_decode,
    fits_prefill,
    has_decode_room,
    has_prefill_room,
    may_hand_over,
)

EXPLAIN_EVERY = 16  # one request in so many is explained, unless all are to be: explaining costs as much as placing
_NEAR = 8  # workers of each pool that are shown; more make each explanation longer and dearer
_MAX_WAYS = 16  # listed, the best ones
_MAX_REJECTED = 16  # workers listed with what they lack
_NO_WAY = "not_chosen"  # it could, and the policy did not come to it, or its handoffs with all others have failed


class CandidateWay(Protocol):
    """A way to serve a request as a predicting policy sees it."""

    @property
    def prefill(self) -> WorkerView | None: ...
    @property
    def decode(self) -> WorkerView: ...
    @property
    def ttft_s(self) -> float: ...
    @property
    def tpot_s(self) -> float: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def wait_s(self) -> float: ...
    @property
    def exposed_s(self) -> float: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def cost_s(self) -> float: ...


@runtime_checkable
class Explaining(Protocol):
    """A policy that says what it has looked at, the best first."""

    def explain(self, view: PoolView, demand: Demand) -> Sequence[CandidateWay]: ...


def candidates(policy: RoutingPolicy, view: PoolView, demand: Demand) -> tuple[Candidate, ...]:
    """The ways first, in the policy's order, then who could not take it."""
    decodes = view.nearest("decode", _NEAR, demand.cached)
    prefills = view.nearest("prefill", _NEAR, demand.cached)
    if demand.is_embedding:
        return (*_embedders(decodes, prefills, demand), *_unready(view))
    if isinstance(policy, Explaining):
        ways = [_candidate(way) for way in policy.explain(view, demand)]
    else:
        ways = list(_pairs(decodes, prefills, demand))
    seen = {name for way in ways for name in (way.prefill_worker, way.decode_worker)}
    rejected = [*_rejected(decodes, prefills, demand, seen), *_unready(view)]
    return (*ways[:_MAX_WAYS], *rejected[:_MAX_REJECTED])


def _candidate(way: CandidateWay) -> Candidate:
    return Candidate(
        prefill_worker=way.prefill.worker_id if way.prefill is not None else None,
        decode_worker=way.decode.worker_id,
        ttft_s=way.ttft_s,
        tpot_s=way.tpot_s,
        wait_s=way.wait_s,
        prefill_s=way.prefill_s,
        transfer_s=way.exposed_s,
        cached_tokens=way.cached_tokens,
        score=way.cost_s,
    )


def _embedders(decodes: list[WorkerView], prefills: list[WorkerView], demand: Demand) -> Iterator[Candidate]:
    """Yield each worker by itself, as any of them may embed a prompt."""
    for worker in (*prefills, *decodes):
        is_prefill = worker.role == "prefill"
        lack = _prefill_lack(worker, demand) or ("" if is_prefill or not prefills else _NO_WAY)
        yield Candidate(
            prefill_worker=worker.worker_id if is_prefill else None,
            decode_worker=None if is_prefill else worker.worker_id,
            wait_s=worker.backlog_s,
            cached_tokens=demand.cached.get(worker.session, 0),
            rejected=lack,
        )


def _pairs(decodes: list[WorkerView], prefills: list[WorkerView], demand: Demand) -> Iterator[Candidate]:
    """Yield what there is to choose from, for a policy that has no more to say."""
    able = [worker for worker in prefills if not _prefill_lack(worker, demand)]
    for decode in decodes:
        if _decode_lack(decode, demand):
            continue
        for prefill in able:
            if may_hand_over(prefill, decode, demand):
                cached = demand.cached.get(prefill.session, 0)
                yield Candidate(prefill.worker_id, decode.worker_id, wait_s=prefill.backlog_s, cached_tokens=cached)
        if not able:
            cached = demand.cached.get(decode.session, 0)
            yield Candidate(None, decode.worker_id, wait_s=decode.backlog_s, cached_tokens=cached)


def _rejected(
    decodes: Iterable[WorkerView], prefills: Iterable[WorkerView], demand: Demand, seen: set[str | None]
) -> Iterator[Candidate]:
    """Yield the workers that are in none of the ways."""
    for worker in decodes:
        if worker.worker_id not in seen:
            yield Candidate(None, worker.worker_id, rejected=_decode_lack(worker, demand) or _NO_WAY)
    for worker in prefills:
        if worker.worker_id not in seen:
            yield Candidate(worker.worker_id, None, rejected=_prefill_lack(worker, demand) or _NO_WAY)


def _unready(view: PoolView) -> Iterator[Candidate]:
    for worker in view.workers:
        if not worker.is_ready:
            state = "draining" if worker.status is not None and worker.status.state == "ready" else "not_ready"
            is_prefill = worker.role == "prefill"
            yield Candidate(
                worker.worker_id if is_prefill else None, None if is_prefill else worker.worker_id, rejected=state
            )


def _decode_lack(worker: WorkerView, demand: Demand) -> str:
    if not fits_decode(worker, demand):
        return "too_small"
    if worker.session in demand.busy:
        return "refused"  # it said no a moment ago, or is kept for another request
    if has_decode_room(worker, demand):
        return ""
    if worker.num_running + demand.num_choices > worker.hello.max_num_seqs:
        return "no_rows"
    return "no_blocks"


def _prefill_lack(worker: WorkerView, demand: Demand) -> str:
    if not fits_prefill(worker, demand):
        return "too_small"
    if worker.session in demand.busy:
        return "refused"
    return "" if has_prefill_room(worker, demand, MAX_BIND_WAIT_S) else "behind"  # more than a step of prompts is ahead
