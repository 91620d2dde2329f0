"""Figures are written whole, or not at all, and in place of nothing but a file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from kvferry.tools.load.json_file import save_json


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "some" / "figures.json"
    for body in ({"a": [1, 2, 3]}, {"b": 2}):
        save_json(body, path)
        assert json.loads(path.read_text()) == body
    assert os.listdir(path.parent) == ["figures.json"]


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    save_json({"a": 1}, pipe)
    reader.join(10)
    assert json.loads(read[0]) == {"a": 1} and pipe.is_fifo()
