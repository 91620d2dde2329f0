"""What the programs here have in common: how they begin and end, their parsers, where their results lie.

Exit codes: 0; 1: a bar is missed (of a program that has `--check`: where that is given); 2: nothing can be judged, as a
setting is wrong or what was asked for cannot be measured, which is told in one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from kvferry.common.errors import KVFerryError

RESULTS_DIR = Path(__file__).resolve().parents[1] / "results"  # the checkout's, whatever folder a program is run in


def benchmark(name: str) -> Callable[[Callable[[list[str]], int]], Callable[..., int]]:
    """Decorate a `main`: it gets the command line's words where it is given none, and an error of ours is told, as is a
    setting that an engine's config refuses.
    """

    def decorate(main: Callable[[list[str]], int]) -> Callable[..., int]:
        @wraps(main)
        def main_of_benchmark(argv: Sequence[str] | None = None) -> int:
            try:
                return main(list(sys.argv[1:] if argv is None else argv))
            except KVFerryError as error:
                reasons = [str(error)]
            except ValidationError as error:
                reasons = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
            Console(stderr=True).print(f"{name}: {'; '.join(reasons)}", markup=False, style="red", soft_wrap=True)
            return 2

        return main_of_benchmark

    return decorate


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of the program `name`, whose `--help` begins with its module's text."""
    return argparse.ArgumentParser(
        prog=f"python -m kvferry.benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type, for argparse, of names with commas between them that all have to be known."""
    choices = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}")
        return names

    return parse
