"""Settings of requests in files, which nobody waits for."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from ..common.config import Settings
from .option import FRONTS, Option
from .values import Count, FilePath, NumBytes, parse_number


class BatchSettings(Settings):
    """/v1/files and /v1/batches."""

    data_dir: Annotated[
        FilePath | None,
        Option(
            "Batches",
            "Folder for /v1/files and /v1/batches, which survive a restart in it. Default: none, both are refused.",
            FRONTS,
        ),
    ] = None
    data_dir_bytes: Annotated[
        NumBytes, Option("Batches", "What the files there may take together; more is refused.", FRONTS)
    ] = 10 << 30
    data_retention_days: Annotated[
        Annotated[float, Field(gt=0, le=3650)],
        Option("Batches", "Days that files and ended batches are kept.", FRONTS),
    ] = 30.0
    max_batch_requests: Annotated[Count, Option("Batches", "Requests of batches at once, of each router.", FRONTS)] = 16
    batch_requests_beside: Annotated[
        Annotated[int, BeforeValidator(parse_number), Field(ge=0)],
        Option("Batches", "Of these, beside other requests; 0: batches wait while anybody else is served.", FRONTS),
    ] = 0
