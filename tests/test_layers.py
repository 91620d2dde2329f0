"""Imports point downwards, and what is dangerous or heavy is imported in few places.

common <- transfer <- prefill, decode <- roles, router <- cli, launch, worker
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvferry

ROOT = Path(kvferry.__file__).resolve().parent
PACKAGE = "kvferry"
FOLDERS = ("common", "transfer", "prefill", "decode", "roles", "router")
ASSEMBLERS = ("cli", "launch", "worker", "__main__")  # modules, but for the folder `launch`
ALLOWED = {
    "common": {"common"},
    "transfer": {"common", "transfer"},
    "prefill": {"common", "transfer", "prefill"},
    "decode": {"common", "transfer", "decode"},
    "roles": {"common", "transfer", "prefill", "decode", "roles"},
    "router": {"common", "transfer", "prefill", "decode", "router"},
    "cli": {*FOLDERS, "cli", "launch", "worker", "benchmarks"},
    "launch": {*FOLDERS, "launch", "worker"},
    "worker": {*FOLDERS},
    "__main__": {"cli"},
    "__init__": set(),
}
IMPORTERS = {
    "ray": {"launch/on_ray.py", "launch/ray_calls.py"},
    "nixl": {"transfer/nixl.py"},
    "nixl_cu12": {"transfer/nixl.py"},
    "nixl_cu13": {"transfer/nixl.py"},
    "ucxx": {"transfer/ucx.py"},
    "flashinfer": {"common/attention/flashinfer.py", "common/kernels.py"},
}
# They build objects, and run code, from bytes.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("numpy", "load"), ("np", "load")}
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj", "deserialize_descs", "recv_object_list", "broadcast_object_list"}


def product_files() -> list[Path]:
    folders = [path for folder in (*FOLDERS, "launch", "cli", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *folders])


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.Module, path: Path) -> Iterator[str]:
    """Every module that a file imports, with its full dotted name, wherever in the file."""
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@pytest.mark.parametrize("path", product_files(), ids=relative)
def test_imports_point_downwards(path: Path) -> None:
    layer = layer_of(path)
    if layer == "benchmarks":
        return  # measures anything
    for module in imports(parse(path), path):
        head, _, rest = module.partition(".")
        if head == PACKAGE:
            target = rest.partition(".")[0]
            if target in (*FOLDERS, *ASSEMBLERS, "benchmarks"):
                assert target in ALLOWED[layer], f"{relative(path)} imports {module}"


@pytest.mark.parametrize("path", product_files(), ids=relative)
def test_heavy_libraries_have_one_importer(path: Path) -> None:
    if layer_of(path) == "benchmarks":
        return
    for module in imports(parse(path), path):
        importers = IMPORTERS.get(module.partition(".")[0], {relative(path)})
        assert relative(path) in importers, f"{relative(path)} imports {module}"


@pytest.mark.parametrize("path", product_files(), ids=relative)
def test_nothing_builds_objects_from_foreign_bytes(path: Path) -> None:
    tree = parse(path)
    found = [module for module in imports(tree, path) if module.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in FORBIDDEN_ATTRIBUTES or node.attr in FORBIDDEN_METHODS:
                found.append(f"{owner}.{node.attr}")
    assert not found, f"{relative(path)}: {found}"


def test_only_the_assemblers_stand_at_the_root() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= {*ASSEMBLERS, "__init__"}


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_command_line_starts_without_torch_and_ray() -> None:
    assert not modules_after("import kvferry.cli") & {"torch", "ray", "numpy", "fastapi", "kvferry.worker"}


def test_settings_check_and_plan_need_no_torch() -> None:
    assert "torch" not in modules_after("import kvferry.common.plan, kvferry.common.model_files, kvferry.launch")
