"""What is declared is what is there: packages, dependencies, and the files of the wheel."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kvferry
from kvferry.engine.cpu.compiler import ALL_SETS, FLOAT32_SETS, SETS
from kvferry.models.default import cache_dir

from .test_layers import FOLDERS

ROOT = Path(kvferry.__file__).resolve().parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = ("ray", "ucx", "gpu", "plot", "bench")

# Where the name of the import says nothing of the distribution.
DISTRIBUTION_OF = {"yaml": "pyyaml", "flashinfer": "flashinfer-python", "ucxx": "ucxx-cu12"}
# Loaded by name, not by an import statement: uvicorn's event loop and parser; whichever wheel has NIXL.
LOADED_BY_NAME = {"uvloop", "httptools", "nixl-cu12"}
# They come with something that is declared, as part of its interface.
COMES_WITH = {
    "triton": "torch",  # CUDA builds of it
    "starlette": "fastapi",
    "click": "typer",
    "pydantic-core": "pydantic",
    "anyio": "fastapi",
    "referencing": "jsonschema",
}

PEERS = {"llama-cpp"}  # benchmarks run these by an interpreter of their own
# Compiles without optimising, and what it has compiled before it has kept: whoever changes no C++ waits for none.
HASTY_COMPILER = """#!{python}
import hashlib, os, shutil, subprocess, sys
from pathlib import Path

command, kept = [{found!r}, *sys.argv[1:], "-O0"], Path({kept!r})
if "-c" not in command:
    os.execv(command[0], command)
made, source = Path(command[command.index("-o") + 1]), Path(sys.argv[-1])
digest = hashlib.sha256(subprocess.check_output([command[0], "--version"]))
paths = str(made), str(source), str(source.parent)  # a checkout's own, and its copy's
digest.update(repr([word for word in command if word not in paths]).encode())
for path in sorted(path for path in source.parent.rglob("*") if path.is_file()):
    digest.update(repr((str(path.relative_to(source.parent)), path.read_bytes())).encode())
known = kept / f"{{digest.hexdigest()[:32]}}.o"
if known.is_file():
    known.touch()
else:
    subprocess.run(command, check=True)
    kept.mkdir(parents=True, exist_ok=True)
    part = shutil.copyfile(made, kept / f"{{known.name}}.{{os.getpid()}}")
    os.replace(part, known)
    for old in sorted(kept.glob("*.o"), key=os.path.getmtime)[:-{most}]:
        old.unlink(missing_ok=True)
shutil.copyfile(known, made)
"""


def normalized(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def declared(*extras: str) -> set[str]:
    project = PROJECT["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return {normalized(requirement) for group in groups for requirement in group}


@cache
def imported(*folders: str) -> set[str]:
    """Distributions of the third-party modules that these folders (and the root) import anywhere."""
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    names: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    foreign = names - set(sys.stdlib_module_names) - {"kvferry"}
    return {DISTRIBUTION_OF.get(name, re.sub(r"[-_.]+", "-", name).lower()) for name in foreign}


@pytest.mark.slow
def test_every_import_is_declared() -> None:
    used = {COMES_WITH.get(name, name) for name in imported(*FOLDERS, "benchmarks")}
    assert used - declared(*EXTRAS) - PEERS == set()


@pytest.mark.slow
def test_every_dependency_is_used() -> None:
    used = {COMES_WITH.get(name, name) for name in imported(*FOLDERS, "benchmarks")} | LOADED_BY_NAME
    assert declared(*EXTRAS) - used == set()


def test_packages_are_the_folders_with_an_init() -> None:
    found = {"kvferry"}
    for folder in FOLDERS:
        inits = (ROOT / folder).rglob("__init__.py")
        found |= {".".join(["kvferry", *init.parent.relative_to(ROOT).parts]) for init in inits}
        with_code = {path.parent for path in (ROOT / folder).rglob("*.py")}
        assert all((directory / "__init__.py").is_file() for directory in with_code), folder
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_constraints_pin_only_what_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normalized(line) for line in lines if line and not line.startswith("#")}
    assert pins <= declared(*EXTRAS, "dev")
    assert "torch==2.13.0" in lines


def test_installed_version_is_the_packages() -> None:
    assert importlib.metadata.version("kvferry") == kvferry.__version__


def copy_of_checkout(target: Path) -> Path:
    """The files that are, or would be, under version control: building leaves its traces there, not here."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
    return target


def hasty_compiler(folder: Path) -> Path:
    """Put before the compiler, where there is one, a hasty one: all source is compiled for each set."""
    folder.mkdir()
    if found := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        script = folder / "c++"
        kept, most = str(cache_dir() / "hasty"), 4 * len(ALL_SETS)
        script.write_text(HASTY_COMPILER.format(python=sys.executable, found=found, kept=kept, most=most))
        script.chmod(0o755)
    return folder


def test_a_header_that_is_renamed_but_not_where_it_is_included_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "cache_dir", lambda: tmp_path / "cache")
    if not (compiler := hasty_compiler(tmp_path / "bin") / "c++").is_file():
        pytest.skip("no compiler is installed")
    (folder := tmp_path / "source").mkdir()
    (header := folder / "known.hpp").write_text("inline int number() { return 1; }\n")
    (source := folder / "source.cpp").write_text('#include "known.hpp"\n')
    command: list[str | Path] = [compiler, "-I", folder, "-c", "-o", tmp_path / "part.o", source]
    subprocess.run(command, check=True)
    header.rename(folder / "new.hpp")  # which is sorted as it was
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_product_and_nothing_else(tmp_path: Path) -> None:
    tree = copy_of_checkout(tmp_path / "tree")
    build = (
        f"from setuptools import build_meta as b; b.build_wheel({str(tmp_path)!r}); b.build_sdist({str(tmp_path)!r})"
    )
    arguments = [sys.executable, "-W", "ignore", "-c", build]
    path = os.pathsep.join([str(hasty_compiler(tmp_path / "bin")), os.environ["PATH"]])
    result = subprocess.run(
        arguments, cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    product = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    expected = {f"kvferry/{path.relative_to(ROOT).as_posix()}" for path in product}
    expected |= {f"kvferry/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} | {"kvferry/py.typed"}
    expected |= {f"kvferry/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "engine").rglob("*.[ch]pp")}
    expected |= {f"kvferry/simulator/traces/{path.name}" for path in (ROOT / "simulator" / "traces").iterdir()}
    libraries = {name for name in names if name.endswith(".so")}
    assert names - libraries == expected
    if wheel.name.endswith("-any.whl"):
        assert not libraries  # built where no compiler is
    else:
        sets = [re.sub(r"-\w{12}-\w{12}\.so$", "", name) for name in sorted(libraries)]
        known = {f"kvferry/engine/cpu/prebuilt/kernels-{isa}" for isa in (*SETS, *FLOAT32_SETS)}
        assert set(sets) <= known and len(sets) >= 1
    [sdist] = tmp_path.glob("kvferry-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.removeprefix("kvferry/") for name in expected} <= packed
