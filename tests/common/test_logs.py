"""Log lines: JSON off a terminal, and the same way out for libraries."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
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
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    yield
    sys.excepthook = hook
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


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EPIPE])
@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_line_that_cannot_be_written_ends_nothing(why: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_text: str) -> int:
        raise OSError(why, os.strerror(why))

    stream = io.StringIO()
    monkeypatch.setattr(stream, method, fail)
    configure_logging("info", stream=stream, process="launcher")
    structlog.get_logger().info("worker_lost", worker_id="d-0")
    monkeypatch.undo()  # there is room again
    structlog.get_logger().info("worker_joined", worker_id="d-0")
    assert json.loads(stream.getvalue().splitlines()[-1])["event"] == "worker_joined"


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
    "evil",
    [
        "a\r\nlevel=error forged",
        "\x1b[31mred\x1b[0m",
        "\x9b31m",
        "a\u2028b",
        "\u202edrowssap",
        "\u2067drow",
        "\x00\x07",
    ],
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


def test_a_finished_request_is_one_short_line_on_a_terminal() -> None:
    stream = Terminal()
    configure_logging("info", stream=stream)
    facts = {"status": 200, "finish": ["stop"], "prompt_tokens": 31, "cached_tokens": 16, "completion_tokens": 12}
    times = {"queue_ms": 0.1, "ttft_ms": 81.4, "total_ms": 205.6, "decode_ms": 120.0}
    structlog.get_logger().info("request_finished", request_id="f" * 32, client_request_id=None, **facts, **times)
    [line] = stream.getvalue().splitlines()
    assert line[9:] == f"request 200 stop: 31 -> 12 tokens, ttft 81, total 206 ms, {'f' * 32}"
    assert len(line) <= 100


def test_trouble_names_its_level_and_other_lines_are_cut_to_a_terminals_width() -> None:
    stream = Terminal()
    configure_logging("info", stream=stream)
    structlog.get_logger().info("a_long_one", text="x" * 300)
    structlog.get_logger().warning("worker_lost", reason="x" * 300)
    quiet, loud = stream.getvalue().splitlines()
    assert len(quiet) == 100 and quiet.endswith("...")
    assert loud[9:].startswith("warning worker_lost reason=xxx") and loud.endswith("x" * 300)


def test_the_format_is_what_was_asked_for_wherever_the_lines_go() -> None:
    for stream, log_format in ((Terminal(), "json"), (io.StringIO(), "text")):
        configure_logging("info", log_format=log_format, stream=stream)  # type: ignore[arg-type]
        structlog.get_logger().info("worker_ready")
        assert stream.getvalue().startswith("{") == (log_format == "json")


def test_what_ends_a_process_is_a_line_too() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    try:
        raise ValueError("broken")
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    [line] = stream.getvalue().splitlines()
    assert "ValueError: broken" in json.loads(line)["exception"]
