"""What `kvferry doctor` looks at: each check says ok, warn or fail, and how to mend what is not ok.

Nothing is started or changed. The one check that moves bytes, the transfer library, runs in a process of its own: a
broken driver may end it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from .errors import ConfigError
from .host import find_gpus, free_memory_bytes, torch_cuda_version, usable_cpus, why_not_bindable
from .model_files import resolve_model

_TRIAL_TIMEOUT_S = 60.0
_MIN_OPEN_FILES = 4096
_MIN_SHARED_MEMORY_BYTES = 256 << 20
_MIN_MEMORY_BYTES = 2 << 30
_MIB, _GIB = 1 << 20, 1 << 30


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"  # works, but worse than it could
    FAIL = "fail"  # `kvferry serve` will not work


class Check(NamedTuple):
    name: str
    level: Level
    found: str
    fix: str = ""


def examine(
    env: Mapping[str, str], *, model: str | None, host: str, port: int, transfer_trial: Sequence[str]
) -> Iterator[Check]:
    """`transfer_trial`: a command that opens the transfer library and ends with 0."""
    yield _python()
    yield from _torch(env)
    yield _transfer(transfer_trial)
    yield _fabric()
    yield _ray()
    yield _cores()
    yield _memory()
    yield _shared_memory()
    yield _open_files()
    yield _port(host, port)
    yield _model(model)


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return Check("platform", Level.FAIL, found, "kvferry runs on Linux, on x86_64 and aarch64")
    return Check("platform", Level.OK, found)


def _torch(env: Mapping[str, str]) -> Iterator[Check]:
    version, cuda, gpus = _version("torch"), torch_cuda_version(), find_gpus(env)
    if version is None:
        yield Check("torch", Level.FAIL, "not installed", "pip install kvferry, or torch 2.11 or newer of your own")
        return
    yield Check("torch", Level.OK, f"{version}, {'CUDA ' + cuda if cuda else 'for CPU'}")
    names = ", ".join(f"{gpu.name} ({gpu.free_bytes // _GIB} of {gpu.total_bytes // _GIB} GiB free)" for gpu in gpus)
    if not gpus:
        yield Check("gpu", Level.OK, "none: the CPU is used")
    elif cuda is None:
        yield Check("gpu", Level.WARN, f"{names}, but torch is built for CPU", "install torch with CUDA: pytorch.org")
    else:
        yield Check("gpu", Level.OK, names)
        flashinfer = _version("flashinfer-python")
        fix = "" if flashinfer else "pip install 'kvferry[gpu]'"
        yield Check("flashinfer", Level.OK if flashinfer else Level.WARN, flashinfer or "not installed", fix)


def _transfer(trial: Sequence[str]) -> Check:
    try:
        result = subprocess.run(trial, capture_output=True, text=True, timeout=_TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Check("nixl", Level.FAIL, f"no answer in {_TRIAL_TIMEOUT_S:g} s", "try --transfer ucx")
    if result.returncode == 0:
        return Check("nixl", Level.OK, "an agent with UCX opens")
    last = (result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}").splitlines()[-1]
    return Check("nixl", Level.FAIL, last, "pip install nixl-cu12==1.5.1, or --transfer ucx with 'kvferry[ucx]'")


def _fabric() -> Check:
    """InfiniBand or RoCE devices, and whether memory may be pinned for them."""
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if not devices:
        return Check("rdma", Level.OK, "no device: shared memory on one machine, TCP between machines")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = ", ".join(devices)
    if soft != resource.RLIM_INFINITY:
        return Check("rdma", Level.WARN, f"{found}, but only {soft // _MIB} MiB may be locked", "ulimit -l unlimited")
    return Check("rdma", Level.OK, found)


def _ray() -> Check:
    version = _version("ray")
    return Check(
        "ray", Level.OK, version or "not installed; needed for --launcher ray only: pip install 'kvferry[ray]'"
    )


def _cores() -> Check:
    count = usable_cpus()
    return Check("cores", Level.OK, str(count))


def _memory() -> Check:
    free = free_memory_bytes()
    found = f"{free / _GIB:.1f} GiB free"
    if free < _MIN_MEMORY_BYTES:
        return Check("memory", Level.WARN, found, "a small model on two workers takes 2 GiB: --prefill 0 takes half")
    return Check("memory", Level.OK, found)


def _shared_memory() -> Check:
    size = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    if size < _MIN_SHARED_MEMORY_BYTES:
        return Check("shared memory", Level.WARN, f"{size // _MIB} MiB", "in a container: --shm-size 1g")
    return Check("shared memory", Level.OK, f"{size // _MIB} MiB")


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _MIN_OPEN_FILES:
        return Check("open files", Level.WARN, f"{soft} of at most {hard}", f"ulimit -n {min(hard, 65536)}")
    return Check("open files", Level.OK, str(soft))


def _port(host: str, port: int) -> Check:
    why = why_not_bindable(host, port)
    if why is not None:
        return Check("port", Level.FAIL, f"{host}:{port}: {why}", "--port 0 takes any free one")
    return Check("port", Level.OK, f"{host}:{port} is free")


def _model(model: str | None) -> Check:
    if model is not None and not Path(model).expanduser().exists():
        return Check("model", Level.OK, f"{model}: looked up on the hub when it is served")
    try:
        resolved = resolve_model(model)
    except ConfigError as error:
        return Check("model", Level.FAIL, str(error))
    return Check("model", Level.OK, f"{resolved.served_name} in {resolved.dir}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
