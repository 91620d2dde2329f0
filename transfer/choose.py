"""Which transport a worker uses, and what it is told before its first agent."""

from __future__ import annotations

import os

from ..common.errors import ConfigError
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
    """Whether a value of UCX_TLS lets a process copy from and to another one's memory."""
    names = set(transports.removeprefix("^").split(","))
    is_named = not names.isdisjoint({"all", "sm", "shm", "cma"})
    return not is_named if transports.startswith("^") else is_named


def allows_own_copies(transports: str) -> bool:
    """Whether with this UCX_TLS a process may write into another's memory, or its GPU's, without an agent over there.

    In doubt it may.
    """
    names = set(transports.removeprefix("^").split(","))
    if transports.startswith("^"):
        return names.isdisjoint({"sm", "shm"}) or names.isdisjoint({"cuda", "cuda_ipc"})
    return not names <= _THROUGH_AGENTS


def set_ucx_defaults(*, loopback_only: bool) -> None:
    """Settings of UCX, which both backends stand on, for this process; what the operator set stays.

    Call it before the process's first agent. UCX listens on every interface: where all workers live on one machine
    it is kept to the loopback. Transports are left to UCX, so that GPUs and InfiniBand are found.
    """
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
    # Between processes of a host UCX copies a piece of 512 KiB and then looks at every socket. A post here is bounded
    # by itself (sender.MAX_WRITE_BYTES), and what else waits can wait for its end.
    os.environ.setdefault("UCX_CMA_SEG_SIZE", "8m")
    os.environ.setdefault("UCX_CMA_TX_QUOTA", "64")
    if loopback_only:
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
