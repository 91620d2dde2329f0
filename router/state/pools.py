"""The router's picture of all of its workers.

    hello ─> the worker joins ─> heartbeats, requests come and go (worker.py) ─> lost or hung: removed

Policies see frozen `WorkerView`s in a `PoolView` and nothing that changes; a picture is made anew when its worker has
changed, so a placement costs what has changed and not what there is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...common.kv_spec import KVCacheSpec
from ...kvcache.thin import thin_rule
from ...wire.workers import TransferReport, WorkerHello, WorkerStatus
from .predictor import Predictor, distance
from .prefix_index import PrefixIndex
from .views import RANKS, PoolView, Rank, WorkerView, has_gained
from .worker import RouterWorker, WorkerLink

_PAIR_PENALTY_S = 1.0  # for which a pair is avoided after a failed handoff; it doubles with each failure in a row
_MAX_PAIR_PENALTY_S = 30.0  # a mended link is found after so long at the latest


@dataclass(slots=True)
class _PairFailure:
    penalty_s: float
    until_s: float


class Pools:
    """All sessions, and which pairs of them fail at handoffs."""

    def __init__(self, predictor: Predictor | None = None) -> None:
        self.predictor = predictor if predictor is not None else Predictor()
        self._workers: dict[int, RouterWorker] = {}  # by session number
        self._by_name: dict[str, RouterWorker] = {}
        self._pairs: dict[tuple[int, int], _PairFailure] = {}
        self._changed: set[int] = set()  # sessions whose pictures are out of date
        self._views: dict[int, WorkerView] = {}
        self._ranks: dict[int, tuple[str, Rank]] = {}  # where in the order each one stands
        self._order: dict[str, list[Rank]] = {"prefill": [], "decode": []}  # of those that are ready
        self._least_model_len: int | None = None
        self._least_blocks: int | None = None
        self.prefix_index = PrefixIndex()
        self.claimed: frozenset[int] = frozenset()  # sessions that are kept for requests that run alone
        self.block_size = 0  # of all workers; 0: none has joined yet
        self.membership = 0  # another number whenever a worker has come, gone, or changed its role or readiness
        self.spec: KVCacheSpec | None = None  # of all workers; None: none has joined yet

    def held_blocks(self, hashes: Sequence[bytes], num_tokens: int) -> Mapping[int, int]:
        """Return from how many leading blocks of a prompt of so many tokens each session's worker can go on."""
        return self.prefix_index.match(hashes, thin_rule(self.spec, num_tokens))

    def __iter__(self) -> Iterator[RouterWorker]:
        return iter(list(self._workers.values()))

    def __len__(self) -> int:
        return len(self._workers)

    def join(self, link: WorkerLink, hello: WorkerHello, now_s: float) -> RouterWorker:
        worker = RouterWorker(link, hello, now_s, on_change=self._on_change)
        self._workers[link.number] = self._by_name[worker.worker_id] = worker
        self.predictor.on_hello(link.number, hello)
        self.block_size, self.spec = hello.spec.block_size, hello.spec
        self._least_model_len = self._least_blocks = None
        self._on_change(worker)
        return worker

    def leave(self, link: WorkerLink) -> RouterWorker | None:
        worker = self._workers.pop(link.number, None)
        self._pairs = {pair: state for pair, state in self._pairs.items() if link.number not in pair}
        if worker is not None:
            if self._by_name.get(worker.worker_id) is worker:
                del self._by_name[worker.worker_id]
            self.predictor.forget(link.number)
            self.prefix_index.forget(link.number)
            self._least_model_len = self._least_blocks = None
            self._on_change(worker)
        return worker

    def find(self, link: WorkerLink) -> RouterWorker | None:
        return self._workers.get(link.number)

    def at(self, session: int) -> RouterWorker | None:
        return self._workers.get(session)

    def named(self, worker_id: str) -> RouterWorker | None:
        return self._by_name.get(worker_id)

    def with_role(self, role: str) -> list[RouterWorker]:
        return [worker for worker in self._workers.values() if worker.role == role]

    def has_ready(self, role: str) -> bool:
        return any(worker.is_ready for worker in self.with_role(role))

    @property
    def least_model_len(self) -> int | None:
        """The smallest context limit of all workers."""
        if self._least_model_len is None and self._workers:
            self._least_model_len = min(worker.hello.max_model_len for worker in self._workers.values())
        return self._least_model_len

    @property
    def least_blocks(self) -> int:
        """The smallest pool of all workers: what needs no more blocks fits everywhere."""
        if self._least_blocks is None:
            self._least_blocks = min((worker.hello.num_blocks for worker in self._workers.values()), default=0)
        return self._least_blocks

    def longest_answer(self, num_prompt_tokens: int, num_choices: int, limit: int) -> int:
        """Return how long each choice may become, `limit` tokens at most, for one decode worker to hold them all.

        1 where none holds the prompt.
        """
        size = self.block_size
        if not size or num_choices * -(-(num_prompt_tokens + limit) // size) <= self.least_blocks:
            return limit
        num_blocks = max((worker.hello.num_blocks for worker in self.with_role("decode")), default=None)
        if num_blocks is None:
            return limit
        shared = num_prompt_tokens // size  # the rest is each choice's own, as in `Demand.blocks_to_end`
        held = (shared + (num_blocks - shared) // num_choices) * size
        return min(limit, max(held - num_prompt_tokens, 1))

    def claim(self, worker: RouterWorker) -> None:
        """Keep it for a request that runs alone."""
        worker.is_claimed = True
        self.claimed |= {worker.link.number}

    def unclaim(self, worker: RouterWorker) -> None:
        worker.is_claimed = False
        self.claimed -= {worker.link.number}

    def num_ready(self, role: str) -> int:
        """Return the number of ready workers in the latest picture."""
        return len(self._order[role])

    @property
    def num_computing(self) -> int:
        """Return the number of ready workers of the pool that computes prompts: decode workers where it has none."""
        return self.num_ready("prefill") or self.num_ready("decode")

    def on_status(self, worker: RouterWorker, status: WorkerStatus, now_s: float) -> bool:
        """A heartbeat. True if a request that has found no room may find some now."""
        before, has_refused = self._views.get(worker.link.number), worker.has_refused
        worker.on_status(status, now_s)
        worker.has_refused = False
        self._refresh(now_s)
        return before is None or has_refused or has_gained(before, self._views[worker.link.number])

    def on_transfer(self, source: RouterWorker, report: TransferReport) -> None:
        """Learn from blocks that went from this worker to another how fast the path between them is."""
        target = self.named(report.decode_worker)
        if target is not None:
            path = distance(source.hello, target.hello)
            self.predictor.on_transfer(report, path, source.hello.spec.num_layers)

    def on_handoff(self, prefill: RouterWorker, decode: RouterWorker, now_s: float, *, failed: bool) -> None:
        """Remember how the pair's last handoff went: after a failure others are preferred for a while."""
        pair = (prefill.link.number, decode.link.number)
        known = self._pairs.pop(pair, None)
        if failed and self.find(prefill.link) is prefill and self.find(decode.link) is decode:
            penalty_s = min(_MAX_PAIR_PENALTY_S, known.penalty_s * 2 if known is not None else _PAIR_PENALTY_S)
            self._pairs[pair] = _PairFailure(penalty_s, now_s + penalty_s)

    def view(self, now_s: float, *, num_queued: int = 0, num_in_flight: int = 0) -> PoolView:
        """Return a view for those who look at every worker: the ages of heartbeats are right in it."""
        return PoolView(
            workers=tuple(worker.view(now_s) for worker in self._workers.values()),
            avoided_pairs=self._avoided(now_s),
            num_queued=num_queued,
            num_in_flight=num_in_flight,
            now_s=now_s,
            block_size=self.block_size,
        )

    def picture(self, now_s: float) -> PoolView:
        """Return a view for placing, good until the next change of a worker: unchanged workers keep their pictures."""
        self._refresh(now_s)
        view = PoolView(list(self._views.values()), self._avoided(now_s), now_s=now_s)
        view.show(self._order, self._views)
        return view

    def _avoided(self, now_s: float) -> frozenset[tuple[int, int]]:
        if not self._pairs:
            return frozenset()
        return frozenset(pair for pair, state in self._pairs.items() if state.until_s > now_s)

    # --- pictures -------------------------------------------------------------------------------------------

    def _on_change(self, worker: RouterWorker) -> None:
        self._changed.add(worker.link.number)

    def _refresh(self, now_s: float) -> None:
        for session in self._changed:
            before, now = self._unrank(session), None
            worker = self._workers.get(session)
            if worker is None:
                self._views.pop(session, None)
            else:
                view = self._views[session] = worker.view(now_s)
                if view.is_ready:
                    now, rank = view.role, RANKS[view.role](view)
                    insort(self._order[now], rank)
                    self._ranks[session] = (now, rank)
            self.membership += before != now
        self._changed.clear()

    def _unrank(self, session: int) -> str | None:
        """Take a session out of the order, and return the role in which it was ready."""
        found = self._ranks.pop(session, None)
        if found is None:
            return None
        role, rank = found
        order = self._order[role]
        del order[bisect_left(order, rank)]
        return role
