"""What the programs here have in common: where their results lie, lists of names among their flags, how they end.

Exit codes: 0; 1: a bar is missed (of a program that has `--check`: where that is given); 2: nothing can be judged, as a
setting is wrong or what was asked for cannot be measured, which is told in one line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from rich.console import Console

from kvferry.common.errors import KVFerryError

RESULTS_DIR = Path(__file__).resolve().parents[1] / "results"  # the checkout's, whatever folder a program is run in

_P = ParamSpec("_P")


def telling_errors(program: str) -> Callable[[Callable[_P, int]], Callable[_P, int]]:
    """Decorate a `main`: an error of ours is told, and the exit code is 2."""

    def decorate(main: Callable[_P, int]) -> Callable[_P, int]:
        @wraps(main)
        def telling_main(*args: _P.args, **kwargs: _P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except KVFerryError as error:
                Console(stderr=True).print(f"{program}: {error}", markup=False, style="red", soft_wrap=True)
                return 2

        return telling_main

    return decorate


def names_of(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """Return the type, for argparse, of names with commas between them that all have to be known."""
    choices = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(choices)}")
        return names

    return parse
