"""Programs are known by their names, forked ones and such with a command's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from kvferry.tools.chaos.programs import program_name


@dataclass
class _Process:
    words: list[str]

    def cmdline(self) -> list[str]:
        return self.words


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["kvferry.worker d-10", "", ""], "d-10"),
        (["kvferry.router router-1"], "router-1"),
        (["python", "-m", "kvferry.worker", "--config-json", '{"role":"decode","worker_id":"d-0"}'], "d-0"),
        (["python", "-m", "kvferry.router", "--config-json", "{}"], "router"),
        (["python", "-m", "kvferry.launch.forking"], None),
        ([], None),
    ],
)
def test_programs_have_names_however_they_were_started(words: list[str], name: str | None) -> None:
    assert program_name(cast("Any", _Process(words))) == name
