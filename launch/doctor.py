"""`kvferry doctor` shows the checks of a start (preflight.py), and what makes a start work worse than it could.

Nothing is started or changed. The one check that opens the transfer library runs in a process of its own, beside the
others: a broken driver may end it.
"""

from __future__ import annotations

import importlib.metadata
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..common.extras import FLASHINFER, nixl, torch_cuda_version
from ..common.machine import free_memory_bytes
from ..settings.fields import ServeSettings
from .host import find_gpus
from .preflight import Check, Level, Preflight

_TRIAL = "from kvferry.transfer.backends.nixl import NixlBackend; NixlBackend('doctor').close()"
_TRIAL_TIMEOUT_S = 60.0
_NETWORK_DEVICES = Path("/sys/class/net")
_MIN_OPEN_FILES = 4096
_MIN_SHARED_MEMORY_BYTES = 256 << 20
_MIN_MEMORY_BYTES = 2 << 30
_MIB, _GIB = 1 << 20, 1 << 30


def examine(settings: ServeSettings, env: Mapping[str, str]) -> Iterator[Check]:
    """Look at everything that matters for `serve` with these settings. A model on the hub is not fetched."""
    trial = subprocess.Popen((sys.executable, "-c", _TRIAL), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with trial:
        try:
            yield from Preflight(settings, env, fetches=False).checks()
            yield from _torch(env)
            yield _fabric()
            yield _memory()
            yield _shared_memory()
            yield _open_files()
            yield _opened(trial, Level.FAIL if settings.transfer == "nixl" else Level.WARN)
        finally:
            trial.kill()


def _torch(env: Mapping[str, str]) -> Iterator[Check]:
    version, cuda, lacks = _version("torch"), torch_cuda_version(), list[str]()
    gpus = find_gpus(env, lacks.append)
    if version is None:
        return  # said already
    yield Check("torch", Level.OK, f"{version}, {'CUDA ' + cuda if cuda else 'for CPU'}")
    names = ", ".join(f"{gpu.name} ({gpu.free_bytes // _GIB} of {gpu.total_bytes // _GIB} GiB free)" for gpu in gpus)
    if lacks:
        yield Check("gpu", Level.WARN, lacks[0], "CUDA_VISIBLE_DEVICES= where none is to be used")
    elif not gpus:
        yield Check("gpu", Level.OK, "none: the CPU is used")
    elif cuda is None:
        yield Check("gpu", Level.WARN, f"{names}, but torch is built for CPU", "install torch with CUDA: pytorch.org")
    else:
        yield Check("gpu", Level.OK, f"{names}, FlashInfer {_version(FLASHINFER.name)}")


def _opened(trial: subprocess.Popen[str], otherwise: Level) -> Check:
    """Look what became of the trial. `otherwise`: how bad it is that no agent opens."""
    try:
        output, errors = trial.communicate(timeout=_TRIAL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return Check("nixl", otherwise, f"no answer in {_TRIAL_TIMEOUT_S:g} s", "try --transfer ucx")
    if trial.returncode == 0:
        return Check("nixl", Level.OK, "an agent with UCX opens")
    last = (errors.strip() or output.strip() or f"exit code {trial.returncode}").splitlines()[-1]
    return Check("nixl", otherwise, last, _remedy())


def _remedy() -> str:
    """Say what helps where NIXL opens no agent."""
    library = nixl()
    if not library.is_installed:
        return library.missing
    if not _NETWORK_DEVICES.is_dir():
        return f"UCX looks for network devices in {_NETWORK_DEVICES}, which is not there: mount /sys"
    return "see what UCX says: UCX_LOG_LEVEL=info kvferry doctor; or try --transfer ucx"


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


def _memory() -> Check:
    free = free_memory_bytes()
    found = f"{free / _GIB:.1f} GiB free"
    if free < _MIN_MEMORY_BYTES:
        return Check(
            "main memory", Level.WARN, found, "a small model on two workers takes 2 GiB: --prefill 0 takes half"
        )
    return Check("main memory", Level.OK, found)


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


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
