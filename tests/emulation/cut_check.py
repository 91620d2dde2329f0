"""Runs two of gpu_check's parts on the emulated device, the second of which kills this program. Run by its test:

python -m kvferry.tests.emulation.cut_check FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from kvferry.benchmarks.gpu.parts import PARTS, Part, judge_checks
from kvferry.benchmarks.gpu.run import check

KILL = "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"


def emulated(part: Part, *more: str) -> Part:
    """The same program on the emulated device, which needs none of a GPU's packages."""

    def command(output: Path) -> list[str]:
        python, *words = part.command(output)
        return [python, "-m", "kvferry.tests.emulation", *words, *more]

    return replace(part, needs=(), command=command)


def main(folder: Path) -> None:
    kernels = next(part for part in PARTS if part.name == "kernels")
    killer = Part("killer", "", kernels.share, (), lambda output: [sys.executable, "-c", KILL], judge_checks)
    parts = [emulated(kernels, "--vocab-size", "2000"), killer]
    check(parts, 600.0, folder, [], dict(os.environ), Console(stderr=True), folder / "gpu.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
