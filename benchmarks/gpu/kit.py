"""Packs what the GPU's proofs need on a bare host into one folder that travels with the checkout.

    echo .gpukit >> .git/info/exclude
    python -m kvferry.benchmarks.gpu.kit --out .gpukit    # here: CUDA 13's nvcc, a C++ compiler, readelf, an index
    bash .gpukit/run_on_gpu.sh probe                          # there, in the checkout's root, .gpukit carried along

For Python 3.12 on x86-64, CUDA 13 and Hopper, without a network there. Where one call carries 64 MiB, the checkout's
6 MiB among them, neither FlashInfer's wheel (59 MiB) nor NIXL's (56 MiB) fits as it is. The kit holds

    flashinfer.tar.xz   FlashInfer without the sources of what kvferry never compiles, and with its own modules compiled
                        in flashinfer/data/aot, where it looks before it compiles anything
    nixl_cu13.tar.xz    NIXL with UCX as its only plugin, and the libraries that these two link
    wheels/             the small packages, as they are
    run_on_gpu.sh       unpacks these there and runs the proofs: probe, tests, check, exec
    kit.json            packages, modules, sizes

Versions and hashes are those of setup/*.lock. Modules need tvm-ffi's C interface alone, so this interpreter may be
another Python. Compiling takes half an hour on two cores; `--work` keeps what is done. `--modules page,silu`: a trial.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import kvferry
from kvferry.benchmarks.gpu.modules import MODULES
from kvferry.benchmarks.shared.program import benchmark, parser_of
from kvferry.common.config import environment
from kvferry.common.errors import ConfigError

ROOT = Path(kvferry.__file__).resolve().parent
MAX_BYTES = 56 << 20
PYTHON = "3.12"
FLASHINFER, NIXL = "flashinfer-python", "nixl-cu13"
# What the host lacks; torch, numpy, safetensors, tokenizers, httpx, jinja2, rich, typer, uvloop, prometheus-client,
# PyYAML, xxhash, huggingface-hub, pytest and matplotlib are its own.
CARRIED = (
    *("apache-tvm-ffi", "nvidia-ml-py", "einops", "ninja", "tabulate", "tqdm"),
    *("msgspec", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "structlog"),
    *("blake3", "psutil", "llguidance", "gguf", "fastapi", "starlette", "annotated-doc", "python-multipart"),
    *("opentelemetry-api", "uvicorn", "httptools", "pytest-asyncio"),
)
# What FlashInfer imports where its modules are compiled, beside torch.
_TO_BUILD = (
    *(FLASHINFER, "apache-tvm-ffi", "einops", "ninja", "tabulate", "tqdm", "click", "nvidia-ml-py", "requests"),
    *("packaging", "urllib3", "idna", "charset-normalizer", "certifi", "filelock", "jinja2", "markupsafe", "numpy"),
)
_PLATFORMS = (*(f"_2_{minor}" for minor in range(35, 4, -1)), "2014", "2010", "1")  # of manylinux
_NEVER_COMPILED = re.compile(
    r"flashinfer/(data/csrc/(cake|kda|fused_moe|gdn|experimental|nv_internal|alphamoe|blackwell|bgmv|fmha_v2|mhc|moe"
    r"|nvfp4|prims_ts|sparse_mla|xqa|generated|mamba|gated)|data/cutlass/(examples|python|test|tools/(library|profiler))"
    r"|data/cccl/python|experimental/.*/csrc/|moe_ep/kernel_src/)"
)
_NOT_OF_UCX = re.compile(r"nixl_ep|/libplugin_(?!UCX)|perftest|/headers/|nixl_cu13\.scripts/|libtelemetry_exporter")


# --- packages -------------------------------------------------------------------------------------------------


def requirements(names: Iterable[str]) -> str:
    """Return the locked lines of these packages, hashes included. Raises ConfigError for one that no lock holds."""
    locked: dict[str, list[str]] = {}
    for path in sorted((ROOT / "setup").glob("*.lock")):
        for block in re.split(r"\n(?=[A-Za-z0-9])", path.read_text(encoding="utf-8"))[1:]:
            found = locked.setdefault(re.split(r"[=\[ ]", block, maxsplit=1)[0], [])
            found += [block.strip()] if block.strip() not in found else []
    absent = [name for name in names if name not in locked]
    if absent:
        raise ConfigError(f"no lock in setup/ has {', '.join(absent)}")
    return "\n".join(block for name in names for block in locked[name]) + "\n"


def download(names: Iterable[str], folder: Path) -> list[Path]:
    """Fetch wheels for the host."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in _PLATFORMS]
    for_host = ("--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms)
    _pip(names, "download", *for_host, f"--dest={folder}")
    return sorted(folder.glob("*.whl"))


def installed(names: Iterable[str], folder: Path) -> Path:
    """Install for this interpreter, once."""
    mark, wanted = folder / "requirements.txt", requirements(names)
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        _pip(names, "install", "--no-compile", f"--target={folder}")
        mark.write_text(wanted, encoding="utf-8")
    return folder


def _pip(names: Iterable[str], *words: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements(names))
        file.flush()
        pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(*pip, *words, "--no-deps", "--require-hashes", "-r", file.name)


# --- compiling ------------------------------------------------------------------------------------------------

_BUILD = (
    "import json, sys; from kvferry.benchmarks.gpu.modules import build; import tvm_ffi; "
    "built = list(build(tuple(sys.argv[1:])).values()); [tvm_ffi.load_module(str(path)) for _, path in built]; "
    "print(json.dumps([[name, str(path)] for name, path in built]))"
)


def compiled(names: tuple[str, ...], work: Path, jobs: int) -> dict[str, Path]:
    """Compile the modules and load each once. Returns each library by FlashInfer's name of it."""
    site = installed(_TO_BUILD, work / "site")
    home = completed_toolkit(work / "cuda", installed(("nvidia-curand",), work / "curand") / "nvidia")
    known = environment()
    env = known | {
        "CUDA_HOME": str(home),
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_WORKSPACE_BASE": str(work / "jit"),
        "LD_LIBRARY_PATH": f"{home / 'lib64/stubs'}:{home / 'lib64'}",
        "MAX_JOBS": str(jobs),
        "PATH": f"{site / 'bin'}{os.pathsep}{known.get('PATH', '')}",
        "PYTHONPATH": str(site),
    }
    told = _run(sys.executable, "-c", _BUILD, *names, env=env)
    return {name: Path(path) for name, path in json.loads(told.strip().splitlines()[-1])}


def toolkit_home(env: Mapping[str, str]) -> Path:
    """Return the folder of a whole toolkit; on the PATH there may be a launcher alone. Raises ConfigError."""
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    homes = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in env]
    homes += [Path("/usr/local/cuda"), *([Path(on_path).resolve().parent.parent] if on_path else [])]
    for home in homes:
        if (home / "include/cuda_runtime.h").exists() and os.access(home / "bin/nvcc", os.X_OK):
            return home
    raise ConfigError("no CUDA toolkit: set CUDA_HOME to one of CUDA 13")


def completed_toolkit(folder: Path, curand: Path) -> Path:
    """Link a toolkit's files together with what one of NVIDIA's wheels lacks: cuRAND's headers, a libcuda to link with,
    and cuBLAS's headers, which the norms include and do not use."""
    real = toolkit_home(environment())
    compiler = real / "bin/nvcc"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "lib64/stubs").mkdir(parents=True)
    for part in ("bin", "include"):
        (folder / part).mkdir()
    for part in ("include", "lib64"):
        for entry in (real / part).iterdir():
            if entry.name != "stubs":
                (folder / part / entry.name).symlink_to(entry)
    if (real / "nvvm").exists():
        (folder / "nvvm").symlink_to(real / "nvvm")
    launcher = folder / "bin/nvcc"  # by a link, nvcc would look for its parts here
    launcher.write_text(f'#!/bin/sh\nexec "{compiler.resolve()}" "$@"\n')
    launcher.chmod(0o755)
    for header in curand.rglob("curand*.h"):
        if not (folder / "include" / header.name).exists():
            (folder / "include" / header.name).symlink_to(header)
    for name in ("cublasLt.h", "cublas_v2.h"):
        if not (folder / "include" / name).exists():
            (folder / "include" / name).touch()
    stub = folder / "lib64/stubs/libcuda.so"
    _run("c++", "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", str(stub))
    (stub.parent / "libcuda.so.1").symlink_to(stub.name)
    return folder


# --- packing --------------------------------------------------------------------------------------------------


def pack(wheel: Path, archive: Path, keeps: Callable[[str], bool], more: dict[str, Path]) -> None:
    """Write the wheel's files that are kept, and others under new names, as one archive."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch, zipfile.ZipFile(wheel) as whole:
        for member in whole.infolist():
            if keeps(member.filename):
                whole.extract(member, scratch)
        for name, path in more.items():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, Path(scratch) / name)
        with tarfile.open(archive, "w:xz") as packed:
            for entry in sorted(Path(scratch).iterdir()):
                packed.add(entry, entry.name)


def nixl_files(wheel: Path) -> set[str]:
    """List what UCX alone needs of NIXL's wheel. Raises ConfigError where that is not what it was."""
    with zipfile.ZipFile(wheel) as whole:
        kept = {name for name in whole.namelist() if not _NOT_OF_UCX.search(name)}
        beside = {Path(name).name: name for name in kept if re.fullmatch(r"nixl_cu13\.libs/[^/]+", name)}
        linked: set[str] = set()
        left = [name for name in kept if ".so" in name and name not in beside.values()]
        while left:
            found = {beside[name] for name in linked_by(whole.read(left.pop())) if name in beside} - linked
            linked |= found
            left += found
    if not any("libucp" in name for name in linked):
        raise ConfigError(f"{wheel.name}: its plugin links no libucp: the wheel is laid out in another way")
    return kept - (set(beside.values()) - linked)


def linked_by(library: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(library)
        file.flush()
        return re.findall(r"\(NEEDED\).*\[(.+)\]", _run("readelf", "-d", file.name))


def build_kit(out: Path, work: Path, names: tuple[str, ...], jobs: int) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    download(CARRIED, out / "wheels")
    [flashinfer] = download((FLASHINFER,), work / "flashinfer")
    [nixl] = download((NIXL,), work / "nixl")
    libraries = compiled(names, work, jobs)
    more = {f"flashinfer/data/aot/{name}/{name}.so": path for name, path in libraries.items()}
    pack(flashinfer, out / "flashinfer.tar.xz", lambda name: not _NEVER_COMPILED.match(name), more)
    kept = nixl_files(nixl)
    pack(nixl, out / "nixl_cu13.tar.xz", kept.__contains__, {})
    shutil.copy2(Path(__file__).with_name("run_on_gpu.sh"), out)
    sizes = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    facts = {"python": PYTHON, "packages": [FLASHINFER, NIXL, *CARRIED], "modules": sorted(libraries), "bytes": sizes}
    (out / "kit.json").write_text(json.dumps(facts, indent=1))
    total = sum(sizes.values())
    print(f"{out}: {len(libraries)} modules, {total / (1 << 20):.1f} MiB of at most {MAX_BYTES >> 20}")
    if total > MAX_BYTES:
        raise ConfigError("the kit is too large to be carried: leave modules out (--modules)")


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise ConfigError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


@benchmark("gpu.kit")
def main(argv: list[str]) -> int:
    parser = parser_of("gpu.kit", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="emptied first")
    add("--work", type=Path, metavar="DIR", help="downloads and objects (default: DIR of --out + -work)")
    add("--jobs", type=int, default=2, help="compilers at a time, of up to 4 GiB each (default: %(default)s)")
    add("--modules", default=",".join(MODULES), help="(default: all)")
    flags = parser.parse_args(argv)
    out = flags.out.resolve()
    work = (flags.work or out.with_name(f"{out.name}-work")).resolve()
    build_kit(out, work, tuple(flags.modules.split(",")), flags.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
