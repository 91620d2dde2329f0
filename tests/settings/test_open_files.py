"""What the limit of open files leaves room for: the connections that are asked for, or a line with both numbers."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kvferry.common.errors import ConfigError
from kvferry.settings.open_files import MAX_CONNECTIONS, room_for_connections

# Only a process of its own may have its hard limit lowered: it does not come back.
ASK = """
import resource, sys
from kvferry.common.errors import ConfigError
from kvferry.settings.open_files import room_for_connections
soft, hard, asked = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    print(room_for_connections(asked or None), *resource.getrlimit(resource.RLIMIT_NOFILE))
except ConfigError as error:
    print(error)
"""


def _ask(soft: int, hard: int, asked: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(soft), str(hard), str(asked)], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def file_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("file_limit")
def test_what_fits_is_given() -> None:
    assert room_for_connections(8) == 8
    with pytest.raises(ConfigError, match="1000000000 connections need 1000000256 open files"):
        room_for_connections(10**9)


def test_the_soft_limit_is_raised_as_far_as_it_must_be() -> None:
    assert _ask(64, 8192) == f"{MAX_CONNECTIONS} {(MAX_CONNECTIONS + 256) * 3 // 2} 8192"
    assert _ask(64, 2000, 1000) == "1000 1884 2000"


def test_the_usual_number_shrinks_to_what_is_there_but_not_below_a_few_hundred() -> None:
    assert _ask(1024, 1024) == "768 1024 1024"
    assert _ask(64, 64) == (
        "max_connections: 256 connections need 512 open files, and this process may have 64; "
        "raise that limit (ulimit -n 512)"
    )


def test_a_number_that_was_asked_for_is_met_or_refused() -> None:
    assert _ask(300, 300, 10) == "10 300 300"
    assert _ask(266, 266, 10) == "10 266 266"
    assert _ask(300, 1000, 1000) == (
        "max_connections: 1000 connections need 1256 open files, and this process may have 1000; "
        "raise that limit (ulimit -n 1256), or set --max-connections 744"
    )
