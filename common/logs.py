"""Log lines of every process: for people on a terminal, one JSON object each otherwise. On stderr.

A line carries what was bound to its context (`worker_id`, `request_id`). Libraries that log through the standard
library take the same way out. Prompts, answers and keys are never logged; what else a client or a peer chose (a path, a
name, an id) cannot end a line, colour a terminal or fill a disk: control characters are escaped, long texts clipped.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import TextIO

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_NOISY = ("httpx", "httpcore", "huggingface_hub", "asyncio", "matplotlib", "uvicorn.access")
_MAX_TEXT_CHARS = 2048
# C0 and C1, line separators, and what turns the direction of the text around it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def configure_logging(level: str = "info", *, stream: TextIO | None = None, **context: str) -> None:
    """Set up the process's logging; `context` is bound to each line. Again: replaces the set-up."""
    stream = stream if stream is not None else sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor] = [clean, *_renderers(stream)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=structlog.WriteLoggerFactory(file=stream),  # past the standard library: a line for each request
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    formatter = structlog.stdlib.ProcessorFormatter
    handler.setFormatter(formatter(foreign_pre_chain=shared, processors=[formatter.remove_processors_meta, *last]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_number(level))
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, _number(level)))
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)


def clean(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """The line with every text of it harmless."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = _harmless(value)
    return event


def _harmless(text: str) -> str:
    if len(text) > _MAX_TEXT_CHARS:
        text = f"{text[:_MAX_TEXT_CHARS]}... ({len(text)} characters)"
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def _renderers(stream: TextIO) -> list[Processor]:
    if stream.isatty():
        return [structlog.dev.ConsoleRenderer(colors=True)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]


def _to_json(event: EventDict, **options: Callable[[object], object]) -> str:
    return msgspec.json.encode(event, enc_hook=options["default"]).decode()


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
