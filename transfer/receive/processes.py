"""Processes of this host are watched for their end: nothing else stops one that copies into our memory by itself.

    prefill worker   own_mark of each rank ─> KVOpen.processes
    decode worker    watch ─> ProcessWatch, asked until its prefill worker is fenced

UCX copies between processes of a host in the writer's system call, and so does `HostWindow`. Such a copy that stands
still, because its process was stopped or waits for a page, goes on whenever that process does: no key, agent or
connection of the target's takes part in it (seen: a write that UCX reported as failed, because the target's agent was
gone, landed whole). A process descriptor tells the end of a process only after its last thread has left the kernel,
so what it tells is the end of its copies too, also those of a GPU's copy engine, which go with the process's context.

A mark holds the number of the process and the time at which it started, so another process that got its number later
is not taken for it. Only processes of one kernel that number processes alike are compared; network namespaces do not
matter, because UCX copies across them.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from ...wire.grants import ProcessMark

_STARTED_FIELD = 19  # of those after the command's name in /proc/PID/stat


class ProcessWatch(Protocol):
    """A writer on this host: the processes of all of its ranks."""

    @property
    def has_ended(self) -> bool:
        """Every one of them; never again False."""
        ...

    def close(self) -> None:
        """Ask no more. Idempotent."""
        ...


class DescriptorWatch:
    """Implements `ProcessWatch` by process descriptors (Linux)."""

    def __init__(self, descriptors: list[int]) -> None:
        self._descriptors = descriptors

    @property
    def has_ended(self) -> bool:
        for descriptor in list(self._descriptors):
            end = select.poll()
            end.register(descriptor, select.POLLIN)
            if end.poll(0):
                os.close(descriptor)
                self._descriptors.remove(descriptor)
        return not self._descriptors

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()


def own_mark() -> ProcessMark:
    """Return the mark of this process."""
    pid = os.getpid()
    return ProcessMark(_host(), pid, _started(pid) or 0)


def watch(marks: Sequence[ProcessMark]) -> ProcessWatch | None:
    """The life of those processes that are on this host; None if none is.

    Raises ProcessLookupError where one that says so is not found here.
    """
    here = _host()
    descriptors: list[int] = []
    try:
        for mark in marks:
            if here and mark.host == here:
                descriptors.append(_open(mark))
    except ProcessLookupError:
        DescriptorWatch(descriptors).close()
        raise
    return DescriptorWatch(descriptors) if descriptors else None


def _open(mark: ProcessMark) -> int:
    """A descriptor of that very process: the number is looked at again once the descriptor holds on to it."""
    lost = ProcessLookupError(f"process {mark.pid}, which is said to be of this host, is not found here")
    try:
        descriptor = os.pidfd_open(mark.pid)
    except (OSError, OverflowError) as error:  # no process has a number of so many bits
        raise lost from error
    if _started(mark.pid) != mark.started:
        os.close(descriptor)
        raise lost
    return descriptor


def _started(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None: there is none."""
    try:
        _, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    return int(rest.split()[_STARTED_FIELD])


def _host() -> str:
    """Equal in processes that see each other under the same numbers; "" where there is no way to tell."""
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not numbers.exists() or not hasattr(os, "pidfd_open"):
        return ""
    return f"{boot.read_text().strip()}/{numbers.stat().st_ino}"
