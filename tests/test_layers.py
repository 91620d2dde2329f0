"""Imports point downwards from room to room, and what is dangerous or heavy is imported in few places.

A room is a folder with the files that lie in it, without its subfolders. HOUSE is the order of the rooms, as data: a
room, and what it imports. It may import nothing else, and what it does not import stands in no row.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import kvferry

ROOT = Path(kvferry.__file__).resolve().parent
PACKAGE = "kvferry"
FOLDERS = (
    *("cli", "common", "decode", "engine", "grammar", "kvcache", "launch", "models", "prefill"),
    *("router", "settings", "simulator", "sizing", "tools", "transfer", "wire", "worker"),
)
MAX_FILES = 25  # of a room
MAX_COMMON_LINES = 2500
HOUSE = """
common
wire                 common
settings             common wire
models/families
models/gguf/architectures models/families
models/gguf          common models/families models/gguf/architectures
models/parts         common models/families
models/stored        common
models               common models/gguf models/families models/parts models/stored
kvcache              common wire
sizing               common models models/parts kvcache
grammar              common models
engine/ranks         common models kvcache
engine/nn/attention  common models/parts
engine/weights       common models models/parts
engine/sampling      common
engine/nn            common models models/families models/parts models/stored engine/ranks engine/nn/attention
engine/nn            engine/weights engine/sampling
engine/cpu           common models models/parts engine/ranks engine/nn/attention engine/weights
engine/cpu           engine/sampling engine/nn
engine/cuda          common models engine/nn/attention engine/weights engine/sampling engine/nn
engine               common wire models models/parts kvcache engine/ranks engine/nn/attention engine/weights
engine               engine/sampling engine/nn engine/cpu engine/cuda
transfer/backends    common wire
transfer/protocol    common wire kvcache transfer/backends
transfer/fetch       common wire kvcache transfer/backends transfer/protocol
transfer/send        common wire transfer/backends transfer/protocol transfer/fetch
transfer/receive     common wire kvcache transfer/backends transfer/protocol
transfer             common wire transfer/backends transfer/protocol transfer/send
prefill              common wire kvcache transfer/protocol transfer/fetch transfer/send
decode               common wire kvcache transfer/fetch transfer/receive
worker               common wire kvcache engine/ranks engine transfer/backends transfer/protocol transfer/fetch
worker               grammar
worker               transfer/send transfer/receive transfer prefill decode
router/state         common wire kvcache
router/metrics       common wire
router/http          common settings router/state
router/access        common wire settings router/state
router/helpers       common grammar models router/state
router/kept          common router/state
router/queue         common router/state
router/turns/values  router/state
router/turns         common router/state router/turns/values
router/placement     common router/state
router/dispatch      common wire kvcache router/state router/queue router/placement
router/autoscaler    common settings kvcache router/state router/metrics
router/catalogue     common models models/stored router/state router/dispatch router/helpers router/turns
router/bodies        common grammar models router/state router/catalogue router/turns router/turns/values
router/api           common models router/state router/http router/access router/helpers router/kept router/catalogue
router/api           router/bodies router/turns router/turns/values
router/messages      common router/state router/bodies router/api router/turns router/turns/values
router/responses     common router/state router/http router/kept router/bodies router/api router/turns
router/embeddings    common models router/bodies router/api router/catalogue
router/batches       common router/state router/helpers router/kept router/api
router/admin         common router/state router/access router/helpers router/autoscaler router/api
router               common wire settings models router/state router/metrics router/http router/access router/helpers
router               router/placement router/dispatch router/autoscaler router/catalogue router/api router/messages
router               router/responses router/embeddings router/batches router/admin router/kept router/bodies
launch/forking       common
launch               common wire settings models models/parts kvcache sizing engine/cpu launch/forking
tools/load           common
tools/chaos          common models tools/load
simulator            common wire kvcache engine transfer/protocol transfer/send decode worker
simulator            router/state router/placement router/dispatch router/autoscaler tools/load simulator/costs
simulator            models sizing
simulator/commands   common models models/parts sizing tools/load simulator simulator/costs
cli                  common wire settings models models/parts sizing router/admin launch
__main__             cli
simulator/costs      common wire sizing
"""
# The same of the C++ for CPUs: the folders of engine/cpu/native, and whose headers each includes.
NATIVE = """
sets
machine    sets
sampling   machine
products   machine sets
attention  machine products sets
layers     machine products attention
steps      machine products layers
native     machine products layers steps sampling
"""
# What may import a heavy library.
IMPORTERS = {
    "ray": {"launch/on_ray.py", "launch/ray_calls.py", "launch/ray_worker.py"},
    "nixl": {"transfer/backends/nixl_api.py"},
    "nixl_cu12": {"transfer/backends/nixl_api.py"},
    "nixl_cu13": {"transfer/backends/nixl_api.py"},
    "ucxx": {"transfer/backends/ucx_agent.py"},
    "llguidance": {"grammar/matching.py", "grammar/source.py"},
    "flashinfer": {"engine/nn/attention/flashinfer.py", "engine/nn/attention/flashinfer_package.py"},
}
# They build objects, and run code, from bytes.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load"), ("numpy", "load"), ("np", "load")}
FORBIDDEN_METHODS = {"recv_pyobj", "send_pyobj", "deserialize_descs", "recv_object_list", "broadcast_object_list"}


@cache
def allowed() -> Mapping[str, set[str]]:
    """Return HOUSE: each room with all that it may import; a room has several lines where one would be too long."""
    rows: dict[str, set[str]] = {}
    for room, *targets in (line.split() for line in HOUSE.strip().splitlines()):
        rows.setdefault(room, set()).update(targets)
    return rows


@cache
def product() -> Mapping[Path, ast.Module]:
    """Every file of the product, parsed."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in [*ROOT.glob("*.py"), *paths]}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    """Return the folder of a file; of one at the root, its name."""
    folder = relative(path.parent)
    return path.stem if folder == "." else folder


@cache
def imports(path: Path) -> list[str]:
    """Return every module that a file imports, with its full dotted name, wherever in the file."""
    parts, found = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts], list[str]()
    for node in ast.walk(product()[path]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = parts[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


@cache
def file_of(module: str) -> Path | None:
    """Return the file of ours that this module, or a name in it, comes from."""
    parts = module.split(".")
    if parts[0] != PACKAGE or parts == [PACKAGE]:
        return None
    for end in (len(parts), len(parts) - 1):
        path = ROOT.joinpath(*parts[1:end])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file in product():
                return file
    raise AssertionError(f"there is no module {module}")


@cache
def arrows() -> Mapping[tuple[str, str], str]:
    """Which room imports which, and one import that shows it."""
    found: dict[tuple[str, str], str] = {}
    for path in product():
        for module in imports(path):
            target = file_of(module)
            if target is not None and target != ROOT / "__init__.py" and room_of(target) != room_of(path):
                found.setdefault((room_of(path), room_of(target)), f"{relative(path)} imports {module}")
    return found


def test_every_import_is_in_its_rooms_row() -> None:
    wrong = [example for (room, target), example in arrows().items() if target not in allowed().get(room, set())]
    assert not wrong


def test_every_row_is_of_a_room_and_names_what_the_room_imports() -> None:
    assert set(allowed()) == {room_of(path) for path in product() if path.read_text()} - {"__init__"}  # the version
    unused = [(room, target) for room, row in allowed().items() for target in row if (room, target) not in arrows()]
    assert not unused


def test_no_rooms_import_one_another_in_a_circle() -> None:
    graphlib.TopologicalSorter(allowed()).prepare()


def test_no_files_import_one_another_in_a_circle() -> None:
    """Names that types alone need count as well."""
    files = {path: {target for module in imports(path) if (target := file_of(module))} - {path} for path in product()}
    graphlib.TopologicalSorter(files).prepare()


def test_no_folder_depends_on_what_lies_above_it() -> None:
    """The same for the folders of the root, each with all of its rooms."""
    folders: dict[str, set[str]] = {}
    for room, row in allowed().items():
        above = room.partition("/")[0]
        folders.setdefault(above, set()).update({target.partition("/")[0] for target in row} - {above})
    graphlib.TopologicalSorter(folders).prepare()


def test_no_room_is_crowded() -> None:
    headers = (ROOT / "engine" / "cpu" / "native").rglob("*.hpp")
    rooms = [*map(room_of, product()), *map(room_of, headers)]
    assert not {room for room in rooms if rooms.count(room) > MAX_FILES}


def test_what_all_rooms_share_stays_small() -> None:
    lines = [line for path in product() if room_of(path) == "common" for line in path.read_text().splitlines()]
    assert len(lines) <= MAX_COMMON_LINES


def test_headers_include_what_lies_below_them() -> None:
    source = ROOT / "engine" / "cpu" / "native"
    rows = {room: set(row) for room, *row in (line.split() for line in NATIVE.strip().splitlines())}
    graphlib.TopologicalSorter(rows).prepare()
    files = [path for path in source.rglob("*") if path.suffix in (".hpp", ".cpp")]
    found: dict[str, set[str]] = {path.parent.name: set() for path in files}
    for path in files:
        for included in re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            assert (source / included).is_file(), f"{relative(path)} includes {included}, not by its path in there"
            found[path.parent.name].add(included.partition("/")[0])
    assert {room: row - {room} for room, row in found.items()} == rows


def test_only_the_command_stands_at_the_root() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {"__init__", "__main__"}


def test_heavy_libraries_have_one_importer() -> None:
    for path in product():
        for module in imports(path):
            importers = IMPORTERS.get(module.partition(".")[0], {relative(path)})
            assert relative(path) in importers, f"{relative(path)} imports {module}"


def test_nothing_builds_objects_from_foreign_bytes() -> None:
    assert not {relative(path): found for path in product() if (found := dangers(path))}


def dangers(path: Path) -> list[str]:
    found = [module for module in imports(path) if module.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(product()[path]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(node.func.id)
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if (owner, node.attr) in FORBIDDEN_ATTRIBUTES or node.attr in FORBIDDEN_METHODS:
                found.append(f"{owner}.{node.attr}")
    return found


def modules_after(statement: str) -> set[str]:
    script = f"import sys\n{statement}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_command_line_starts_without_torch_and_ray() -> None:
    heavy = {"torch", "ray", "numpy", "fastapi", "structlog", "kvferry.launch.plan", "kvferry.worker.process"}
    assert not modules_after("import kvferry.cli") & heavy


def test_a_process_that_parses_bodies_starts_without_logs_and_loops() -> None:
    parsing = "import kvferry.router.helpers.program, kvferry.router.helpers.strict_json"
    assert not modules_after(parsing) & {"structlog", "rich", "asyncio", "numpy", "pydantic"}


def test_settings_check_and_plan_need_no_torch() -> None:
    common = ", ".join(f"kvferry.common.{path.stem}" for path in (ROOT / "common").glob("*.py"))
    statement = (
        f"import {common}, kvferry.launch.plan, kvferry.models.files, kvferry.launch.local, kvferry.launch.on_ray"
    )
    assert "torch" not in modules_after(statement)
