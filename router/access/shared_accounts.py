"""The accounts that the routers of one launcher keep together, so that a key's limits are those of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from ...common.clock import Clock
from ...settings.quota_board import KEY_BYTES, QuotaBoard
from .quota import Account, QuotaLimits


class SharedAccounts:
    """Implements `Accounts` on a board."""

    def __init__(self, board: QuotaBoard, limits: QuotaLimits, clock: Clock) -> None:
        """Raises OSError where the board has no column for one more router."""
        self._board, self._limits, self._clock = board, limits, clock
        self._column = board.claim()

    @contextmanager
    def using(self, tenant: bytes) -> Iterator[Account]:
        key = hashlib.blake2b(tenant, digest_size=KEY_BYTES).digest()
        with self._board.locked():
            place, row = self._board.find(key)
            account = Account(self._limits, self._clock.now())
            buckets = [account.requests, account.tokens]
            if row.buckets is not None:
                for bucket, state in zip(buckets, (row.buckets[:2], row.buckets[2:]), strict=True):
                    if bucket is not None:
                        bucket.state = state
            if (limit := self._limits.max_concurrency) is not None and sum(row.running) >= limit:
                row.running = self._board.living(row.running)  # a system call for each: only where it decides something
            account.num_running = before = sum(row.running)
            try:
                yield account
            finally:
                row.running[self._column] = max(0, row.running[self._column] + account.num_running - before)
                levels = [bucket.state if bucket is not None else (0.0, 0.0) for bucket in buckets]
                row.buckets = (*levels[0], *levels[1])
                self._board.put(place, row, self._column)
