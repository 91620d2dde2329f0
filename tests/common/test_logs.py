"""Log lines: JSON off a terminal, and the same way out for libraries."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvferry.common.logs import configure_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def test_line_is_a_json_object_with_the_context_of_its_process() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream, worker_id="d-0")
    structlog.get_logger().info("request_finished", request_id="r", tokens=3)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["worker_id"], line["request_id"], line["tokens"]) == ("request_finished", "d-0", "r", 3)
    assert line["level"] == "info"
    assert line["timestamp"].endswith("Z")


def test_libraries_log_the_same_way() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream, worker_id="d-0")
    logging.getLogger("some.library").warning("port %d", 8000)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["worker_id"], line["level"]) == ("port 8000", "d-0", "warning")


def test_exception_is_inside_its_line() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("step_failed")
    [line] = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]


def test_lines_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    configure_logging("warning", stream=stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("lib").info("quiet")
    assert stream.getvalue() == ""


def test_terminal_gets_lines_for_people() -> None:
    stream = Terminal()
    configure_logging("info", stream=stream)
    structlog.get_logger().info("worker_ready", blocks=7)
    assert "worker_ready" in stream.getvalue()
    assert not stream.getvalue().startswith("{")


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
@pytest.mark.parametrize(
    "evil", ["a\r\nlevel=error forged", "\x1b[31mred\x1b[0m", "\x9b31m", "a\u2028b", "\u202edrowssap", "\x00\x07"]
)
def test_what_a_client_chose_cannot_end_a_line_or_steer_a_terminal(kind: type[io.StringIO], evil: str) -> None:
    stream = kind()
    configure_logging("info", stream=stream)
    structlog.get_logger().info("event", path=f"/x{evil}")
    logging.getLogger("some.library").warning("bad %s", evil)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert evil not in line
    if kind is io.StringIO:
        shown = json.loads(lines[0])["path"]
        assert shown.startswith("/x") and shown.isprintable()


def test_long_texts_are_clipped() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    structlog.get_logger().info("event", name="n" * 10_000)
    line = json.loads(stream.getvalue())
    assert len(line["name"]) < 2200 and "(10000 characters)" in line["name"]
