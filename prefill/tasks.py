"""The tasks of a prefill worker: prompts that compute or wait, and how each of them ends.

    add ─> open its grant ─> done: computed, or end: given up, or drop: nobody hears of it ─> its blocks are given away

A task's blocks belong to its shipment once it is over, and to nobody where the shipment reads them no more. Those of a
task that ends in a step are given away after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import structlog

from ..common.request import RequestSpec, Sequence
from ..kvcache.blocks import BlockPool
from ..transfer.fetch.fetches import Fetches
from ..wire.grants import GrantInfo
from ..wire.tasks import FetchFrom
from .scheduler import PrefillScheduler, Prompt
from .shipments import Shipments, Shipping
from .task import Task

log = structlog.get_logger(__name__)


class Tasks:
    """Keeps tasks, scheduler, shipments and fetches in step: what ends leaves all of them."""

    def __init__(
        self,
        pool: BlockPool,
        scheduler: PrefillScheduler,
        shipments: Shipments,
        shipping: Shipping,
        fetches: Callable[[], Fetches | None],
    ) -> None:
        """`fetches()` None: everything that is not in the cache is computed."""
        self._pool = pool
        self._scheduler = scheduler
        self._shipments = shipments
        self._shipping = shipping
        self._fetches = fetches
        self._live: dict[str, Task] = {}  # by request id: the attempt that computes or waits
        self.stale_messages = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Task]:
        return iter(self._live.values())

    def task_of(self, prompt: Prompt) -> Task:
        """Return the task that a scheduled prompt is of."""
        return self._live[prompt.seq.request_id]

    def drop_older(self, spec: RequestSpec) -> bool:
        """A new attempt ends those before it. False: it is not new, and is dropped itself."""
        known = self._live.get(spec.request_id)
        if known is not None and known.spec.attempt >= spec.attempt:
            self.stale_messages += 1
            return False
        if known is not None:
            self.end(known, "a newer attempt has begun")
        self._shipments.cancel(spec.request_id, spec.attempt - 1, "a newer attempt has begun")
        return True

    def add(self, task: Task, source: FetchFrom | None) -> None:
        """Take a task whose prompt is scheduled. `source`: where more of it can be read before it is begun."""
        self._live[task.spec.request_id] = task
        fetches = self._fetches()
        if source is None or fetches is None:
            return
        seq = task.prompt.seq
        hashes = self._scheduler.reusable_hashes(task.prompt)
        key, spare = _fetch_key(task.spec), seq.is_retained_elsewhere
        rule = self._scheduler.cache.thin_rule(seq.num_tokens)
        seq.is_fetching = fetches.begin(key, hashes, source, rule, lambda: _fetched(seq), spare=spare)

    def open(self, task: Task, grant: GrantInfo) -> None:
        """Begin its shipment."""
        spec = task.spec
        task.open_id = self._shipping.open(spec.request_id, spec.attempt, grant)
        self._shipments.opened(task.open_id, task.router_id, spec)

    def open_waiting(self, now_s: float) -> None:
        """Open the grants of prompts that have waited for half the time in which a grant lapses unopened.

        A step on a CPU may take longer than that, as may an adapter or a fetch that a prompt waits for, and a grant
        that lapses costs its request an attempt. Earlier it may still go to another prefill worker
        (`router/dispatch/placer.py`), and its blocks are free at once if we die.
        """
        for task in self._live.values():
            grant, received_s = task.grant, task.prompt.received_s
            if grant is not None and task.open_id is None and now_s - received_s >= grant.open_within_s / 2:
                self.open(task, grant)

    def done(self, task: Task) -> None:
        """Take a task off the books whose prompt is computed."""
        del self._live[task.spec.request_id]
        self.give_away(task)

    def end(self, task: Task, reason: str) -> None:
        """Stop working on a task, and shipping it."""
        self.drop(task)
        if task.open_id is not None:
            self._shipping.cancel(task.open_id, reason)

    def drop(self, task: Task) -> None:
        """Forget a task. Its blocks go when neither the running step nor its shipment uses them."""
        self._live.pop(task.spec.request_id, None)
        self._scheduler.remove(task.prompt)
        if (fetches := self._fetches()) is not None:
            fetches.cancel(_fetch_key(task.spec))
        task.dead = True
        if not task.stepping:
            self.give_away(task)

    def give_away(self, task: Task) -> None:
        """The task's blocks belong to its shipment from here on, or to nobody."""
        seq = task.prompt.seq
        if task.open_id is None or not self._shipments.hold(task.open_id, seq.block_table):
            self._pool.free(seq.block_table)
        seq.block_table = []

    def abort(self, request_id: str, attempt: int) -> None:
        """End a request's attempts up to this one, and their shipments."""
        task = self._live.get(request_id)
        if task is not None and task.spec.attempt <= attempt:
            self.end(task, "aborted by the router")
        self._shipments.cancel(request_id, attempt, "aborted by the router")

    def keep_only(self, router_id: str, live: frozenset[tuple[str, int]]) -> None:
        """End the router's others, and their shipments."""
        for task in list(self._live.values()):
            if task.router_id == router_id and (task.spec.request_id, task.spec.attempt) not in live:
                self.end(task, "the router no longer knows the request")
        self._shipments.keep_only(router_id, live, "the router no longer knows the request")

    def source_free(self, open_id: int) -> None:
        """A shipment reads its source blocks no more."""
        self._shipments.source_free(open_id)
        task = next((t for t in self._live.values() if t.open_id == open_id), None)
        if task is not None:
            # It ended before the prompt was computed: the handoff failed. What is computed stays cached for a retry.
            task.open_id = None
            log.debug("prompt_given_up", request_id=task.spec.request_id, reason="its shipment ended")
            self.end(task, "its shipment ended")

    def check(self) -> None:
        """Assert that tasks and prompts agree."""
        assert {task.prompt for task in self._live.values()} == set(self._scheduler.prompts)


def _fetch_key(spec: RequestSpec) -> str:
    return f"task {spec.request_id}"


def _fetched(seq: Sequence) -> None:
    seq.is_fetching = False
