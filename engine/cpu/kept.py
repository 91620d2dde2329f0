"""Keeps compiled libraries where nobody else can put one: what a library says, the process that loads it does.

    CACHE/native/*.so             folder and files are ours or root's, and nobody else may write them
    else TMP/kvferry-native-UID   the same, for as long as what is temporary stays
    else                          a folder of this process alone, gone once it is loaded

A library that is another user's, or that does not load, is built anew in its place.
"""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
from pathlib import Path

import structlog

from .compiler import CannotKeep, NativeUnavailable, compiled, library_path

log = structlog.get_logger(__name__)

_FOLDER = "native"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_Mark = tuple[int, ...]


def load_kept(cache: Path, isa: str, compiler: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library that is kept, built now if it is missing. Raises NativeUnavailable."""
    try:
        return _load(_made_folder(cache / _FOLDER), isa, compiler)
    except CannotKeep as reason:
        temporary = _instead_of_cache(reason)
    try:
        return _load(_made_folder(temporary / f"kvferry-{_FOLDER}-{os.geteuid()}"), isa, compiler)
    except CannotKeep as reason:
        log.warning("native_code_not_kept", reason=str(reason), instead_in=str(temporary))
    try:
        with tempfile.TemporaryDirectory(prefix="kvferry-native-") as own:
            return opened(compiled(isa, compiler, Path(own)))  # what is loaded outlives its file
    except OSError as error:
        raise NativeUnavailable(f"there is no folder to build in: {error}") from error


def _instead_of_cache(reason: CannotKeep) -> Path:
    """Return the folder of what is temporary. Raises NativeUnavailable: all file systems may be for reading alone."""
    try:
        temporary = tempfile.gettempdir()
    except OSError as error:
        raise NativeUnavailable(f"{reason}, and elsewhere neither: {error}") from error
    log.warning("native_code_not_kept", reason=str(reason), instead_in=temporary)
    return Path(temporary)


def is_kept(cache: Path, isa: str, compiler: tuple[str, ...]) -> bool:
    """Tell whether the library is there, and would be loaded. Raises NativeUnavailable."""
    library = library_path(isa, compiler, cache / _FOLDER)
    try:
        _check_folder(library.parent)
    except (CannotKeep, OSError):
        return False
    return _is_safe_file(library)


def why_not_kept(cache: Path) -> str:
    """Say why a library that is not there will not be kept in the cache; empty: it will be. Makes nothing."""
    folder = cache / _FOLDER
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if there == folder and not _is_ours_to_close(folder.lstat()):
            _check_folder(folder)
        else:
            _check_mount(there)
        tempfile.TemporaryFile(dir=there).close()  # tried, as root may write everywhere by what `access` says
    except CannotKeep as reason:
        return str(reason)
    except OSError as error:
        return f"{folder} cannot be made or written to: {error.strerror or error}"
    return ""


def opened(path: Path) -> ctypes.CDLL:
    """Load a library. Raises NativeUnavailable: the folder may not be for programs, or the file not whole."""
    try:
        return ctypes.CDLL(str(path.absolute()))  # a name without a folder is looked for elsewhere
    except OSError as error:  # which names the file
        raise NativeUnavailable(f"the library cannot be loaded: {error}") from error


def _load(folder: Path, isa: str, compiler: tuple[str, ...]) -> ctypes.CDLL:
    is_there = False

    def accepts(path: Path) -> bool:
        nonlocal is_there
        is_there = _is_safe_file(path)
        return is_there

    library = compiled(isa, compiler, folder, accepts=accepts)
    mark = _mark(library)
    try:
        return opened(library)
    except NativeUnavailable as reason:  # as of a file that a power cut left empty
        if not is_there:  # it was built just now
            raise
        log.warning("native_code_rebuilt", reason=str(reason))
    # Others may find the same, and one of them builds: what is there then is another file, which is taken.
    return opened(compiled(isa, compiler, folder, accepts=lambda path: _is_safe_file(path) and _mark(path) != mark))


def _mark(path: Path) -> _Mark | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _made_folder(folder: Path) -> Path:
    """Return the folder of libraries, made if need be. Raises CannotKeep."""
    try:
        for each in (folder.parent, folder):  # root's may be read by those who run in a container that root built
            each.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_ours_to_close(found := folder.lstat()):  # what others could write in it is built anew
            folder.chmod(stat.S_IMODE(found.st_mode) & ~_OTHERS_WRITE)
        _check_folder(folder)
    except OSError as error:
        raise CannotKeep(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def _check_folder(folder: Path) -> None:
    """Raises CannotKeep for a folder in which others could put a library, or that is not for programs.

    OSError where there is none.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CannotKeep(f"{folder} is not a folder")
    if not _is_safe(found):
        raise CannotKeep(
            f"{folder} is of user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: others could put there "
            "what is run here; remove it, or set KVFERRY_CACHE to a folder of your own"
        )
    _check_mount(folder)


def _is_ours_to_close(found: os.stat_result) -> bool:
    """Tell whether it is a folder of ours that is open to others, as volumes are to a group from each mount on."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not _is_safe(found)


def _check_mount(folder: Path) -> None:
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise CannotKeep(f"{folder} is on a mount without programs (noexec)")


def _is_safe_file(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and _is_safe(found)


def _is_safe(found: os.stat_result) -> bool:
    """Tell whether nobody but us and root could have written it."""
    return found.st_uid in (os.geteuid(), 0) and not found.st_mode & _OTHERS_WRITE
