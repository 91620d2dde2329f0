"""Folders and open files of what is kept."""

from __future__ import annotations

import resource
from pathlib import Path

from ...common.errors import ConfigError


def make_folder(path: Path) -> None:
    """Make a folder for this user alone, in that of the answers. Raises ConfigError where that cannot be."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"answers_dir: cannot make {path}: {error.strerror or error}") from error


def share_of_open_files(share: int) -> int:
    """Return how many files of a kind may be open at once, one in `share` of all: connections need the others."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // share)
