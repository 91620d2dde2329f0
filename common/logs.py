"""Log lines of every process: for people on a terminal, one JSON object each otherwise (`--log-format`). On stderr.

A line carries what was bound to its context (`worker_id`, `request_id`). Libraries that log through the standard
library take the same way out. Prompts, answers and keys are never logged; what else a client or a peer chose (a path, a
name, an id) cannot end a line, colour a terminal or fill a disk: control characters are escaped, long texts clipped.
"""

from __future__ import annotations

import contextvars
import logging
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from .config import LogFormat
from .lines import Lines, on_lost

_NOISY = ("httpx", "httpcore", "huggingface_hub", "asyncio", "matplotlib", "uvicorn.access")
_MAX_TEXT_CHARS = 2048
_TEXT_COLUMNS = 100
QUIET_LEVELS = ("debug", "info")
# Of the line that comes all day, what somebody at a terminal wants to see.
_REQUEST = (
    "{status} {finish}: {prompt_tokens} -> {completion_tokens} tokens, ttft {ttft}, total {total} ms, {request_id}"
)
# C0 and C1, line separators, and what turns the direction of the text around it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def configure_logging(
    level: str = "info", *, log_format: LogFormat = "auto", stream: TextIO | None = None, **context: str
) -> None:
    """Set up the process's logging; `context` is bound to each line. Again: replaces the set-up."""
    lines = Lines(stream if stream is not None else sys.stderr)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor] = [clean, *_renderers(resolve_format(log_format, lines))]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        # Past the standard library: there is a line for each request.
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, lines)),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(lines)
    formatter = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(formatter(foreign_pre_chain=shared, processors=[formatter.remove_processors_meta, *last]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_number(level))
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, _number(level)))
    sys.excepthook = _log_uncaught
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)
    process = contextvars.copy_context()  # the thread that tells has a context of its own
    on_lost(lambda count: process.run(structlog.get_logger().warning, "log_lines_lost", count=count))


def resolve_format(log_format: LogFormat, stream: TextIO | Lines) -> Literal["text", "json"]:
    if log_format == "auto":
        return "text" if stream.isatty() else "json"
    return log_format


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log what ends the process as a line like any other; Ctrl-C is none."""
    if not issubclass(kind, KeyboardInterrupt):
        structlog.get_logger().critical("uncaught_exception", exc_info=(kind, error, trace))


def clean(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Return the line with every text of it harmless."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _harmless(value)
    return event


def _harmless(text: str) -> str:
    if len(text) > _MAX_TEXT_CHARS:
        text = f"{text[:_MAX_TEXT_CHARS]}... ({len(text)} characters)"
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def _renderers(log_format: Literal["text", "json"]) -> list[Processor]:
    if log_format == "text":
        return [structlog.processors.format_exc_info, _to_text]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]


def _to_text(_logger: WrappedLogger, method: str, event: EventDict) -> str:
    """Return `12:34:56 warning worker_lost worker_id=d-0 ...`, UTC. What is no trouble fits a line of a terminal."""
    time, level, name = str(event.pop("timestamp", ""))[11:19], event.pop("level", method), event.pop("event", "")
    exception = event.pop("exception", None)
    if name == "request_finished":
        rounded = {key: f"{event.get(f'{key}_ms', 0):.0f}" for key in ("ttft", "total")}
        words = _REQUEST.format(**{**event, **rounded, "finish": _to_word(event.get("finish"))})
        name = "request"
    else:
        words = " ".join(f"{key}={_to_word(value)}" for key, value in event.items() if value is not None)
    line = " ".join(filter(None, (time, level if level not in QUIET_LEVELS else "", str(name), words)))
    if level in QUIET_LEVELS and name != "request" and len(line) > _TEXT_COLUMNS:
        line = line[: _TEXT_COLUMNS - 3] + "..."
    return line if exception is None else f"{line}\n{exception}"


def _to_word(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _to_json(event: EventDict, **options: Callable[[object], object]) -> str:
    return msgspec.json.encode(event, enc_hook=options["default"]).decode()


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
