"""What the GPU's proofs need of a machine, and what of it is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvferry.common.extras import torch_cuda_version
from kvferry.launch.host import find_gpus

OWN_NEEDS = ("rich", "httpx", "msgspec", "pydantic")  # of the program that runs the parts
NIXL_WHEELS = ("nixl-cu13", "nixl-cu12", "nixl")
# Module to import -> the wheel that brings it. torch, and what comes with it, is the machine's own.
WHEELS = {
    "flashinfer": "flashinfer-python==0.7.2.post1",
    "tvm_ffi": "apache-tvm-ffi",
    "nixl": "nixl-cu13==1.5.1",
    "msgspec": "msgspec",
    "pydantic": "pydantic (with pydantic-core, annotated-types, typing-inspection)",
    "structlog": "structlog",
    "blake3": "blake3",
    "llguidance": "llguidance",
    "python_multipart": "python-multipart",
    "xxhash": "xxhash",
    "fastapi": "fastapi (with starlette, annotated-doc, opentelemetry-api)",
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "pytest_asyncio": "pytest-asyncio",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "tokenizers": "tokenizers",
    "pytest": "pytest",
    "httpx": "httpx",
    "rich": "rich",
    "jinja2": "jinja2",
    "typer": "typer",
    "uvloop": "uvloop",
    "prometheus_client": "prometheus-client",
    "yaml": "PyYAML",
    "psutil": "psutil",
    "matplotlib": "matplotlib",
}


def facts(env: Mapping[str, str]) -> dict[str, str]:
    """For the record; "-" for what is not there."""
    gpus = find_gpus(env)
    driver = _output("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
    compiler = nvcc(env)
    release = _output(str(compiler), "--version") if compiler else None
    return {
        "gpu": ", ".join(f"{gpu.name} with {gpu.total_bytes >> 30} GiB" for gpu in gpus) or "-",
        "driver, power limit": (driver or "-").splitlines()[0],
        "torch": f"{_version('torch')}, CUDA {torch_cuda_version() or '-'}",
        "nvcc": (release or "-").splitlines()[-1],
        "flashinfer": _version("flashinfer-python"),
        "nixl": next((f"{name} {found}" for name in NIXL_WHEELS if (found := _version(name)) != "-"), "-"),
    }


def why_no_gpu(env: Mapping[str, str]) -> list[str]:
    """What keeps torch from a GPU here, one line each; empty where it has one."""
    reasons = []
    if shutil.which("nvidia-smi") is None:
        reasons.append("no NVIDIA driver: there is no nvidia-smi")
    elif not find_gpus(env):
        visible = env.get("CUDA_VISIBLE_DEVICES")
        reasons.append(f"nvidia-smi shows no device{'' if visible is None else f' (CUDA_VISIBLE_DEVICES={visible!r})'}")
    if torch_cuda_version() is None:
        reasons.append(f"torch {_version('torch')} is built without CUDA: 2.11 or newer for CUDA 13 is needed")
    if not reasons and not _torch_sees_gpu():
        reasons.append("torch sees no device: does its CUDA version fit the driver?")
    return reasons


def missing(needs: tuple[str, ...], env: Mapping[str, str]) -> list[str]:
    """What of `needs` is not here, by the name under which it can be had. "toolkit" is CUDA's, the rest modules."""
    found = []
    for need in needs:
        if need == "toolkit":
            found += [] if has_prebuilt_modules() else missing_of_toolkit(env)
        elif not _is_there(need):
            found.append(WHEELS.get(need, need))
    return found


def _is_there(module: str) -> bool:
    names = [name.replace("-", "_") for name in NIXL_WHEELS] if module == "nixl" else [module]
    return any(importlib.util.find_spec(name) is not None for name in names)


def has_prebuilt_modules() -> bool:
    """FlashInfer looks beside itself for a module before it compiles it (`kit.py` puts them there)."""
    spec = importlib.util.find_spec("flashinfer")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    return any(any(Path(folder).glob("data/aot/*/*.so")) for folder in folders)


def missing_of_toolkit(env: Mapping[str, str]) -> list[str]:
    """What keeps FlashInfer's modules from being compiled. A toolkit of NVIDIA's wheels lacks headers and the stub."""
    compiler = nvcc(env)
    if compiler is None:
        return ["nvcc (CUDA toolkit, on PATH or in CUDA_HOME)"]
    home, flags = compiler.resolve().parent.parent, env.get("FLASHINFER_EXTRA_CUDAFLAGS", "")
    headers = [home / "include", *(Path(flag[2:]) for flag in flags.split() if flag.startswith("-I"))]
    linked = [Path(flag[2:]) for flag in env.get("FLASHINFER_EXTRA_LDFLAGS", "").split() if flag.startswith("-L")]
    libraries = [home / "lib64/stubs", *linked]
    found = [
        f"{name} (a folder that holds it: FLASHINFER_EXTRA_CUDAFLAGS=-I…)"
        for name in ("curand.h", "cublasLt.h")
        if not any((folder / name).exists() for folder in headers)
    ]
    if not any((folder / "libcuda.so").exists() for folder in libraries):
        found.append("lib64/stubs/libcuda.so (a folder that holds it: FLASHINFER_EXTRA_LDFLAGS=-L…)")
    return found


def nvcc(env: Mapping[str, str]) -> Path | None:
    """The compiler that kernels are built with at first use."""
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    homes = [Path(env[name]) / "bin" / "nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in env]
    candidates = [*([Path(on_path)] if on_path else []), *homes, Path("/usr/local/cuda/bin/nvcc")]
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _output(*command: str) -> str | None:
    """None: no such program, or it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
