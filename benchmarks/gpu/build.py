"""Compiles FlashInfer's native modules, all at once, before the proofs that need them.

    python -m kvferry.benchmarks.gpu.build --json FILE

One after another, as a worker asks for them, they take minutes: compiling for one architecture takes 4 to 70 s of one
core for each of some thirty parts. Prebuilt ones (`kit.py`) are taken as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from kvferry.benchmarks.gpu.modules import build
from kvferry.benchmarks.shared.checks import run_checks


def build_all() -> str:
    built = build()
    absent = [name for name, (_, library) in built.items() if not library.exists()]
    assert not absent, f"not built: {', '.join(absent)}"
    prebuilt = sum("aot" in library.parts for _, library in built.values())
    return f"{len(built)} modules are there, {prebuilt} of them prebuilt"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvferry.benchmarks.gpu.build")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    flags = parser.parse_args(argv)
    checks = run_checks(flags.json, {"build": build_all}, Console(stderr=True))
    return 0 if all(check.is_ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
