"""One key may use so many requests at once, requests a minute, tokens a minute. All are optional.

    enter   a request begins          a place and a request are taken, before its body is read
    charge  its prompt is known       prompt and longest answer are taken
    waive   it repeats an answer      the request is given back
    settle  it has ended              what was not generated is given back, and prompts that no worker has got
    leave                             the place is given back; a charge that nobody settled, whole

The two rates are buckets that fill evenly and hold a minute's worth. A request that costs more than a full bucket goes
when the bucket is full, and leaves a debt. One that may repeat an answer enters beside an empty bucket, too, and leaves
the debt of a request unless that is waived: up to a minute's worth of them. Pure: time comes from a clock. Where there
are no keys, all clients are one. A router counts for itself, or with the others of its launcher (`shared_accounts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from ...common.clock import Clock
from ...common.errors import CapacityError

_WINDOW_S = 60.0  # limits are for each minute
_BUSY_RETRY_S = 1.0  # told where too many requests run at once


@dataclass(slots=True, frozen=True)
class QuotaLimits:
    """The limits of each key. None: no limit."""

    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def has_rates(self) -> bool:
        """Requests or tokens are counted by the minute."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None


class Bucket:
    """Fills by `capacity` a minute, and never above it."""

    __slots__ = ("_at_s", "_level", "capacity")

    def __init__(self, capacity: int, now_s: float) -> None:
        self.capacity = capacity
        self._level = float(capacity)
        self._at_s = now_s

    @property
    def state(self) -> tuple[float, float]:
        """The level that it had, and when."""
        return self._level, self._at_s

    @state.setter
    def state(self, state: tuple[float, float]) -> None:
        self._level, self._at_s = state

    def level(self, now_s: float) -> float:
        self._level = min(self.capacity, self._level + self.capacity * (now_s - self._at_s) / _WINDOW_S)
        self._at_s = now_s
        return self._level

    def wait_s(self, amount: int, now_s: float, *, max_debt: int = 0) -> float:
        """Return the time until `amount` can be taken, where that may leave such a debt; not above 0: now."""
        return self._until(min(amount, self.capacity) - max_debt, now_s)

    def reset_s(self, now_s: float) -> float:
        """Return the time until it is full."""
        return self._until(self.capacity, now_s)

    def _until(self, level: float, now_s: float) -> float:
        return (level - self.level(now_s)) * _WINDOW_S / self.capacity

    def take(self, amount: int, now_s: float) -> None:
        self._level = self.level(now_s) - amount

    def give_back(self, amount: int, now_s: float) -> None:
        self._level = self.level(now_s) + amount


class Account:
    """An account of what one tenant uses now."""

    __slots__ = ("num_running", "requests", "tokens")

    def __init__(self, limits: QuotaLimits, now_s: float) -> None:
        self.num_running = 0
        self.requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, now_s)
        self.tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute, now_s)


class Accounts(Protocol):
    """Whoever keeps the accounts. There are as many as keys: tenants come from the keys that the server knows."""

    def using(self, tenant: bytes) -> AbstractContextManager[Account]:
        """Lend the tenant's account, which nobody else changes meanwhile."""
        ...


class OwnAccounts:
    """The accounts of a router that counts for itself. Implements `Accounts`."""

    def __init__(self, limits: QuotaLimits, clock: Clock) -> None:
        self._limits, self._clock = limits, clock
        self._accounts: dict[bytes, Account] = {}

    @contextmanager
    def using(self, tenant: bytes) -> Iterator[Account]:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = Account(self._limits, self._clock.now())
        yield account


class Quotas:
    """Lets requests in, as far as their tenants' accounts allow."""

    def __init__(self, limits: QuotaLimits, clock: Clock, accounts: Accounts | None = None) -> None:
        self.limits = limits
        self._clock = clock
        self._accounts = OwnAccounts(limits, clock) if accounts is None else accounts

    def enter(self, tenant: bytes, *, may_repeat: bool = False) -> Allowance:
        """Let a request in; one that `may_repeat` an answer, and then costs none, also where requests are used up.

        Raises CapacityError (429) where the tenant's requests are used up.
        """
        now, limit = self._clock.now(), self.limits.max_concurrency
        allowance = Allowance(self._accounts, tenant, self._clock, may_repeat=may_repeat)
        with self._accounts.using(tenant) as account:
            if limit is not None and account.num_running >= limit:
                raise QuotaExceeded(f"this key may have {limit} requests at once", _BUSY_RETRY_S, allowance)
            if (bucket := account.requests) is not None:
                max_debt = bucket.capacity if may_repeat else 0
                wait_s = bucket.wait_s(1, now, max_debt=max_debt)
                if wait_s > 0:
                    raise QuotaExceeded(f"this key may send {bucket.capacity} requests a minute", wait_s, allowance)
                bucket.take(1, now)
            account.num_running += 1
        return allowance


class Allowance:
    """One request's part of its tenant's account."""

    __slots__ = ("_accounts", "_charged", "_clock", "_has_left", "_tenant", "may_repeat")

    def __init__(self, accounts: Accounts, tenant: bytes, clock: Clock, *, may_repeat: bool) -> None:
        self._accounts, self._tenant = accounts, tenant
        self._clock = clock
        self._charged = 0
        self._has_left = False
        self.may_repeat = may_repeat  # an answer that was told before

    def waive(self) -> None:
        """Let it cost no request: what was taken is given back. To be called once."""
        with self._accounts.using(self._tenant) as account:
            if account.requests is not None:
                account.requests.give_back(1, self._clock.now())

    def charge(self, num_tokens: int) -> None:
        """Raises CapacityError (429) where they are not there. What costs none goes on beside debts, too."""
        with self._accounts.using(self._tenant) as account:
            if (bucket := account.tokens) is None or not num_tokens:
                return
            now = self._clock.now()
            wait_s = bucket.wait_s(num_tokens, now)
            if wait_s > 0:
                text = f"this key may use {bucket.capacity} tokens a minute; prompt and answer may take {num_tokens}"
                raise QuotaExceeded(text, wait_s, self)
            bucket.take(num_tokens, now)
        self._charged += num_tokens

    def settle(self, num_tokens: int) -> None:
        """So many were used of those charged."""
        with self._accounts.using(self._tenant) as account:
            self._settle(account, num_tokens)

    def _settle(self, account: Account, num_tokens: int) -> None:
        if account.tokens is not None:
            account.tokens.give_back(self._charged - num_tokens, self._clock.now())
        self._charged = 0

    def leave(self) -> None:
        """End the request's part. Idempotent."""
        if not self._has_left:
            self._has_left = True
            with self._accounts.using(self._tenant) as account:
                account.num_running -= 1
                self._settle(account, 0)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """The amounts that are left, under the names that OpenAI's clients know."""
        now = self._clock.now()
        found = []
        with self._accounts.using(self._tenant) as account:
            buckets = (b"requests", account.requests), (b"tokens", account.tokens)
        for name, bucket in buckets:
            if bucket is not None:
                left = max(0, int(bucket.level(now)))
                found.append((b"x-ratelimit-limit-" + name, b"%d" % bucket.capacity))
                found.append((b"x-ratelimit-remaining-" + name, b"%d" % left))
                found.append((b"x-ratelimit-reset-" + name, b"%.3fs" % bucket.reset_s(now)))
        return found


class QuotaExceeded(CapacityError):
    """429 for one key. The others go on."""

    def __init__(self, message: str, retry_after_s: float, allowance: Allowance) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.allowance = allowance
