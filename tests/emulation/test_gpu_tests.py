"""Every test with the marker `gpu` passes on the emulated device, and the device is as strict as it says."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kvferry.benchmarks.gpu.modules import MODULES
from kvferry.benchmarks.gpu.parts import ROOT, gpu_test_files

from .install import STAND_INS

TESTS = ROOT / "tests"
FILES = [path for path in gpu_test_files(TESTS) if "benchmarks" not in path.parts and "emulation" not in path.parts]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: they run on it")


@dataclass
class Counts:
    """What became of a file's tests."""

    num_passed: int = 0
    reasons: set[str] = field(default_factory=set)  # of those that were skipped


def run(paths: Sequence[Path], report: Path, *flags: str) -> tuple[dict[Path, Counts], str]:
    """Run files on the emulated device, in a process of its own: what became of them, and the output."""
    command = [sys.executable, "-m", "pytest", "-p", "kvferry.tests.emulation.plugin", "-q", "-p", "no:cacheprovider"]
    settings = [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), f"--junitxml={report}"]
    done = subprocess.run([*command, *settings, *flags, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): Counts() for path in paths}
    for case in ElementTree.parse(report).iter("testcase"):
        counts, skipped = found[case.get("classname", "")], case.find("skipped")
        if skipped is None:
            counts.num_passed += 1
        else:
            counts.reasons.add(skipped.get("message", ""))
    return dict(zip(paths, found.values(), strict=True)), done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Counts]:
    """One process for all files: most of what a file takes is what its imports take."""
    found, output = run(FILES, tmp_path_factory.mktemp("gpu") / "report.xml", "-m", "gpu")
    assert "the emulated device saw" in output
    asked_for = re.findall(r"^attention modules: (.*)$", output, re.MULTILINE)
    assert {name for line in asked_for for name in line.split()} <= set(MODULES), "the kit would lack some"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(TESTS).as_posix() for path in FILES])
def test_tests_for_a_gpu_pass(path: Path, ran: dict[Path, Counts], record_property: pytest.FixtureRequest) -> None:
    counts = ran[path]
    assert counts.num_passed > 0
    assert not [reason for reason in counts.reasons if "CUDA" in reason or "extra" in reason], counts.reasons
    record_property("emulated_gpu_tests", counts.num_passed)  # type: ignore[operator]


@pytest.mark.slow
def test_the_device_is_strict(tmp_path: Path) -> None:
    strict = Path(__file__).with_name("strict.py")
    assert run([strict], tmp_path / "report.xml")[0][strict].num_passed > 10


@pytest.mark.slow
def test_a_part_that_passed_is_written_although_a_later_one_ends_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvferry.tests.emulation.cut_check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    [kernels] = report["parts"]
    assert (kernels["name"], kernels["verdict"]["status"], report["num_wanted"]) == ("kernels", "pass", 2), done.stderr
    assert (kernels["verdict"]["figures"]["done"], kernels["verdict"]["figures"]["of"]) == (12, 12)


def signatures(package: Path) -> dict[str, ast.arguments]:
    """Return the arguments of a package's functions and methods, by name."""
    found = {}
    for path in package.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = node.args
            elif isinstance(node, ast.ClassDef):
                found |= {
                    f"{node.name}.{each.name}": each.args for each in node.body if isinstance(each, ast.FunctionDef)
                }
    return found


def names(arguments: ast.arguments) -> dict[str, str]:
    """Return by name each argument's default, empty for one that has none."""
    plain = arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(plain, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return {argument.arg: "" if default is None else ast.unparse(default) for argument, default in pairs}


def test_stand_ins_have_the_signatures_of_the_real_package() -> None:
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("flashinfer is not installed")
    real = signatures(Path(spec.submodule_search_locations[0]))
    for folder in ("norm", "mla/_batch_mla"):
        real |= signatures(Path(spec.submodule_search_locations[0]) / folder)
    real["BatchDecodeWithPagedKVCacheWrapper.plan"] = real["BatchDecodeWithPagedKVCacheWrapper._plan_impl"]
    real["_Wrapper.run"] = real["BatchDecodeWithPagedKVCacheWrapper.run"]
    real["_Wrapper.reset_workspace_buffer"] = real["BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer"]
    public = {name: found for name, found in signatures(STAND_INS / "flashinfer").items() if name in real}
    assert len(public) == 18, sorted(public)
    for name, arguments in public.items():
        theirs, ours = names(real[name]), names(arguments)
        assert ours.items() <= theirs.items(), name
        positional = [argument.arg for argument in arguments.args]
        assert positional == [argument.arg for argument in real[name].args][: len(positional)], name
