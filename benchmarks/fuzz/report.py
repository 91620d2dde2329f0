"""What a fuzz run found: tables beside the bars, and a JSON file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvferry.benchmarks.fuzz.frames import FuzzResult
from kvferry.tools.load.environment import Environment
from kvferry.tools.load.json_file import save_json
from kvferry.tools.load.report import milliseconds
from kvferry.tools.load.stats import Distribution

MAX_GROWTH = 0.05
MAX_LIVE_P99_MS = 50.0


@dataclass(slots=True, frozen=True)
class AttackResult:
    """One attack, and what /live took meanwhile."""

    name: str
    live_ms: Distribution
    num_failed_polls: int
    num_streams: int  # of another tenant; the broken ones are among the failures
    outcomes: dict[str, int]
    failures: tuple[str, ...]
    rss_before_bytes: int
    rss_after_bytes: int

    @property
    def is_met(self) -> bool:
        p99 = self.live_ms.p99
        return p99 is not None and p99 <= MAX_LIVE_P99_MS and not self.num_failed_polls and not self.failures


@dataclass(slots=True, frozen=True)
class FuzzReport:
    fuzzed: tuple[FuzzResult, ...]
    attacks: tuple[AttackResult, ...]
    quiet_live_ms: Distribution  # before the attacks
    environment: Environment

    @property
    def is_met(self) -> bool:
        return all(map(is_met, self.fuzzed)) and all(attack.is_met for attack in self.attacks)


def is_met(result: FuzzResult) -> bool:
    return not result.failures and result.growth <= MAX_GROWTH


def print_fuzz(report: FuzzReport, console: Console) -> None:
    if report.fuzzed:
        console.print(_fuzz_table(report.fuzzed))
    if report.attacks:
        console.print(_attack_table(report))
    for name, failure in _failures(report):
        console.print(f"{name}: {failure}", markup=False, style="red", soft_wrap=True)


def write_fuzz(report: FuzzReport, path: Path) -> None:
    body = {
        "bars": {"max_rss_growth": MAX_GROWTH, "max_live_p99_ms": MAX_LIVE_P99_MS, "failures": 0},
        "is_met": report.is_met,
        "fuzzed": [_fuzzed_as_json(result) for result in report.fuzzed],
        "quiet_live_ms": asdict(report.quiet_live_ms),
        "attacks": [{**asdict(attack), "is_met": attack.is_met} for attack in report.attacks],
        "environment": asdict(report.environment),
    }
    save_json(body, path)


def _fuzzed_as_json(result: FuzzResult) -> dict[str, object]:
    plain = replace(result, outcomes=Counter())  # asdict cannot copy a counter
    return {**asdict(plain), "outcomes": result.outcomes, "growth": result.growth, "is_met": is_met(result)}


def _fuzz_table(results: Sequence[FuzzResult]) -> Table:
    table = Table(title=f"fuzz; bars: 0 failures, memory +{MAX_GROWTH:.0%}", title_justify="left")
    for name in ("target", "sent", "taken", "failures", "memory", "growth", "met"):
        table.add_column(name, justify="left" if name == "target" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.num_sent:,}",
            f"{result.num_accepted:,}",
            str(result.outcomes["failed"]),
            f"{result.rss_after_bytes / 2**20:.0f} MiB" if result.rss_after_bytes else "",
            f"{result.growth:+.1%}" if result.rss_after_bytes else "",
            "yes" if is_met(result) else "NO",
        )
    return table


def _attack_table(report: FuzzReport) -> Table:
    quiet = milliseconds(report.quiet_live_ms.p99)
    table = Table(
        title=f"/live under attack, ms; bar: p99 <= {MAX_LIVE_P99_MS:g} (quiet: {quiet})", title_justify="left"
    )
    for name in ("attack", "p50", "p99", "max", "polls", "failed", "streams", "memory", "answers", "met"):
        table.add_column(name, justify="left" if name in ("attack", "answers") else "right")
    for attack in report.attacks:
        live = attack.live_ms
        table.add_row(
            attack.name,
            milliseconds(live.p50),
            milliseconds(live.p99),
            milliseconds(live.max),
            str(live.count),
            str(attack.num_failed_polls),
            str(attack.num_streams),
            f"{attack.rss_after_bytes / 2**20:.0f} MiB",
            ", ".join(f"{name}: {count:,}" for name, count in sorted(attack.outcomes.items())),
            "yes" if attack.is_met else "NO",
        )
    return table


def _failures(report: FuzzReport) -> list[tuple[str, str]]:
    fuzzed = [(result.name, failure) for result in report.fuzzed for failure in result.failures]
    return fuzzed + [(attack.name, failure) for attack in report.attacks for failure in attack.failures]
