"""Settings of what processes write."""

from __future__ import annotations

from typing import Annotated

from ..common.config import LogFormat, LogLevel, Settings
from .option import ALL, SERVE, Option
from .values import FilePath


class OutputSettings(Settings):
    """Logs and files about the processes themselves."""

    log_level: Annotated[LogLevel, Option("Output", "Least severe lines to log.", ALL)] = "info"
    log_format: Annotated[
        LogFormat, Option("Output", "Log lines for people or programs; auto: text on a terminal.", ALL)
    ] = "auto"
    pid_file: Annotated[
        FilePath | None,
        Option("Output", "File for this process's id while it runs: kvferry status --pid-file FILE.", SERVE),
    ] = None
