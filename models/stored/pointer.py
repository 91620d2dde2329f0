"""Git LFS leaves a small file in the place of one that is not fetched yet: it is told by how it begins."""

from __future__ import annotations

from pathlib import Path

from ...common.errors import ConfigError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # its docs/spec.md


def refuse_pointer(path: Path, beginning: bytes) -> None:
    """Raise ConfigError where a file that begins so is a pointer of Git LFS, with what brings the file itself."""
    if beginning.startswith(LFS_POINTER):
        raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder")
