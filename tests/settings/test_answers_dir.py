"""A launcher's folder of answers is there while it runs, and no longer than until the next one starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvferry.settings.answers_dir import OwnAnswersDir

LAUNCHER = """
import signal
from kvferry.settings.answers_dir import OwnAnswersDir
print(OwnAnswersDir().path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def age(path: Path) -> None:
    os.utime(path, (time.time() - 3600,) * 2)


def test_it_is_private_and_gone_at_the_end() -> None:
    folder = OwnAnswersDir()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "answer").touch()
    folder.close()
    assert not folder.path.exists()


def test_what_a_killed_launcher_left_is_deleted_by_the_next_and_what_runs_is_not(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        left = Path(launcher.stdout.readline().strip())
        (left / "answer").touch()
        age(left)
        own = OwnAnswersDir()
        assert left.exists()
        own.close()
        launcher.send_signal(signal.SIGKILL)
    own = OwnAnswersDir()
    assert list(temporary.iterdir()) == [own.path]
    own.close()


def test_a_folder_that_is_about_to_be_locked_and_a_link_are_left_alone(temporary: Path) -> None:
    new, link = temporary / "kvferry-answers-new", temporary / "kvferry-answers-link"
    new.mkdir()
    link.symlink_to(new)
    OwnAnswersDir().close()
    assert new.exists() and link.is_symlink()


def test_a_folder_of_another_user_is_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root could delete it."""
    theirs = temporary / "kvferry-answers-theirs"
    theirs.mkdir()
    age(theirs)
    monkeypatch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
    OwnAnswersDir().close()
    assert theirs.exists()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    OwnAnswersDir().close()
    assert not theirs.exists()


def test_without_a_place_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="No such file"):
        OwnAnswersDir()
