"""Batches that this router has set aside: lines of theirs name models that it has not.

One that has begun waits for them until its window is over: they were here once. One that has not may name a model that
never was. Another router that has it begins the batch within moments, unless it has no place. So when others have had
places for GIVE_UP_S, and none has begun it, nobody has the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from .record import BatchRecord, BatchStatus
from .store import BatchStore

GIVE_UP_S = 600.0  # long enough to load an adapter again after a restart
PROBE_S = 10.0  # between two looks at what others run


@dataclass(slots=True)
class _SetAside:
    status: BatchStatus
    models: frozenset[str | None]  # one of them is enough to go on
    left_since_s: float  # since then others have had places for it


class SetAside:
    """`SetAside` knows what was set aside here, as long as no other router has brought it further.

    Times are of a clock that nobody sets.
    """

    def __init__(self, store: BatchStore) -> None:
        self._store = store
        self._batches: dict[str, _SetAside] = {}
        self._probe_s = -math.inf  # the next one

    def add(self, record: BatchRecord, models: Iterable[str | None], now_s: float) -> None:
        self._batches[record.id] = _SetAside(record.status, frozenset(models), now_s)

    def forget_all_but(self, batch_ids: Collection[str]) -> None:
        for batch_id in self._batches.keys() - batch_ids:
            del self._batches[batch_id]

    def may_go_on(self, record: BatchRecord, is_served: Callable[[str | None], bool], now_s: float) -> bool:
        """Tell whether there is something to do: lines to ask, or to say that nobody has their models."""
        aside = self._of(record)
        return aside is None or any(map(is_served, aside.models)) or self.is_given_up(record, now_s)

    def is_given_up(self, record: BatchRecord, now_s: float) -> bool:
        """Tell whether no router has the models with which it could begin."""
        aside = self._of(record)
        return aside is not None and _is_new(record) and now_s >= aside.left_since_s + GIVE_UP_S

    async def probe(
        self, records: Sequence[BatchRecord], running: Collection[str], max_runs: int, now_s: float
    ) -> None:
        """Note for what waits to begin whether others may have no place. `running`: here; `max_runs`: of each router.

        A router begins one more of an owner's while it runs fewer of them than it has places free. All that others
        run may be one router's.
        """
        aside = [(record, each) for record in records if _is_new(record) and (each := self._of(record)) is not None]
        if not aside or now_s < self._probe_s:
            return
        self._probe_s = now_s + PROBE_S
        others = [record for record in records if record.id not in running]
        held = Counter(await asyncio.to_thread(self._owners_of_held, others))
        for record, each in aside:
            if held.total() + held[record.owner] >= max_runs:
                each.left_since_s = now_s

    def _of(self, record: BatchRecord) -> _SetAside | None:
        aside = self._batches.get(record.id)
        return aside if aside is not None and aside.status is record.status else None

    def _owners_of_held(self, records: Iterable[BatchRecord]) -> list[str]:
        """Return the owner of each batch that another router runs, or of which nobody can tell."""
        owners = []
        for record in records:
            lock = None
            with contextlib.suppress(OSError):
                lock = self._store.lock(record.id)
            if lock is None:
                owners.append(record.owner)
            else:
                lock.release()
        return owners


def _is_new(record: BatchRecord) -> bool:
    return record.status is BatchStatus.VALIDATING
