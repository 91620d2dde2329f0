"""A machine's cores and free memory, as far as this process may use them: those of its control groups where these have
limits, be they a container's, a systemd unit's or a batch system's, of either version.

    version 2   /sys/fs/cgroup/GROUP/memory.max, cpu.max
    version 1   /sys/fs/cgroup/memory/GROUP/memory.limit_in_bytes, /sys/fs/cgroup/cpu/GROUP/cpu.cfs_quota_us

A group's limit holds for those below it, so all on the way up are asked. In a container the top one is its own: what
/proc tells of its place need not be there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class _MemoryFiles(NamedTuple):
    limit: str
    used: str
    reclaimable: str  # of memory.stat


_MEMORY_FILES = (
    _MemoryFiles("memory.max", "memory.current", "inactive_file"),
    _MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def usable_cpus(root: Path = _ROOT) -> int:
    """Cores in this process's affinity mask, less where one of its control groups has a quota."""
    count = len(os.sched_getaffinity(0))
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        for quota_us, period_us in (
            (quota, period),
            (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")),
        ):
            if quota_us.isdigit() and period_us.isdigit():
                count = min(count, max(1, int(quota_us) // int(period_us)))
    return count


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Memory that can be taken without swapping, within the limits of the control groups. 0: /proc does not tell."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = int(match[1]) * 1024 if match else 0
    for folder in _groups(root, "memory"):
        for names in _MEMORY_FILES:
            limit, used = _read(folder / names.limit), _read(folder / names.used)
            if limit.isdigit() and used.isdigit():
                found = re.search(rf"^{names.reclaimable} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                free = min(free, int(limit) - int(used) + (int(found[1]) if found else 0))
    return max(free, 0)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, of both versions; some need not be there."""
    mounts = root / "sys/fs/cgroup"
    places = {mounts: "", mounts / "unified": "", mounts / controller: ""}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, place = rest.partition(":")
        if not controllers:
            places[mounts] = places[mounts / "unified"] = place
        elif controller in controllers.split(","):
            places[mounts / controller] = place
    for mount, place in places.items():
        parts = [part for part in place.split("/") if part not in ("", "..")]  # "..": above a container's own
        for depth in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:depth])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
