"""A program of checks: each says what it found or raises, and one that fails does not keep the others from running."""

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


def write_checks(path: Path, checks: Sequence[Check], figures: Mapping[str, object]) -> None:
    save_json({"checks": [asdict(check) for check in checks], **figures}, path)
