"""A worker chooses its transport here, and sets what that must know before its first agent."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import psutil

from ...common.errors import ConfigError
from .base import TransferBackend

# Transports of UCX at whose other end somebody must listen, or copies only within one process.
_THROUGH_AGENTS = {"tcp", "self", "posix", "sysv", "cuda_copy", "gdr_copy", "ib", "srd"} | {
    kind + variant for kind in ("rc", "ud", "dc") for variant in ("", "_verbs", "_mlx5", "_v", "_x")
}


def open_backend(name: str, agent: str) -> TransferBackend:
    """The backend of that name for `agent`. Raises ConfigError where its package is missing."""
    if name == "nixl":
        from .nixl import NixlBackend

        transports = os.environ.get("UCX_TLS", "all")
        return NixlBackend(
            agent, use_host_memory=allows_host_memory(transports), copies_itself=allows_own_copies(transports)
        )
    if name == "ucx":
        from .ucx import UcxBackend

        return UcxBackend(agent)
    raise ConfigError(f"transfer.backend: {name!r} is not one of nixl, ucx")


def allows_host_memory(transports: str) -> bool:
    """Tell whether a value of UCX_TLS lets a process copy from and to another one's memory."""
    names = set(transports.removeprefix("^").split(","))
    is_named = not names.isdisjoint({"all", "sm", "shm", "cma"})
    return not is_named if transports.startswith("^") else is_named


def allows_own_copies(transports: str) -> bool:
    """Tell whether this UCX_TLS lets a process write into another's memory, or its GPU's, without an agent over there.

    In doubt it may.
    """
    names = set(transports.removeprefix("^").split(","))
    if transports.startswith("^"):
        return names.isdisjoint({"sm", "shm"}) or names.isdisjoint({"cuda", "cuda_ipc"})
    return not names <= _THROUGH_AGENTS


def set_ucx_defaults(host: str) -> None:
    """Settings of UCX, which both backends stand on, for this process and its children; what the operator set stays.

    Call it before the process's first agent. `host`: where this worker is for others. UCX would listen on every
    interface, and whoever reaches one of its ports can write to this process's memory: it is kept to the interface of
    that address, and to the RDMA devices. Transports are left to UCX, so that GPUs and InfiniBand are found.
    """
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")  # else it takes SIGHUP, by which a worker reads its secret again
    # Between processes of a host UCX copies a piece of 512 KiB and then looks at every socket. A post here is bounded
    # by itself (sender.MAX_WRITE_BYTES), and what else waits can wait for its end.
    os.environ.setdefault("UCX_CMA_SEG_SIZE", "8m")
    os.environ.setdefault("UCX_CMA_TX_QUOTA", "64")
    # Else a connection to a host that swallows what it is sent, as a firewall does, holds the transfer thread for as
    # long as TCP tries, some two minutes, and with it the handoffs with everybody else.
    os.environ.setdefault("UCX_TCP_CONN_NB", "y")
    if devices := devices_of(host):
        os.environ.setdefault("UCX_NET_DEVICES", ",".join(devices))


def devices_of(host: str, sys: Path = Path("/sys")) -> list[str]:
    """The network devices for UCX, by its names for them: the interface that has this address and, where that is not
    the loopback, every active RDMA port. Empty where no interface has it."""
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return []
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return ["lo"]
    interfaces = [
        name
        for name, known in psutil.net_if_addrs().items()
        if addresses & {address.address.partition("%")[0] for address in known}
    ]
    if not interfaces:
        return []
    ports = sorted(sys.glob("class/infiniband/*/ports/*"))
    active = [port for port in ports if "ACTIVE" in (port / "state").read_text()]
    return [*interfaces[:1], *(f"{port.parent.parent.name}:{port.name}" for port in active)]
