"""The end of a program that has measured something: its files are saved, then its figures are shown."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

SavedFile = tuple[Path | None, Callable[[Path], None]]  # None: nobody wants it


def deliver(program: str, files: Sequence[SavedFile], show: Callable[[], None]) -> int:
    """Save every file, then show, and return the exit code: 0; 2: something could not be written; 1: nobody reads.

    What cannot be written is told in a line, and the rest is still tried: to measure it again may take an hour.
    """
    code = 0
    for path, save in files:
        try:
            if path is not None:
                save(path)
        except OSError as error:
            code = _tell(program, str(path), error)
    try:
        show()
        sys.stdout.flush()
    except OSError as error:
        _leave_output()
        code = 1 if isinstance(error, BrokenPipeError) else _tell(program, "standard output", error)
    return code


def _tell(program: str, where: str, error: OSError) -> int:
    print(f"{program}: {where} cannot be written: {error.strerror or error}", file=sys.stderr)
    return 2


def _leave_output() -> None:
    """Send what is still buffered to nowhere: at the interpreter's end it would fail once more."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
