"""A program of checks: each says what it found or raises, and one that fails does not keep the others from running.

What was found is written after each check, with the number of all: a program that is killed leaves what it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console

from kvferry.tools.load.json_file import save_json

_MAX_ERROR_CHARS = 600


@dataclass(slots=True, frozen=True)
class Check:
    name: str
    is_ok: bool
    found: str  # in a few words; of a check that failed: the error
    elapsed_s: float


def run_check(name: str, check: Callable[[], str], console: Console) -> Check:
    began_s = perf_counter()
    try:
        found, is_ok = check(), True
    except Exception as error:  # whatever a library raises is this check's finding
        found, is_ok = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS], False
    done = Check(name, is_ok, found, round(perf_counter() - began_s, 1))
    console.print(f"{'ok  ' if is_ok else 'FAIL'} {name}: {found} ({done.elapsed_s:g} s)", markup=False, soft_wrap=True)
    return done


def run_checks(path: Path, named: Mapping[str, Callable[[], str]], console: Console) -> list[Check]:
    """Run every check in turn, and write to `path` after each."""
    checks: list[Check] = []
    for name, check in named.items():
        checks.append(run_check(name, check, console))
        write_checks(path, checks, {}, wanted=len(named))
    return checks


def write_checks(
    path: Path, checks: Sequence[Check], figures: Mapping[str, object], *, wanted: int | None = None
) -> None:
    """`wanted`: how many there will be; None: these are all."""
    body = {"done": len(checks), "of": len(checks) if wanted is None else wanted}
    save_json({**body, "checks": [asdict(check) for check in checks], **figures}, path)
