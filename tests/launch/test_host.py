"""Which GPUs a machine has, by what the driver's tool says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import structlog

from kvferry.launch.host import find_gpus, parse_gpus, read_host

SMI = "0, GPU-aa, NVIDIA H200, 143771, 143000, 9.0\n1, GPU-bb, NVIDIA H200, 143771, 1000, [N/A]\n"


def test_all_gpus_are_visible_by_default() -> None:
    gpus = parse_gpus(SMI, None)
    assert [gpu.index for gpu in gpus] == ["0", "1"]
    assert gpus[1].free_bytes == 1000 << 20
    assert [gpu.capability for gpu in gpus] == [(9, 0), None]


def test_visible_devices_select_and_order_gpus() -> None:
    assert [gpu.index for gpu in parse_gpus(SMI, "1,0")] == ["1", "0"]
    assert [gpu.index for gpu in parse_gpus(SMI, "GPU-bb")] == ["1"]
    with structlog.testing.capture_logs() as logs:
        assert parse_gpus(SMI, "") == parse_gpus(SMI, "-1") == parse_gpus("", None) == ()
        assert not logs
        assert [gpu.index for gpu in parse_gpus(SMI, "MIG-cc, 0")] == ["0"]
    assert [line["reason"] for line in logs] == ["CUDA_VISIBLE_DEVICES has MIG-cc, and nvidia-smi does not"]


def test_a_card_without_memory_of_its_own_has_the_machines() -> None:
    [gpu] = parse_gpus("0, GPU-1, NVIDIA GB10, [N/A], [N/A], 12.1\n", None)
    assert gpu.total_bytes >= gpu.free_bytes > 0 and gpu.capability == (12, 1)


def test_a_card_that_keeps_to_itself_what_is_free_has_no_more_than_all_of_it() -> None:
    [gpu] = parse_gpus("0, GPU-1, NVIDIA H200, 64, [Insufficient Permissions], 9.0\n", None)
    assert gpu.free_bytes == gpu.total_bytes == 64 << 20


@pytest.mark.parametrize(
    ("knows", "capabilities"), [("compute_cap", [(9, 0), None]), ("memory.free", [None, None]), ("nothing", [])]
)
def test_an_old_driver_does_not_know_what_cards_can_do(
    knows: str, capabilities: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails altogether has no cards, and is told of: a machine of GPUs would serve on its CPU."""
    tool = tmp_path / "nvidia-smi"
    (tmp_path / "out").write_text(SMI if knows == "compute_cap" else re.sub(r", [^,]*$", "", SMI, flags=re.MULTILINE))
    tool.write_text(f'#!/bin/sh\ncase "$1" in *{knows}) cat {tmp_path}/out;; *) echo no driver; exit 2;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with structlog.testing.capture_logs() as logs:
        assert [gpu.capability for gpu in find_gpus({})] == capabilities
        assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()  # where none is to be used nobody is asked
    assert [line["reason"] for line in logs] == ([] if capabilities else [f"{tool} fails: no driver"])


def test_this_machine_can_be_read() -> None:
    host = read_host({})
    assert host.num_cpus >= 1
    assert host.free_memory_bytes > 0
