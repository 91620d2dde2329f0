"""The adapter that a request's answers come of, as it was when the request came."""

from __future__ import annotations

from dataclasses import dataclass

# Of files in the page cache, on one core: read, digested and packed in one pass; and what each load takes beside.
# Slower ones keep requests with workers that have their adapter for longer while others are less busy.
READ_BYTES_PER_S = 2e9
LOAD_S = 0.01


@dataclass(slots=True, frozen=True)
class AdapterUse:
    """`AdapterUse` names an adapter's bytes, and where workers find them."""

    digest: str
    path: str
    num_bytes: int

    @property
    def load_s(self) -> float:
        """Return about how long a worker that lacks it takes to load it, seconds."""
        return LOAD_S + self.num_bytes / READ_BYTES_PER_S
