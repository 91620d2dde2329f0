"""Which network devices UCX gets: those that an address is on, and RDMA ports that are up."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from kvferry.transfer.backends.choose import devices_of


def rdma(folder: Path, **ports: str) -> Path:
    """A /sys with these RDMA ports and their states."""
    for name, state in ports.items():
        port = folder / "class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(state)
    return folder


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.5"])
def test_workers_of_one_machine_stay_on_the_loopback(tmp_path: Path, host: str) -> None:
    assert devices_of(host, rdma(tmp_path, mlx5_0="4: ACTIVE\n")) == ["lo"]


def test_between_machines_it_is_the_interface_of_the_address_and_active_rdma_ports(tmp_path: Path) -> None:
    others = [
        (name, address.address)
        for name, known in psutil.net_if_addrs().items()
        for address in known
        if name != "lo" and address.family.name == "AF_INET"
    ]
    if not others:
        pytest.skip("this machine has the loopback alone")
    name, address = others[0]
    assert devices_of(address, tmp_path) == [name]
    folder = rdma(tmp_path, mlx5_0="4: ACTIVE\n", mlx5_1="1: DOWN\n", mlx5_2="4: ACTIVE\n")
    assert devices_of(address, folder) == [name, "mlx5_0:1", "mlx5_2:1"]


def test_an_address_of_nobody_here_is_left_to_ucx(tmp_path: Path) -> None:
    assert devices_of("198.51.100.7", tmp_path) == []
