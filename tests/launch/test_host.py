"""What a machine has, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kvferry.launch.host import find_gpus, free_memory_bytes, parse_gpus, read_host, usable_cpus

SMI = "0, GPU-aa, NVIDIA H200, 143771, 143000, 9.0\n1, GPU-bb, NVIDIA H200, 143771, 1000, [N/A]\n"


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


def test_all_gpus_are_visible_by_default() -> None:
    gpus = parse_gpus(SMI, None)
    assert [gpu.index for gpu in gpus] == ["0", "1"]
    assert gpus[1].free_bytes == 1000 << 20
    assert [gpu.capability for gpu in gpus] == [(9, 0), None]


def test_visible_devices_select_and_order_gpus() -> None:
    assert [gpu.index for gpu in parse_gpus(SMI, "1,0")] == ["1", "0"]
    assert [gpu.index for gpu in parse_gpus(SMI, "GPU-bb")] == ["1"]
    assert parse_gpus(SMI, "") == ()
    assert parse_gpus("", None) == ()


@pytest.mark.parametrize(
    ("knows", "capabilities"), [("compute_cap", [(9, 0), None]), ("memory.free", [None, None]), ("nothing", [])]
)
def test_an_old_driver_does_not_know_what_cards_can_do(
    knows: str, capabilities: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails altogether has no cards."""
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "out").write_text(SMI if knows == "compute_cap" else re.sub(r", [^,]*$", "", SMI, flags=re.MULTILINE))
    tool.write_text(f'#!/bin/sh\ncase "$1" in *{knows}) cat {tmp_path}/out;; *) exit 2;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [gpu.capability for gpu in find_gpus({})] == capabilities


def test_this_machine_can_be_read() -> None:
    host = read_host({})
    assert host.num_cpus >= 1
    assert host.free_memory_bytes > 0
