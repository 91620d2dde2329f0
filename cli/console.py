"""A console for what commands show: as wide as a terminal, and wide enough for whole rows where there is none."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 160  # columns of a file or a pipe: rows of tables stay whole, so that `grep` finds all of one


def make_console() -> Console:
    """Return a console on standard output. COLUMNS says how wide it is, as for any terminal program."""
    from rich.console import Console

    is_told = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if is_told else WIDE)
