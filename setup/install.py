"""Installs kvferry with everything that it needs, from the lock files: what `make install` does.

    python3 setup/install.py --venv .venv [--dev] [--dry-run] [--any-torch]

    torch of this Python, 2.11 or later, if it has one   ─> used as it is
    else torch.lock (and cuda.lock, if that is a CUDA build)
    serve.lock, NIXL for torch's CUDA, the built-in model, FlashInfer where a GPU and a CUDA torch are
    zig.lock where no C++ compiler is, or none of C++20: it compiles what runs on a CPU, the first time now
    kvferry itself, editable

pip is used with its own settings. Every file is checked against the lock's hashes; an index of your own may have a
build of torch that the lock does not know, which `--any-torch` takes. Standard library alone: it runs before anything
is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "setup"
MIN_TORCH = (2, 11)
_TORCH = "torch==2.13.0"
_LOOK = (
    "import json, torch; from pathlib import Path; "
    "print(json.dumps([torch.__version__, torch.version.cuda, str(Path(torch.__file__).parent.parent)]))"
)
_COMPILE = "from kvferry.engine.cpu.build import load; from kvferry.models.default import cache_dir; load(cache_dir())"
# Compilers know the flag -std=c++20 before they have all of its library: GCC 10 lacks this.
_CPP20 = "#include <atomic>\nvoid wait(std::atomic<unsigned>& value) { value.wait(0); }\n"
_SHARED = ("-std=c++20", "-fPIC", "-pthread", "-shared")
_GPU_TIMEOUT_S = 60.0
_SIZES = {
    "torch": "torch (200 MB for CPU, 800 MB with CUDA)",
    "cuda": "CUDA's libraries (2 GB)",
    "serve": "small libraries (50 MB)",
    "nixl-cu12": "NIXL for CUDA 12 or none (60 MB)",
    "nixl-cu13": "NIXL for CUDA 13 (60 MB)",
    "gpu": "FlashInfer (1 GB with what it needs)",
    "model": "the built-in model (93 MB)",
    "zig": "a C++ compiler, as this machine has none of C++20 (100 MB)",
    "dev": "test tools, Ray and UCXX (150 MB)",
}


class Torch(NamedTuple):
    """An importable torch."""

    version: str
    cuda: str | None  # that it was built for
    folder: str  # that holds it: a site-packages

    @property
    def is_usable(self) -> bool:
        return tuple(int(part) for part in self.version.split(".")[:2]) >= MIN_TORCH

    @property
    def nixl_lock(self) -> str:
        """NIXL's UCX looks for the CUDA runtime of the version that it was built for."""
        is_13 = self.cuda is not None and int(self.cuda.split(".")[0]) >= 13
        return "nixl-cu13" if is_13 else "nixl-cu12"


class Installer:
    """Runs pip in one environment; with `is_dry` it tells what it would install."""

    def __init__(self, venv: Path, *, is_dry: bool = False) -> None:
        self.venv = venv
        self._is_dry = is_dry

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    def lock(self, name: str, *more: str) -> None:
        """Install what a lock file holds, and nothing that it does not hold."""
        print(f"  {_SIZES[name]}", flush=True)
        self._pip("--require-hashes", "--no-deps", *more, "-r", str(LOCKS / f"{name}.lock"))

    def torch(self, *, any_build: bool) -> None:
        """The build that pip would choose, checked afterwards: between builds with hashes it would choose by these."""
        print(f"  {_SIZES['torch']}", flush=True)
        if self._is_dry:
            self._run("install", "--no-deps", "--dry-run", _TORCH)
            return
        folder = Path(self.venv) / "download"  # its name is kept beside torch: two installations are equal to the byte
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self._run("download", "-qq", "--no-deps", "--dest", str(folder), _TORCH)
            [wheel] = folder.iterdir()
            if not any_build and (found := _sha256(wheel)) not in (LOCKS / "torch.lock").read_text():
                sys.exit(
                    f"{wheel.name} of pip's index has the hash {found}, which setup/torch.lock does not know. If you "
                    "trust the index: make install TORCH=any"
                )
            self._run("install", "-qq", "--no-deps", str(wheel))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def itself(self) -> None:
        if not self._is_dry:
            self._pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))

    def compile(self) -> None:
        """Compile the C++ now: zig's first use builds a C++ library of its own. Where it cannot, a start says why."""
        if not self._is_dry:
            print("  compiling for this processor (a minute or two)", flush=True)
            subprocess.run([self.python, "-c", _COMPILE], check=False, stderr=subprocess.DEVNULL)

    def _pip(self, *words: str) -> None:
        self._run("install", "--dry-run" if self._is_dry else "-qq", *words)

    def _run(self, *words: str) -> None:
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *words]
        env = {**os.environ, "PIP_USER": "0"}  # an environment has no place of a user's, whatever pip's settings say
        if subprocess.run(command, env=env, check=False).returncode:
            sys.exit(f"this failed: {' '.join(command)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="setup/install.py", description="Install kvferry into an environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="made if it is missing")
    parser.add_argument("--dev", action="store_true", help="what the tests need, too")
    parser.add_argument("--any-torch", action="store_true", help=f"take {_TORCH} unchecked from pip's index")
    parser.add_argument("--dry-run", action="store_true", help="say what would be installed")
    options = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036  # whoever has an older one learns it here
        sys.exit("kvferry needs Python 3.11 or newer: make install PYTHON=python3.12")
    base = find_torch(sys.executable)
    make_venv(options.venv, base if base is not None and base.is_usable else None)
    installer = Installer(options.venv, is_dry=options.dry_run)
    print(f"Installing into {options.venv} from pip's configured index, by the lock files in setup/:", flush=True)
    torch = find_torch(installer.python)
    if torch is None:
        torch = install_torch(installer, any_build=options.any_torch, is_dry=options.dry_run)
    else:
        print(f"  torch {torch.version} is there already: it is used as it is")
    names = names_of_locks(torch, has_gpu=has_gpu(), is_dev=options.dev, has_compiler=has_compiler())
    for name in names:
        installer.lock(name)
    installer.itself()
    if "zig" in names:
        installer.compile()
    return 0


def names_of_locks(torch: Torch | None, *, has_gpu: bool, is_dev: bool, has_compiler: bool = True) -> list[str]:
    """What is installed beside torch. None: a dry run has not installed it."""
    names = ["serve", torch.nixl_lock if torch is not None else "nixl-cu12", "model"]
    if not has_compiler:
        names.append("zig")
    if has_gpu and torch is not None and torch.cuda is not None:
        names.append("gpu")
    return [*names, "dev"] if is_dev else names


def find_torch(python: str) -> Torch | None:
    """The torch that this interpreter imports."""
    done = subprocess.run([python, "-c", _LOOK], capture_output=True, text=True, check=False)
    return Torch(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 and done.stdout else None


def install_torch(installer: Installer, *, any_build: bool, is_dry: bool) -> Torch | None:
    """The pinned one, with CUDA's libraries if it was built for CUDA."""
    installer.torch(any_build=any_build)
    found = torch_of_files(installer.venv)
    if found is not None and found.cuda is not None and not is_dry:
        installer.lock("cuda")
    return found


def torch_of_files(venv: Path) -> Torch | None:
    """Read from its files: without CUDA's libraries a CUDA build cannot be imported yet."""
    for path in venv.glob("lib/python*/site-packages/torch/version.py"):
        values: dict[str, str | None] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition("=")
            values[name.split(":")[0].strip()] = value.strip().strip("'\"") if "None" not in value else None
        return Torch(values.get("__version__") or "0", values.get("cuda"), str(path.parent.parent))
    return None


def make_venv(venv: Path, torch: Torch | None) -> None:
    """An environment with a pip, that sees the torch of this Python, if there is a usable one.

    Nothing is deleted but links to a Python that is gone: `-m venv` adds to a folder what is missing, and so completes
    what was interrupted.
    """
    python = venv / "bin" / "python"
    try:
        venv.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=venv).close()  # tried, as root may write everywhere by what `access` says
    except OSError as error:
        sys.exit(f"{venv} cannot be made or written to: {error.strerror}: install from a clone of your own")
    if not has_pip(python):
        if (venv / "pyvenv.cfg").exists():
            print(f"{venv} lacks pip, as an environment does that was left half made: completing it", flush=True)
        for link in (venv / "bin").glob("python*"):
            if not link.exists():  # `-m venv` takes any link for its own
                link.unlink()
        shown = ["--system-site-packages"] if torch is not None else []
        failed = subprocess.run([sys.executable, "-m", "venv", *shown, str(venv)], check=False).returncode
        if failed or not has_pip(python):
            sys.exit(
                f"no environment with pip could be made in {venv}; on Debian: apt install python3-venv. If that is "
                f"installed, what is in the folder is in the way: delete it, and run this again"
            )
    if torch is None or find_torch(str(python)) is not None:
        return
    # This Python is in an environment itself, whose packages a further one does not see.
    look = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
    Path(packages, "base.pth").write_text(f"{torch.folder}\n")
    if find_torch(str(python)) is None:
        sys.exit(f"torch {torch.version} of {sys.executable} cannot be imported from {venv}")


def has_pip(python: Path) -> bool:
    """Its metadata are written behind its code: what was interrupted meanwhile has none."""
    look = "import pip; from importlib.metadata import version; version('pip')"
    return python.exists() and subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0


def has_gpu() -> bool:
    """The driver's own tool lists a card."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False, timeout=_GPU_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"  no FlashInfer: nvidia-smi is silent for {_GPU_TIMEOUT_S:g} s; later: make -B install", flush=True)
        return False
    return done.returncode == 0 and "GPU 0" in done.stdout


def has_compiler() -> bool:
    """A C++ compiler is there that is new enough, or would be of no use: what it compiles is for x86 and ARM alone."""
    return platform.machine() not in ("x86_64", "aarch64") or any(map(_compiles, ("c++", "g++", "clang++")))


def _compiles(name: str) -> bool:
    if shutil.which(name) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:  # linked as well: the library is a package of its own on some systems
        command = [name, *_SHARED, "-o", str(Path(folder, "trial.so")), "-x", "c++", "-"]
        return subprocess.run(command, input=_CPP20, capture_output=True, text=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
