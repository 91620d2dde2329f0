"""Log lines of every process: for people on a terminal, one JSON object each otherwise. On stderr.

A line carries what was bound to its context (`worker_id`, `request_id`). Libraries that log through the standard
library take the same way out. Prompts, answers and keys are never logged.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import Processor

_NOISY = ("httpx", "httpcore", "huggingface_hub", "asyncio", "matplotlib", "uvicorn.access")


def configure_logging(level: str = "info", *, stream: TextIO | None = None, **context: str) -> None:
    """Set up the process's logging; `context` is bound to each line. Again: replaces the set-up."""
    stream = stream if stream is not None else sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(stream)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(_number(level))
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, _number(level)))
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)


def _renderers(stream: TextIO) -> list[Processor]:
    if stream.isatty():
        return [structlog.dev.ConsoleRenderer(colors=True)]
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]
