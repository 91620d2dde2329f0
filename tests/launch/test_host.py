"""What a machine has, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kvferry.launch.host import free_memory_bytes, parse_gpus, read_host, usable_cpus, why_not_bindable

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


def test_taken_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert why_not_bindable("127.0.0.1", server.getsockname()[1]) == "Address already in use"
    assert why_not_bindable("127.0.0.1", 0) is None


def test_this_machine_can_be_read() -> None:
    host = read_host({})
    assert host.num_cpus >= 1
    assert host.free_memory_bytes > 0
