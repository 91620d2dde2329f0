"""Libraries that not every installation has: which module shows that one is there, and a line that installs it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import NamedTuple


class Library(NamedTuple):
    """A library that is asked for by what an operator chose."""

    modules: tuple[str, ...]  # of which one must be importable
    requirement: str
    size: str  # of the download

    @property
    def is_installed(self) -> bool:
        """Look the package up without importing it."""
        return any(importlib.util.find_spec(module) is not None for module in self.modules)

    @property
    def missing(self) -> str:
        """Say how the extra is installed, for an error."""
        line = f"{sys.executable} -m pip install '{self.requirement}'"
        return f"{self.name} is not installed: {line} ({self.size})"

    @property
    def name(self) -> str:
        """Return the distribution's name."""
        return re.split("[<>=]", self.requirement)[0]


FLASHINFER = Library(("flashinfer",), "flashinfer-python>=0.7.2", "1 GB with what it needs")
RAY = Library(("ray",), "ray>=2.40", "80 MB")
UCXX = Library(("ucxx",), "ucxx-cu12>=0.48", "30 MB")
MATPLOTLIB = Library(("matplotlib",), "matplotlib>=3.9", "40 MB")
NIXL_VERSION = "1.5.1"


def nixl() -> Library:
    """Return NIXL's build for the CUDA of the installed torch first; without CUDA either does."""
    wanted, other = ("cu13", "cu12") if has_cuda_13(torch_cuda_version()) else ("cu12", "cu13")
    modules = (f"nixl_{wanted}", f"nixl_{other}", "nixl")
    return Library(modules, f"nixl-{wanted}=={NIXL_VERSION}", "60 MB")


def has_cuda_13(version: str | None) -> bool:
    """Tell CUDA 13 and later from earlier ones: NIXL's UCX looks for the runtime that it was built for."""
    return version is not None and int(version.partition(".")[0]) >= 13


def torch_cuda_version() -> str | None:
    """Return the CUDA version that the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version, re.MULTILINE)
    return match[1] if match else None
