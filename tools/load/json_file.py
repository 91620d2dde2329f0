"""Figures on disk. Alone in a module: a part of the GPU check may have nothing but the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def save_json(body: Mapping[str, object], path: Path) -> None:
    """Write all or nothing, for whoever writes may be killed. The folder is made where it is missing.

    What is there and no file, as /dev/null or a pipe, is written to: a rename would put a file in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(body, indent=1) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text)
    fresh.replace(path)
