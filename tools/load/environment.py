"""The environment of a figure: the machine, the versions, the commit, the exact command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kvferry

from ...common.clock import wall_time_s
from ...common.processor import processor_features, processor_fields

_PACKAGES = ("torch", "nixl-cu12", "uvicorn", "msgspec")
_SECRET_FLAGS = ("--api-key",)
_ANSWERED_WITHIN_S = 30.0  # by a program that is asked: with many GPUs, nvidia-smi takes its time
_DEAD_WITHIN_S = 1.0
# As /proc/cpuinfo calls them.
_EXTENSIONS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve"),
)


@dataclass(slots=True, frozen=True)
class Environment:
    """Goes into every JSON record as it stands."""

    date: str
    command: str
    kvferry_version: str
    git_commit: str | None  # None: not run from a checkout; +dirty: files differ from it; +unknown: git did not tell
    python: str
    packages: dict[str, str]
    os: str
    cpu: str
    num_cores: int  # usable by this process
    memory_gib: float
    gpus: tuple[str, ...]


def describe_environment(program: str, argv: Sequence[str]) -> Environment:
    return Environment(
        date=datetime.fromtimestamp(wall_time_s(), UTC).isoformat(),
        command=shlex.join([*program.split(), *_without_secrets(argv)]),
        kvferry_version=kvferry.__version__,
        git_commit=_git_commit(),
        python=platform.python_version(),
        packages={name: found for name in _PACKAGES if (found := _version(name)) is not None},
        os=f"{platform.system()} {platform.release()}",
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=_gpus(),
    )


def _without_secrets(argv: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for previous, word in zip(["", *argv], argv, strict=False):
        flag, _, value = word.partition("=")
        if value and _is_secret(flag):
            word = f"{flag}=***"
        shown.append("***" if _is_secret(previous) else word)
    return shown


def _is_secret(word: str) -> bool:
    """Say whether a parser takes this for a flag of a secret: the beginning of its name is enough."""
    return len(word) > len("--") and any(flag.startswith(word) for flag in _SECRET_FLAGS)


def _git_commit() -> str | None:
    root = Path(kvferry.__file__).resolve().parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    changes = _output("git", "-C", str(root), "status", "--porcelain", "-uno")
    return commit + ("+unknown" if changes is None else "+dirty" if changes else "")


def _gpus() -> tuple[str, ...]:
    listing = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return tuple(listing.splitlines()) if listing else ()


def _cpu_name() -> str:
    """Name the processor and those of its extensions that products are fast by: many share a name."""
    name, has = processor_fields().get("model name", platform.machine()), processor_features()
    return " ".join([name, *(extension for extension in _EXTENSIONS if extension in has)])


def _output(*command: str) -> str | None:
    """None: no such program, it failed, or it does not answer."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    try:
        output, _ = process.communicate(timeout=_ANSWERED_WITHIN_S)
    except subprocess.TimeoutExpired:
        _give_up(process)
        return None
    return output.strip() if process.returncode == 0 else None


def _give_up(process: subprocess.Popen[str]) -> None:
    """Kill, and not wait for long: a program that hangs in a driver does not die."""
    process.kill()
    if process.stdout is not None:
        process.stdout.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_DEAD_WITHIN_S)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
