"""What a run of the GPU's proofs found: a verdict for each part, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json

Status = Literal["pass", "fail", "skipped"]
_STYLES = {"pass": "green", "fail": "red", "skipped": "yellow"}


@dataclass(slots=True, frozen=True)
class Verdict:
    status: Status
    reason: str  # in a few words: what was found, or why not
    figures: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class PartResult:
    name: str
    about: str
    verdict: Verdict
    elapsed_s: float
    limit_s: float  # what it might have taken


@dataclass(slots=True, frozen=True)
class GpuReport:
    facts: Mapping[str, str]  # the card, its driver, and what is installed
    elapsed_s: float
    parts: tuple[PartResult, ...]
    environment: Environment
    num_wanted: int = 0  # parts: more than there are where the run was cut

    @property
    def num_failed(self) -> int:
        return self._count("fail")

    @property
    def is_proven(self) -> bool:
        """A part passed and none failed: who skips all of them has proven nothing."""
        return self._count("pass") > 0 and not self.num_failed

    def _count(self, status: Status) -> int:
        return sum(part.verdict.status == status for part in self.parts)


def print_gpu(report: GpuReport, console: Console) -> None:
    for name, value in report.facts.items():
        console.print(f"{name:18} {value}", markup=False, highlight=False)
    table = Table()
    for column in ("part", "verdict", "s", "of"):
        table.add_column(column, justify="right" if column in ("s", "of") else "left")
    table.add_column("found", overflow="fold")
    for part in report.parts:
        verdict = part.verdict
        table.add_row(
            part.name,
            f"[{_STYLES[verdict.status]}]{verdict.status}[/]",
            f"{part.elapsed_s:.0f}",
            f"{part.limit_s:.0f}",
            verdict.reason.replace("[", r"\["),
        )
    console.print(table)
    console.print(f"{len(report.parts)} parts in {report.elapsed_s:.0f} s, {report.num_failed} failed", highlight=False)


def write_gpu(report: GpuReport, path: Path) -> None:
    save_json(asdict(report), path)
