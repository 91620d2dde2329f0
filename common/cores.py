"""The cores that a machine's workers share: each has a part for itself and uses those of workers that are idle.

    launcher: CoreBoard(number of workers) -> CoreSlot for each, in its settings
    worker:   attach(slot) -> SharedCores, as engine/cpu/native/machine/cores.hpp has them

The board is anonymous memory of the launcher: it is gone when the last of them is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass, field

from .config import CoreSlot

_SLOT_BYTES = 64  # Cores::Slot


class CoreBoard:
    """Owned by the launcher; its workers open it through /proc while it lives."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._fd = os.memfd_create("kvferry-cores")
        os.ftruncate(self._fd, num_workers * _SLOT_BYTES)

    @property
    def num_slots(self) -> int:
        return self._num_workers

    def slot(self, index: int, max_threads: int) -> CoreSlot:
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        return CoreSlot(path=path, num_slots=self._num_workers, slot=index, max_threads=max_threads)

    def close(self) -> None:
        """Workers that have attached keep it."""
        os.close(self._fd)


@dataclass(frozen=True, slots=True)
class SharedCores:
    """A board in this process's memory."""

    slot: CoreSlot
    address: int
    memory: mmap.mmap = field(repr=False)  # kept mapped


def attach(slot: CoreSlot) -> SharedCores:
    """Raises OSError where the launcher's memory cannot be reached."""
    fd = os.open(slot.path, os.O_RDWR)
    try:
        memory = mmap.mmap(fd, slot.num_slots * _SLOT_BYTES)
    finally:
        os.close(fd)
    return SharedCores(slot, ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory)
