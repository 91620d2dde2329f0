"""Figures on disk. Alone in a module: a part of the GPU check may have nothing but the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def save_json(body: Mapping[str, object], path: Path) -> None:
    """Write all or nothing, as `write_whole` does."""
    write_whole((json.dumps(body, indent=1) + "\n").encode(), path)


def write_whole(content: bytes, path: Path) -> None:
    """Write all or nothing, for whoever writes may be killed, and a disk may be full. A folder that is missing is made.

    What is there and no file of its own, as /dev/null, a pipe or a link, is written to: a rename would put a file in
    its place. So is a file whose folder takes no other one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    is_other = path.is_symlink() or (path.exists() and not path.is_file())
    if is_other or not os.access(path.parent, os.W_OK):
        path.write_bytes(content)
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
