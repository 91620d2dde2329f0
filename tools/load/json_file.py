"""Figures on disk. Alone in a module: a part of the GPU check may have nothing but the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def save_json(body: Mapping[str, object], path: Path) -> None:
    """Write all or nothing, for whoever writes may be killed. The folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(body, indent=1) + "\n")
    fresh.replace(path)
