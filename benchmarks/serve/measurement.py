"""One measurement: every system in turn, every cell in turn, and a report that grows with each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from kvferry.benchmarks.serve.client import Cell, ClientRun, failed_run, run_client, seed_of
from kvferry.benchmarks.serve.report import Row, ServeReport
from kvferry.benchmarks.shared.peers import SYSTEMS, RunningSystem, Setup
from kvferry.common.errors import ConfigError
from kvferry.tools.load.cores import processes
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.report import milliseconds

LONG_INPUT_LEN = 16384  # a longer prompt takes a server minutes: one run of it, and none on half of the cores
_NOT_FOR_LONG = ("vllm-pd", "vllm-pd-shared")


@dataclass(slots=True, frozen=True)
class Plan:
    """What is measured."""

    systems: tuple[str, ...]
    cells: tuple[Cell, ...]
    num_runs: int
    num_rounds: int
    seed: int
    timeout_s: float
    quiet_limit_s: float
    quiet_sample_s: float = 1.0
    has_long_split: bool = False  # long prompts to a split peer, too

    def cells_of(self, system: str) -> list[Cell]:
        takes_long = self.has_long_split or system not in _NOT_FOR_LONG
        return [cell for cell in self.cells if takes_long or cell.input_len <= LONG_INPUT_LEN]

    def num_runs_of(self, cell: Cell) -> int:
        return self.num_runs if cell.input_len <= LONG_INPUT_LEN else 1


@dataclass(slots=True)
class Measurement:
    """Goes through the systems, and hands on a report that has grown after each cell."""

    plan: Plan
    setup: Setup
    environment: Environment
    report: ServeReport
    save: Callable[[ServeReport], None]
    console: Console
    runs: dict[tuple[str, str], list[ClientRun]] = field(default_factory=dict)  # of this measurement
    rows: set[tuple[str, str]] = field(default_factory=set)  # that this measurement has written

    @property
    def is_clean(self) -> bool:
        return all(run.is_clean for runs in self.runs.values() for run in runs)

    def run(self) -> None:
        for round_number in range(self.plan.num_rounds):
            for name in self.plan.systems:
                self._run_system(name, round_number)

    def _run_system(self, name: str, round_number: int) -> None:
        """One that does not start, or is gone, has failed runs in the cells that it did not come to."""
        waiting = self.plan.cells_of(name)
        if not waiting:
            return
        self._say(f"{name}: starting")
        about = name
        try:
            with SYSTEMS[name](self.setup) as system:
                about = system.about
                while waiting:
                    _check_alive(system, name)
                    self._add(name, about, waiting[0], self._run_cell(system, name, waiting[0], round_number))
                    waiting.pop(0)
        except ConfigError as error:
            self.console.print(f"{name}: {error}", markup=False, style="red", soft_wrap=True)
            for cell in waiting:
                seed = seed_of(self.plan.seed, cell, round_number, 0)
                self._add(name, about, cell, [failed_run(cell, round_number, seed, str(error))], has_come=False)

    def _run_cell(self, system: RunningSystem, name: str, cell: Cell, round_number: int) -> list[ClientRun]:
        runs = []
        for run_number in range(self.plan.num_runs_of(cell)):
            run = run_client(
                system,
                self.setup,
                cell,
                label=f"{name}-{str(cell).replace('/', '-')}-{round_number}-{run_number}",
                round_number=round_number,
                seed=seed_of(self.plan.seed, cell, round_number, run_number),
                timeout_s=self.plan.timeout_s,
                quiet_limit_s=self.plan.quiet_limit_s,
                quiet_sample_s=self.plan.quiet_sample_s,
            )
            runs.append(run)
            self._say(f"{name} {cell}, run {run_number + 1}: {_in_words(run)}")
        return runs

    def _add(self, name: str, about: str, cell: Cell, runs: Sequence[ClientRun], *, has_come: bool = True) -> None:
        """Replace the row. A clean one of an earlier measurement stays where the system did not come to its cell."""
        key = (name, str(cell))
        measured = self.runs.setdefault(key, [])
        measured += runs
        old = self.report.find(name, cell)
        if not has_come and old is not None and old.is_clean and key not in self.rows:
            self._say(f"{name} {cell}: not measured, the row of {old.environment.date} stays")
            return
        self.rows.add(key)
        self.report = self.report.with_row(Row(name, cell, about, self.environment, tuple(measured)))
        self.save(self.report)

    def _say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _check_alive(system: RunningSystem, name: str) -> None:
    table = processes()
    gone = [pid for pid in system.pids if pid not in table or table[pid].is_zombie]
    if gone:
        raise ConfigError(f"{name}: its process {gone[0]} has ended")


def _in_words(run: ClientRun) -> str:
    figures = (
        f"TTFT {milliseconds(run.median_ttft_ms)} ms, TPOT {milliseconds(run.median_tpot_ms)} ms, "
        f"{milliseconds(run.output_tokens_per_s)} tokens/s"
    )
    foreign = f", foreign {run.cores.foreign:.2f}" if run.cores else ""
    return figures + foreign + (f", {run.num_failed} FAILED: {'; '.join(run.problems)}" if not run.is_clean else "")
