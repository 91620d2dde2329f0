"""Figures on disk. Alone in a module: a part of the GPU check may have nothing but the standard library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def save_json(body: Mapping[str, object], path: Path) -> None:
    """The folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")
