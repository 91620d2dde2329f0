"""A `DiskLayout` says what a file of KV blocks is made for, as its header does, and where its parts lie.

Each of a worker's ranks has a file, and these make a set. Rank 0 gives it a name at random, which is in all headers: a
block is of use only where all ranks have it. A lone rank's file has none.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import msgspec
import numpy as np

_MAGIC = b"kvferry blocks 2"
ALIGN = 4096  # of the parts, and the size of the header
ROW = np.dtype([("hash", "V16"), ("sum", "<u8"), ("check", "<u8")])


class DiskSet(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The files that belong together, as rank 0 tells the other ranks of them."""

    name: str
    number: int  # of rank 0's file


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """Says which model, rank and sizes a file is made for."""

    fingerprint: str
    rank: int
    tp_size: int
    num_slots: int
    slot_bytes: int

    @property
    def file_name(self) -> str:
        """Return how the names of such files begin: a number follows."""
        return f"{self.fingerprint}-{self.rank}of{self.tp_size}"

    @property
    def data_start(self) -> int:
        return ALIGN + -(-self.num_slots * ROW.itemsize // ALIGN) * ALIGN

    @property
    def num_bytes(self) -> int:
        return self.data_start + self.num_slots * self.slot_bytes

    def new_set(self) -> str:
        """Name a set that no file is of yet."""
        return secrets.token_hex(16) if self.tp_size > 1 else ""

    def head(self, set_name: str) -> bytes:
        sizes = f"{self.rank}/{self.tp_size} {self.num_slots} {self.slot_bytes}"
        lines = (_MAGIC, self.fingerprint.encode(), sizes.encode(), set_name.encode())
        return b"\n".join(filter(None, lines)).ljust(ALIGN, b"\0")

    def set_of(self, head: bytes) -> str | None:
        """Return the name of the set that a file with this header is of; None: it is made for something else."""
        last_line = head.rstrip(b"\0").rpartition(b"\n")[2]
        name = last_line.decode(errors="replace") if self.tp_size > 1 else ""
        return name if head == self.head(name) else None
