"""Keys that were given as flags leave the command line: every user of a machine can read those of all processes.

The program replaces itself with the same one, whose keys are in its environment: that its own user alone can read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from ..common.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, environment

_VARIABLES = {"--api-key": API_KEY_VARIABLE, "--admin-key": ADMIN_KEY_VARIABLE}


def hide_keys() -> None:
    """Start this program anew without the keys in its arguments, if there are any."""
    words, found = split_keys(sys.argv[1:])
    if found:
        num_own = len(sys.argv) - 1  # the interpreter's arguments stand before them
        before = sys.orig_argv[1 : len(sys.orig_argv) - num_own]
        os.execve(sys.executable, [sys.executable, *before, *words], {**environment(), **found})


def split_keys(words: Sequence[str]) -> tuple[list[str], Mapping[str, str]]:
    """The arguments without keys, and the variables that hold these. What is no key stays, to be told what is wrong."""
    rest: list[str] = []
    found: dict[str, list[str]] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in _VARIABLES or (not equals and not waiting):
            rest.append(word)
            continue
        if not equals:
            value = waiting.pop(0)
        if "," in value or value != value.strip() or not value:
            rest += [flag, value]
        else:
            found.setdefault(_VARIABLES[flag], []).append(value)
    return rest, {variable: ",".join(values) for variable, values in found.items()}
