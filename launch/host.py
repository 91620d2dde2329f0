"""What this machine has: cores, free memory and GPUs, as far as this process may use them.

Read from the kernel and the driver's own tool, so that the launcher needs no torch. Containers count: a control
group's limits stand in for the machine's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..common.channel import Address
from ..common.errors import ConfigError

_NVIDIA_SMI_TIMEOUT_S = 10.0
_BACKLOG = 2048
_MAX_NICENESS = 19
_NICENESS_OF_LIMIT = 20  # RLIMIT_NICE counts down from it
_CAP_SYS_NICE = 23
_SEND_BUFFER_BYTES = 128 * 2**10  # in the kernel for each connection: a client that does not read is noticed


@dataclass(frozen=True, slots=True)
class Gpu:
    index: str  # as CUDA_VISIBLE_DEVICES names it
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Host:
    num_cpus: int
    free_memory_bytes: int
    gpus: tuple[Gpu, ...] = ()  # empty where the installed torch cannot use them


def read_host(env: Mapping[str, str]) -> Host:
    return Host(usable_cpus(), free_memory_bytes(), find_gpus(env) if torch_cuda_version() else ())


def usable_cpus(root: Path = Path("/")) -> int:
    """Cores in this process's affinity mask, less where its control group has a quota."""
    count = len(os.sched_getaffinity(0))
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        count = min(count, max(1, int(quota) // int(period)))
    return count


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that can be taken without swapping, within the control group's limit."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    free = int(match[1]) * 1024 if match else 0
    group = root / "sys/fs/cgroup"
    limit, used = _read(group / "memory.max"), _read(group / "memory.current")
    if limit.isdigit() and used.isdigit():
        reclaimable = re.search(r"^inactive_file (\d+)", _read(group / "memory.stat"), re.MULTILINE)
        free = min(free, int(limit) - int(used) + (int(reclaimable[1]) if reclaimable else 0))
    return max(free, 0)


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = _read(Path(spec.origin).parent / "version.py")
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version, re.MULTILINE)
    return match[1] if match else None


def find_gpus(env: Mapping[str, str]) -> tuple[Gpu, ...]:
    """The NVIDIA devices that CUDA_VISIBLE_DEVICES leaves visible."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(output, env.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(csv: str, visible: str | None) -> tuple[Gpu, ...]:
    by_name: dict[str, Gpu] = {}
    for line in csv.strip().splitlines():
        index, uuid, name, total_mib, free_mib = (part.strip() for part in line.split(","))
        gpu = Gpu(index, name, int(total_mib) << 20, int(free_mib) << 20)
        by_name |= {index: gpu, uuid: gpu}
    if visible is None:
        return tuple(gpu for name, gpu in by_name.items() if name == gpu.index)
    return tuple(by_name[name] for name in (part.strip() for part in visible.split(",")) if name in by_name)


def why_not_bindable(host: str, port: int) -> str | None:
    """Why a server cannot listen at host:port; None if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def listen(address: Address, *, setting: str = "port") -> socket.socket:
    """A listening socket for HTTP; port 0 takes a free one. Raises ConfigError that names `setting`."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)  # accepted sockets inherit it
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        flag = "--" + setting.replace("_", "-")
        text = f"{setting}: cannot listen on {address}: {error.strerror or error}; set another {flag}"
        raise ConfigError(text) from error
    return sock


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


class Courtesy:
    """Lets others compute first, or not: every thread of some processes. Linux; elsewhere nothing happens."""

    def __init__(self, niceness: int, *pids: int) -> None:
        """`niceness`: on top of what this process has now."""
        self._pids = pids
        self._own = os.getpriority(os.PRIO_PROCESS, 0)
        self._polite = min(_MAX_NICENESS, self._own + niceness)
        self._now = self._own
        self.is_revocable = self._may_return()

    def _may_return(self) -> bool:
        """Who has become polite may become as before: for most users that is denied."""
        limit = resource.getrlimit(resource.RLIMIT_NICE)[0]
        status = _read(Path("/proc/self/status"))
        match = re.search(r"^CapEff:\s+([0-9a-f]+)", status, re.MULTILINE)
        is_capable = match is not None and bool(int(match[1], 16) >> _CAP_SYS_NICE & 1)
        return is_capable or limit == resource.RLIM_INFINITY or _NICENESS_OF_LIMIT - limit <= self._own

    def set(self, on: bool) -> None:
        """Or leave it, where the way back is denied."""
        wanted = self._polite if on else self._own
        if wanted == self._now or (wanted < self._now and not self.is_revocable):
            return
        self._now = wanted
        for pid in self._pids:
            for task in Path(f"/proc/{pid}/task").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    os.setpriority(os.PRIO_PROCESS, int(task.name), wanted)
