"""Routers and workers are found among processes by their names, however they were started."""

from __future__ import annotations

import re

import psutil

_FORKED = re.compile(r"^kvferry\.(?:router|worker) (\S+)$")  # a title in place of a command's words
_WORKER_ID = re.compile(r'"worker_id":"([^"]+)"')


def program_name(process: psutil.Process) -> str | None:
    """Return the name of a router or worker: a worker's is its id, `p-0` or `d-0`. None: it is neither.

    Raises psutil.Error: it has ended.
    """
    words = " ".join(process.cmdline()).rstrip()
    if forked := _FORKED.search(words):
        return forked[1]
    if "--config-json" not in words:
        return None
    worker = _WORKER_ID.search(words)
    return worker[1] if worker else "router"
