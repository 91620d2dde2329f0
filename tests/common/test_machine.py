"""What a machine has, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvferry.common.machine import free_memory_bytes, usable_cpus


def make_root(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000000 kB\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_free_memory_is_the_kernels_estimate(tmp_path: Path) -> None:
    assert free_memory_bytes(make_root(tmp_path, {})) == 1_000_000 * 1024


def test_free_memory_stays_within_the_control_group(tmp_path: Path) -> None:
    group = {
        "sys/fs/cgroup/memory.max": "500000\n",
        "sys/fs/cgroup/memory.current": "300000\n",
        "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 100000\n",
    }
    assert free_memory_bytes(make_root(tmp_path, group)) == 300_000


def test_group_without_limits_changes_nothing(tmp_path: Path) -> None:
    group = {
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "3\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    root = make_root(tmp_path, group)
    assert free_memory_bytes(root) == 1_000_000 * 1024
    assert usable_cpus(root) == len(os.sched_getaffinity(0))


def test_quota_bounds_the_cores(tmp_path: Path) -> None:
    assert usable_cpus(make_root(tmp_path, {"sys/fs/cgroup/cpu.max": "50000 100000\n"})) == 1


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def test_a_units_limits_count_though_its_group_is_not_the_root(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/system.slice/kvferry.service\n",
        "sys/fs/cgroup/system.slice/kvferry.service/memory.max": "500000\n",
        "sys/fs/cgroup/system.slice/kvferry.service/memory.current": "300000\n",
        "sys/fs/cgroup/system.slice/kvferry.service/memory.stat": "inactive_file 100000\n",
        "sys/fs/cgroup/system.slice/kvferry.service/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n",  # of all units together
    }
    root = make_root(tmp_path, files)
    assert free_memory_bytes(root) == 300_000
    assert usable_cpus(root) == 4


@pytest.mark.parametrize("inside", [True, False])
def test_groups_of_version_1_have_limits_too(tmp_path: Path, inside: bool) -> None:
    """Inside a container the path of its group is the host's, and its files stand at the top."""
    memory, cpu = ("", "") if inside else ("docker/abc/", "docker/abc/")
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        f"sys/fs/cgroup/memory/{memory}memory.limit_in_bytes": "500000\n",
        f"sys/fs/cgroup/memory/{memory}memory.usage_in_bytes": "300000\n",
        f"sys/fs/cgroup/memory/{memory}memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n",
        f"sys/fs/cgroup/cpu/{cpu}cpu.cfs_quota_us": "250000\n",
        f"sys/fs/cgroup/cpu/{cpu}cpu.cfs_period_us": "100000\n",
    }
    root = make_root(tmp_path, files)
    assert free_memory_bytes(root) == 300_000
    assert usable_cpus(root) == 2


def test_groups_of_version_1_without_limits_change_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/../other\n1:cpu:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    root = make_root(tmp_path, files)
    assert free_memory_bytes(root) == 1_000_000 * 1024
    assert usable_cpus(root) == 16
