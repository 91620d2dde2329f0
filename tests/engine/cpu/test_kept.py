"""A compiled library is kept where nobody else can put one, and is built anew where that cannot be, or it is no use.

A stand-in for the compiler takes what the real one made; `BUILDS` has a line for each link.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from kvferry.engine.cpu import build, compiler, kept
from kvferry.engine.cpu.compiler import CannotKeep, NativeUnavailable
from kvferry.models.default import cache_dir

from .widened import WIDENED

# With NO_STATIC it has no static C++ library, as where that is in a package of its own.
STAND_IN = """
import os, sys
words = sys.argv[1:]
if "-c" in words:
    open(words[words.index("-o") + 1], "w").close()
elif "-o" in words:
    with open(os.environ["BUILDS"], "a") as file:
        print(*words, file=file)
    if os.environ.get("NO_STATIC") and "-static-libstdc++" in words:
        sys.exit("cannot find -lstdc++")
    with open(os.environ["MADE"], "rb") as made, open(words[words.index("-o") + 1], "wb") as library:
        library.write(made.read())
"""


class Site:
    """A cache below `folder`, and what has been built."""

    def __init__(self, folder: Path) -> None:
        self.cache, self._builds = folder / "cache", folder / "builds"
        self.temporary = folder / "temporary"

    @property
    def builds(self) -> list[str]:
        return self._builds.read_text().splitlines() if self._builds.exists() else []

    def load(self) -> Path:
        """Load the library; return where it was."""
        return Path(build.load(self.cache, WIDENED)._name)

    @property
    def second(self) -> Path:
        """Where it is kept while the cache is no place for it."""
        return self.temporary / f"kvferry-native-{os.geteuid()}"

    def library(self) -> Path:
        [found] = (self.cache / "native").iterdir()
        return found

    def empty_library(self) -> Path:
        """Leave an empty file where the library would be, which this process has not loaded: it would have it still."""
        library = compiler.library_path(WIDENED, compiler.find_compiler(), self.cache / "native")
        library.parent.mkdir(parents=True)
        library.touch(mode=0o755)
        return library


@pytest.fixture
def site(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = compiler.compiled(WIDENED, compiler.find_compiler(), cache_dir() / "native")
    stand_in = tmp_path / "cxx"
    stand_in.write_text(f"#!{sys.executable}\n{STAND_IN}")
    stand_in.chmod(0o755)
    monkeypatch.setenv("MADE", str(made))
    monkeypatch.setenv("BUILDS", str(tmp_path / "builds"))
    monkeypatch.setattr(compiler, "_COMPILERS", (str(stand_in),))
    monkeypatch.setattr(compiler, "PREBUILT", tmp_path / "prebuilt")
    site = Site(tmp_path)
    site.temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(site.temporary))
    return site


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Let every user write what is made, unless its maker says otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("no_umask")
def test_nobody_else_can_write_what_is_made(site: Site) -> None:
    assert site.load() == site.library()
    assert _mode(site.cache) == 0o755
    assert not _mode(site.cache / "native") & 0o022 and not _mode(site.library()) & 0o022
    assert site.load() == site.library() and len(site.builds) == 1


def test_what_a_killed_build_left_is_deleted_by_the_next_one(site: Site) -> None:
    """Not at once: two machines may share the folder and not each other's locks."""
    left, another = (site.cache / "native" / f".kernels-{name}.abc" for name in ("left", "another"))
    for folder in (left, another):
        folder.mkdir(parents=True)
        (folder / "part.o").touch()
    os.utime(left, (0, 0))
    made = site.load()
    assert set(made.parent.iterdir()) == {made, another}


def test_a_folder_that_others_may_read_is_as_good(site: Site) -> None:
    site.cache.mkdir(mode=0o755)
    (site.cache / "native").mkdir(mode=0o755)
    assert site.load() == site.library()
    assert _mode(site.cache) == 0o755


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_a_shared_cache_has_a_folder_of_ours(site: Site, mode: int) -> None:
    site.cache.mkdir()
    site.cache.chmod(mode)
    assert site.load() == site.library()
    assert not _mode(site.cache / "native") & 0o022


@pytest.mark.parametrize("mode", [0o2775, 0o757])
def test_a_folder_of_ours_that_was_opened_to_others_is_closed(site: Site, mode: int) -> None:
    """As a volume is to a group with each mount, and all files in it: these are built anew."""
    library = site.load()
    (site.cache / "native").chmod(mode)
    assert site.load() == library and len(site.builds) == 1
    assert _mode(site.cache / "native") == mode & ~0o022
    (site.cache / "native").chmod(mode)
    library.chmod(0o775)
    assert site.load() == library and len(site.builds) == 2
    assert not _mode(library) & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, as root alone may")
def test_nothing_is_loaded_from_a_folder_in_which_others_may_write(site: Site) -> None:
    site.load()
    os.chown(site.cache / "native", 12345, -1)
    for _ in range(2):  # the second finds what the first has left
        with structlog.testing.capture_logs() as logs:
            assert site.load().parent == site.second
        [told] = logs
        assert told["event"] == "native_code_not_kept" and told["log_level"] == "warning"
        assert f"{site.cache}/native is of user 12345 with mode 0755: others could" in told["reason"]
    assert len(site.builds) == 2 and not _mode(site.second) & 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, as root alone may")
def test_where_nothing_can_be_kept_it_is_built_for_this_process(site: Site) -> None:
    for folder in (site.cache / "native", site.second):
        folder.mkdir(parents=True)
        os.chown(folder, 12345, -1)
    with structlog.testing.capture_logs() as logs:
        assert not site.load().exists()
    assert len(logs) == 2 and not list(site.temporary.glob("kvferry-native-*/*.so"))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user, as root alone may")
@pytest.mark.parametrize("user", [12345, 0])
def test_what_is_another_users_is_not_loaded_and_what_is_roots_is(
    site: Site, user: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.load()
    folder, library = site.cache / "native", site.library()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # who we are then
    os.chown(library, user, -1)
    assert site.load() == library
    assert library.stat().st_uid == 0 and len(site.builds) == (1 if user == 0 else 2)  # built in its place
    os.chown(folder, user, -1)
    assert site.load().parent == (folder if user == 0 else site.second)


def test_a_library_that_others_may_write_is_built_anew(site: Site) -> None:
    library = site.load()
    library.chmod(0o775)
    before = library.stat().st_ino
    assert site.load() == library
    assert library.stat().st_ino != before and not _mode(library) & 0o022 and len(site.builds) == 2


def test_a_link_is_no_library_and_no_folder(site: Site, tmp_path: Path) -> None:
    library = site.load()
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert site.load() == library and not library.is_symlink()
    (site.cache / "native").rename(tmp_path / "elsewhere")
    (site.cache / "native").symlink_to(tmp_path / "elsewhere")
    assert site.load().parent == site.second


def test_a_library_that_a_power_cut_left_empty_is_built_once_more(site: Site) -> None:
    library = site.empty_library()
    with structlog.testing.capture_logs() as logs:
        assert site.load() == library
    [told] = logs
    assert told["event"] == "native_code_rebuilt" and f"{library}: file too short" in told["reason"]
    assert site.load() == library and len(site.builds) == 1


def test_a_library_that_another_process_has_mended_is_not_built_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, open_library = site.empty_library(), kept.opened
    asked: list[Path] = []

    def opened(path: Path) -> ctypes.CDLL:
        asked.append(path)
        if len(asked) == 1:
            shutil.copyfile(os.environ["MADE"], path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
            raise NativeUnavailable("file too short")
        return open_library(path)

    monkeypatch.setattr(kept, "opened", opened)
    assert site.load() == library
    assert asked == [library, library] and not site.builds


def test_a_new_library_that_does_not_load_is_not_built_over_and_over(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_bytes(b"\x7fELF")
    monkeypatch.setenv("MADE", str(tmp_path / "broken"))
    with pytest.raises(NativeUnavailable, match=r"the library cannot be loaded: .*native/kernels-.*: file too short"):
        site.load()
    assert len(site.builds) == 1


def test_bytes_are_on_disk_before_the_library_has_its_name(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append(f"sync {os.fstat(fd).st_ino}")
        fsync(fd)

    def named(one: str, other: Path) -> None:
        done.append(f"name {os.stat(one).st_ino}")
        replace(one, other)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    inode = site.load().stat().st_ino
    assert done == [f"sync {inode}", f"name {inode}"]


# --- a cache that cannot be written -----------------------------------------------------------------------------------


def test_where_the_cache_cannot_be_made_it_is_kept_among_what_is_temporary(site: Site) -> None:
    site.cache.touch()  # a file, below which not even root makes a folder
    assert build.describe(site.cache, WIDENED).endswith(
        f"cxx, not kept in the cache: {site.cache}/native cannot be made or written to: Not a directory"
    )
    with structlog.testing.capture_logs() as logs:
        library = build.load(site.cache, WIDENED)
    assert library.kvferry_may_run() and Path(library._name).parent == site.second
    [told] = logs
    assert told["instead_in"] == str(site.temporary)
    assert told["reason"] == f"{site.cache}/native cannot be made: File exists"


def test_what_is_kept_is_found_where_nothing_can_be_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file systems are all for reading alone: Python finds no folder for what is temporary."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    kept_before = site.load()
    monkeypatch.setattr("tempfile.gettempdir", none)
    assert site.load() == kept_before and len(site.builds) == 1
    kept_before.unlink()
    monkeypatch.setattr(compiler, "_build", _refuse)
    with pytest.raises(NativeUnavailable, match=r"Read-only file system, and elsewhere neither: .*No usable temporary"):
        site.load()


def _refuse(command: tuple[str, ...], isa: str, library: Path, *, is_portable: bool) -> None:
    raise OSError(30, "Read-only file system")


def test_where_the_cache_is_full_it_is_kept_elsewhere(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    build_library = compiler._build

    def full(command: tuple[str, ...], isa: str, library: Path, *, is_portable: bool) -> None:
        if library.is_relative_to(site.cache):
            raise OSError(28, "No space left on device")
        build_library(command, isa, library, is_portable=is_portable)

    monkeypatch.setattr(compiler, "_build", full)
    assert site.load().parent == site.second


def test_where_programs_are_not_run_it_is_built_for_this_process(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.load()
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((0,) * 8 + (os.ST_NOEXEC, 255)))
    assert build.describe(site.cache, WIDENED).endswith("native is on a mount without programs (noexec)")
    assert not site.load().exists()


def test_where_nothing_can_be_written_at_all_the_reason_is_told(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    with pytest.raises(NativeUnavailable, match=r"there is no folder to build in: .*Not a directory"):
        site.load()


def test_what_is_kept_is_told_without_a_trial_and_nothing_is_made(site: Site, tmp_path: Path) -> None:
    told = f"{WIDENED}, built by {tmp_path}/cxx"
    assert build.describe(site.cache, WIDENED) == told
    assert not site.cache.exists() and len(site.builds) == 1  # a few lines were tried
    site.load()
    assert build.describe(site.cache, WIDENED) == told and len(site.builds) == 2
    (site.cache / "native").chmod(0o777)
    assert build.describe(site.cache, WIDENED) == told
    if os.geteuid() == 0:
        os.chown(site.cache / "native", 12345, -1)
        assert build.describe(site.cache, WIDENED).startswith(
            f"{told}, not kept in the cache: {site.cache}/native is of user"
        )


# --- a compiler without its static library ----------------------------------------------------------------------------


def test_without_a_static_library_the_shared_one_is_linked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_STATIC", "1")
    assert site.load() == site.library()
    static, shared = site.builds
    assert "-static-libstdc++" in static and "-static" not in shared


def test_a_library_for_others_is_linked_statically_or_not_at_all(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_STATIC", "1")
    with pytest.raises(NativeUnavailable, match=r"cannot find -lstdc\+\+"):
        compiler.compiled(WIDENED, (str(tmp_path / "cxx"),), tmp_path / "prebuilt", is_portable=True)
    assert not list((tmp_path / "prebuilt").iterdir())


def test_a_file_in_the_way_is_told_to_whoever_builds_a_wheel(site: Site, tmp_path: Path) -> None:
    with pytest.raises(CannotKeep, match=r"cannot be built: .*Not a directory"):
        compiler.compiled(WIDENED, (str(tmp_path / "cxx"),), tmp_path / "cxx" / "prebuilt", is_portable=True)
