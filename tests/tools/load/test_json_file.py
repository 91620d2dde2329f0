"""Figures are written whole, or not at all, and in place of nothing but a file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from kvferry.tools.load.json_file import save_json, write_whole


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "some" / "figures.json"
    for body in ({"a": [1, 2, 3]}, {"b": 2}):
        save_json(body, path)
        assert json.loads(path.read_text()) == body
    assert os.listdir(path.parent) == ["figures.json"]
    write_whole(b"drawn", tmp_path / "other" / "figures.svg")
    assert (tmp_path / "other" / "figures.svg").read_bytes() == b"drawn"


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    save_json({"a": 1}, pipe)
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and pipe.is_fifo()


def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_text("before, and longer")
    link.symlink_to(target)
    write_whole(b"after", link)
    assert link.is_symlink() and target.read_bytes() == b"after"


def test_of_what_cannot_be_written_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.json"
    path.write_text("before")

    def fill(file: Path, content: bytes) -> int:
        with file.open("wb") as half:
            half.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        save_json({"a": 1}, path)
    assert os.listdir(tmp_path) == ["figures.json"] and path.read_text() == "before"
