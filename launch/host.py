"""A machine's cores, free memory and GPUs, as far as this process may use them.

Read from the kernel (common/machine.py) and the driver's own tool, so that the launcher needs no torch.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import structlog

from ..common.errors import ConfigError
from ..common.extras import torch_cuda_version
from ..common.machine import free_memory_bytes, usable_cpus

_NVIDIA_SMI_TIMEOUT_S = 10.0
_GPU_FIELDS = "index,uuid,name,memory.total,memory.free"
_SHARED_MEMORY = Path("/dev/shm")
_TRANSPORTS, _SHARED_FOLDER = "UCX_TLS", "UCX_POSIX_DIR"  # which UCX takes, and where its files are if not there
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NO_DEVICES = ("", "-1", "NoDevFiles")  # how that is written for none

log = structlog.get_logger(__name__)


def _warn(reason: str) -> None:
    log.warning("gpus_unknown", reason=reason)


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str  # as CUDA_VISIBLE_DEVICES names it
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] | None = None  # None: not known


@dataclass(frozen=True, slots=True)
class Host:
    num_cpus: int
    free_memory_bytes: int
    gpus: tuple[Gpu, ...] = ()  # empty where the installed torch cannot use them
    is_cluster: bool = False  # of several machines: how many threads a worker has, its node knows


def read_host(env: Mapping[str, str]) -> Host:
    return Host(usable_cpus(), free_memory_bytes(), find_gpus(env) if torch_cuda_version() else ())


def check_shared_memory(env: Mapping[str, str]) -> None:
    """Refuse a folder for shared memory that takes no files: UCX, which does without where there is none, ends there.

    An operator who names transports knows which there are. Raises ConfigError.
    """
    if _TRANSPORTS in env or _SHARED_FOLDER in env or not _SHARED_MEMORY.is_dir():
        return
    try:
        TemporaryFile(dir=_SHARED_MEMORY).close()
    except OSError as error:
        raise ConfigError(
            f"transfer: {_SHARED_MEMORY} cannot be written to: {error.strerror or error}; mount it for this user to "
            f"write (a tmpfs, mode 1777), or go without shared memory: {_TRANSPORTS}=^posix"
        ) from None


def find_gpus(env: Mapping[str, str], tell: Callable[[str], None] = _warn) -> tuple[Gpu, ...]:
    """The NVIDIA devices that CUDA_VISIBLE_DEVICES leaves visible; none where the driver's tool is missing or fails.

    `tell(reason)`: there may be others.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or env.get(_VISIBLE) in _NO_DEVICES:
        return ()
    for fields in (f"{_GPU_FIELDS},compute_cap", _GPU_FIELDS):  # drivers of before 2022 do not know the last one
        query = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            why = str(error)
            break
        if done.returncode == 0:
            return parse_gpus(done.stdout, env.get(_VISIBLE), tell)
        why = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"  # it writes to either
    tell(f"{tool} fails: {why}")
    return ()


def parse_gpus(csv: str, visible: str | None, tell: Callable[[str], None] = _warn) -> tuple[Gpu, ...]:
    by_name: dict[str, Gpu] = {}
    machines = free_memory_bytes()
    for line in csv.strip().splitlines():
        index, uuid, name, total_mib, free_mib, *capability = (part.strip() for part in line.split(","))
        major, _, minor = "".join(capability).partition(".")
        known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
        total = _bytes(total_mib, machines)
        gpu = Gpu(index, name, total, _bytes(free_mib, min(total, machines)), known)
        by_name |= {index: gpu, uuid: gpu}
    if visible is None:
        return tuple(gpu for name, gpu in by_name.items() if name == gpu.index)
    names = [part.strip() for part in visible.split(",")]
    if unknown := [name for name in names if name not in by_name and name not in _NO_DEVICES]:
        tell(f"{_VISIBLE} has {', '.join(unknown)}, and nvidia-smi does not")
    return tuple(by_name[name] for name in names if name in by_name)


def _bytes(mib: str, otherwise: int) -> int:
    """Return what a card tells of its memory, or what there is otherwise.

    One that shares the machine's (GB10, Jetson) tells "[N/A]", one in slices no user what is free of it.
    """
    return int(mib) << 20 if mib.isdigit() else otherwise
