"""One attack under way: where it goes, how long, and what it was answered."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from kvferry.benchmarks.fuzz.raw_http import Answer
from kvferry.wire.address import Address


@dataclass(slots=True)
class Strike:
    """One attack under way."""

    address: Address
    num_sockets: int
    duration_s: float
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    _end_s: float = 0.0

    @property
    def is_over(self) -> bool:
        return asyncio.get_running_loop().time() >= self._end_s

    def begin(self) -> None:
        self._end_s = asyncio.get_running_loop().time() + self.duration_s

    def note(self, answer: Answer) -> None:
        self.outcomes[str(answer.status)] += 1
        is_refusal = answer.status == 503 and b"overloaded" in answer.body
        if (fault := answer.fault) is not None and not is_refusal and len(self.failures) < 5:
            self.failures.append(fault)


Attack = Callable[[Strike], Awaitable[None]]


async def run_attack(attack: Attack, strike: Strike) -> None:
    strike.begin()
    await attack(strike)
