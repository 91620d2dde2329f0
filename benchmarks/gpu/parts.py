"""The GPU's proofs, one part each: a program of its own, what it needs, its share of the time, and how it is judged.

A part's program writes what it found to a file that its command names. Exit codes and files are read here and nowhere
else: the parts know nothing of each other.
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import kvferry
from kvferry.benchmarks.gpu.report import Verdict

ROOT = Path(kvferry.__file__).resolve().parent
_ENGINE = (
    *("msgspec", "pydantic", "structlog", "numpy", "safetensors", "blake3", "httptools", "yaml"),
    *("flashinfer", "tvm_ffi", "toolkit"),
)
_SERVER = (
    *_ENGINE,
    *("nixl", "fastapi", "uvicorn", "uvloop", "httpx", "jinja2", "typer", "tokenizers", "prometheus_client"),
    *("psutil", "xxhash", "llguidance", "python_multipart"),
)
# When its time is up pytest is asked to end: as by Ctrl-C, so that it still writes what it has found.
_RUN_PYTEST = (
    "import signal, sys, pytest; signal.signal(signal.SIGTERM, signal.default_int_handler); sys.exit(pytest.main())"
)


@dataclass(slots=True, frozen=True)
class Finished:
    """A part's program is over."""

    returncode: int | None  # None: it was ended when its time was up
    output: Path  # where it was told to write
    log_tail: str
    limit_s: float

    def body(self) -> dict[str, object] | None:
        """The JSON that it wrote, if it did."""
        try:
            value = json.loads(self.output.read_text())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None


@dataclass(slots=True, frozen=True)
class Part:
    name: str
    about: str
    share: float  # of the whole time
    needs: tuple[str, ...]  # modules and programs
    command: Callable[[Path], list[str]]  # given the file to write to
    judge: Callable[[Finished], Verdict]


def _module(name: str, *flags: str) -> Callable[[Path], list[str]]:
    return lambda output: [sys.executable, "-m", f"kvferry.benchmarks.{name}", *flags, "--json", str(output)]


def _pytest(output: Path) -> list[str]:
    """Only files with tests for a GPU: the others may need what is not installed here."""
    files = [str(path) for path in gpu_test_files(ROOT / "tests")]
    # A library's warning on a machine that is not ours to set up is no failure of ours.
    flags = ["-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-rs", f"--junitxml={output}"]
    settings = [f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    return [sys.executable, "-c", _RUN_PYTEST, *settings, *flags, *files]


def gpu_test_files(tests: Path) -> list[Path]:
    return [path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]


def judge_checks(finished: Finished) -> Verdict:
    """A program of checks: {"done", "of", "checks": [{"name", "is_ok", "found"}], …}."""
    body = finished.body()
    checks = body.get("checks") if body is not None else None
    if body is None or not isinstance(checks, list) or not checks:
        return _without_result(finished)
    told = [f"{check['name']}: {check['found']}" for check in checks]
    if _is_cut(body):
        return Verdict("fail", "; ".join([_cut(finished, body, "checks"), *told]), body)
    bad = [line for line, check in zip(told, checks, strict=True) if not check["is_ok"]]
    if bad or finished.returncode != 0:
        return Verdict("fail", "; ".join(bad) or _ending(finished), body)
    return Verdict("pass", "; ".join(told), body)


def judge_engine(finished: Finished) -> Verdict:
    """`engine --check`: ratios to the floors, and the bars that were missed."""
    body = finished.body()
    if body is None or not (_is_cut(body) or finished.returncode in (0, 1)):
        return _without_result(finished)
    cases, misses = body["cases"], body["misses"]
    assert isinstance(cases, list) and isinstance(misses, list)
    told = ", ".join(f"{case['name']} {case['ratio']:.2f} x floor" for case in cases)
    if _is_cut(body):
        return Verdict("fail", "; ".join([_cut(finished, body, "cases"), *map(str, misses), told]), body)
    if misses or finished.returncode != 0:
        return Verdict("fail", "; ".join(map(str, misses)) or _ending(finished), body)
    return Verdict("pass", told, body)


def judge_handoff(finished: Finished) -> Verdict:
    """`handoff`: its exit code says whether its bars were met."""
    body = finished.body()
    if body is None:
        return _without_result(finished)
    if _is_cut(body):
        return Verdict("fail", f"{_cut(finished, body, 'results')}: {_last_line(finished)}", body)
    if finished.returncode != 0:
        return Verdict("fail", f"{_ending(finished)}: {_last_line(finished)}", body)
    return Verdict("pass", "figures in the JSON", body)


def judge_tests(finished: Finished) -> Verdict:
    """pytest's XML."""
    try:
        suite = ElementTree.parse(finished.output).getroot().find("testsuite")
    except (OSError, ElementTree.ParseError):
        suite = None
    if suite is None:
        return _without_result(finished)
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    num_passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    counts["passed"] = num_passed
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons = sorted({element.get("message", "") for element in suite.iter("skipped")})
    told = f"{num_passed} passed" + (f", {counts['skipped']} skipped ({'; '.join(reasons)})" if reasons else "")
    figures: dict[str, object] = {**counts, "failed": bad, "skipped_because": reasons}
    if bad:
        return Verdict("fail", f"{told}, failed: {', '.join(bad)}", figures)
    if num_passed == 0 and finished.returncode == 0:
        return Verdict("skipped", f"no test ran: {told}", figures)
    if finished.returncode != 0:
        return Verdict("fail", f"{_ending(finished)}: {told}", figures)
    return Verdict("pass", told, figures)


def _is_cut(body: Mapping[str, object]) -> bool:
    """Tell whether the program ended before all that it says it would do."""
    return body.get("done") != body.get("of")


def _cut(finished: Finished, body: Mapping[str, object], what: str) -> str:
    return f"{body['done']} of {body['of']} {what}, then cut ({_ending(finished)})"


def _without_result(finished: Finished) -> Verdict:
    return Verdict("fail", f"{_ending(finished)}, without a result: {_last_line(finished)}", {"log": finished.log_tail})


def _ending(finished: Finished) -> str:
    if finished.returncode is None:
        return f"not done after {finished.limit_s:.0f} s"
    return f"exit code {finished.returncode}"


def _last_line(finished: Finished) -> str:
    lines = [line.strip() for line in finished.log_tail.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


# The first compiles what all others find in FlashInfer's cache: 80 to 90 s on sixteen cores by estimate, none where it
# is prebuilt, and then the others have its time. The tests come early: where numbers are wrong, no figure counts.
PARTS = (
    Part("build", "FlashInfer's native modules, compiled all at once", 95, _ENGINE, _module("gpu.build"), judge_checks),
    Part(
        "kernels",
        "attention, norms, rotation, activation and sampling on the card against torch in float32",
        35,
        _ENGINE,
        _module("gpu.kernels"),
        judge_checks,
    ),
    Part("tests", "the tests with the marker gpu", 80, (*_ENGINE, "pytest", "pytest_asyncio"), _pytest, judge_tests),
    Part(
        "engine",
        "steps of a Llama-3-8B with random weights against their floors",
        100,
        _ENGINE,
        _module(
            "engine",
            *("--check", "--device", "cuda", "--shape", "llama-3-8b", "--max-case-seconds", "8"),
            *("--decode", "1@128,1@128+4,1@32000,1@32000+4,8@512,8@512+4,64@4096", "--prefill", "512,2048,8192,32000"),
        ),
        judge_engine,
    ),
    Part(
        "handoff",
        "KV between two processes on the card",
        35,
        (*_ENGINE, "nixl", "psutil", "xxhash", "kvferry.benchmarks.handoff"),
        _module("handoff", "--device", "cuda"),
        judge_handoff,
    ),
    Part(
        "exposed",
        "a prefill and a decode worker on the card: the part of the handoff that a reader waits for",
        85,
        _SERVER,
        _module("gpu.serve", "exposed", "--device", "cuda"),
        judge_checks,
    ),
    Part(
        "tokens",
        "greedy answers of the same two workers against float32",
        50,
        _SERVER,
        _module("gpu.serve", "tokens", "--device", "cuda"),
        judge_checks,
    ),
)
