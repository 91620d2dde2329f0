"""Ends a program of ours: at once, when everything of its own is closed."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn

from .lines import drain


def exit_process(code: int) -> NoReturn:
    """End this process without the interpreter's own end.

    That would take a second to take the libraries apart, and wait for every thread, though one may be within a call of
    the system that does not return: a name is being resolved, a file of a mount that hangs is being opened.
    """
    drain()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # whoever started us may have closed it
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)
