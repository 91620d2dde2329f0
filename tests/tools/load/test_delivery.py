"""What was measured is saved before it is shown, and what cannot be written is a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvferry.tools.load.delivery import deliver

PROGRAM = """
import sys
from pathlib import Path
from kvferry.tools.load.delivery import deliver
def show():
    for _ in range(20_000):
        print("a long report")
sys.exit(deliver("program", [(Path(sys.argv[1]), lambda path: path.write_text("saved"))], show))
"""


def test_files_are_saved_before_anything_is_shown(tmp_path: Path) -> None:
    path, done = tmp_path / "figures", list[str]()
    assert (
        deliver("program", [(path, lambda path: done.append(path.name)), (None, print)], lambda: done.append("")) == 0
    )
    assert done == ["figures", ""]


def test_each_file_that_cannot_be_written_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent" / "figures"
    files = [(path, lambda path: path.write_text("x")) for path in (tmp_path, absent, tmp_path / "written")]
    assert deliver("program", [*files], lambda: print("shown")) == 2
    shown = capsys.readouterr()
    assert shown.out == "shown\n" and (tmp_path / "written").exists()
    assert shown.err.splitlines() == [
        f"program: {tmp_path} cannot be written: Is a directory",
        f"program: {absent} cannot be written: No such file or directory",
    ]


def test_a_full_output_is_a_line_and_a_reader_that_has_left_is_none(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "figures")]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        2,
        "program: standard output cannot be written: No space left on device\n",
    )
    (tmp_path / "figures").unlink()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None and left.stderr is not None
        left.stdout.readline()
        left.stdout.close()
        assert (left.wait(60), left.stderr.read()) == (1, "")
    assert (tmp_path / "figures").read_text() == "saved"
