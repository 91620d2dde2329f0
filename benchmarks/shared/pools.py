"""How many workers of each kind: `2+1` is two prefill workers and one decode worker, `0+3` three that do both."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Pools:
    prefill: int
    decode: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode

    def __str__(self) -> str:
        return f"{self.prefill}+{self.decode}"


def parse_pools(text: str) -> Pools:
    """As a type for argparse."""
    match = re.fullmatch(r"(\d+)\+(\d+)", text.strip())
    if match is None or not int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not PREFILL+DECODE with a decode worker, such as 2+1")
    return Pools(int(match[1]), int(match[2]))


def pool_flags(pools: Pools) -> tuple[str, ...]:
    """For `kvferry serve`."""
    return ("--prefill", str(pools.prefill), "--decode", str(pools.decode))
