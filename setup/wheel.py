"""Puts the compiled C++ into a wheel, a library for each instruction set: who installs it needs no compiler.

They are those of the machine that builds it, x86 or ARM. `pyproject.toml` names these commands. Built without a
compiler, or elsewhere, a wheel has none and is for any.
"""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from types import ModuleType

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).resolve().parent.parent


class BuildPy(build_py):
    """Copies the package, and compiles into the copy."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or (command := _command()) is None:
            return
        compiler = _compiler()
        for isa in (*compiler.SETS, *compiler.FLOAT32_SETS):
            try:
                folder = Path(self.build_lib) / "kvferry" / "engine" / "cpu" / "prebuilt"
                compiler.compiled(isa, command, folder, is_portable=True)
            except compiler.NativeUnavailable as reason:
                self.announce(f"no library for {isa}: {reason}", level=3)


class BdistWheel(bdist_wheel):
    """Names the platform that the libraries are for; any Python 3 loads them."""

    def finalize_options(self) -> None:
        if _command() is not None:
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _command() -> tuple[str, ...] | None:
    compiler = _compiler()
    try:
        command: tuple[str, ...] = compiler.find_compiler()
    except compiler.NativeUnavailable:
        return None
    return command if platform.machine() in ("x86_64", "aarch64") else None


def _compiler() -> ModuleType:
    """Load the module from its file: the package's own imports are not installed here."""
    spec = importlib.util.spec_from_file_location("kvferry_compiler", _ROOT / "engine" / "cpu" / "compiler.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
