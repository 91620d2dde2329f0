"""Recorded traffic: when requests came and how long they were. Two published forms are read.

    Mooncake  JSON lines: timestamp (ms), input_length, output_length, hash_ids (one for each 512-token prefix block)
    Azure     CSV: TIMESTAMP (date and time, of 2024 with a zone), ContextTokens, GeneratedTokens

Neither holds text; equal hash ids stand for equal blocks of a prompt, which the prompts made from them keep.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ...common.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
_DAY_AND_TIME = re.compile(r"\s*(?P<whole>.*?)(?P<fraction>\.\d+)?(?P<zone>Z|[+-]\d\d:?\d\d)?\s*", re.ASCII)
_MOST_DAYS = 366  # between two requests of a trace: more is a time in another unit, or none
_DAY_S = 86400.0
_MOST_TOKENS = 10**9  # of a prompt or an answer, as where a flag says how many
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(slots=True, frozen=True)
class TraceRow:
    """One recorded request."""

    arrival_s: float  # since the first request of the trace
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()  # of the prompt's prefix blocks; empty: not recorded
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    def scaled(self, *, length: float, rate: float) -> TraceRow:
        """Lengths times `length` (at least one token), arrivals `rate` times as dense."""
        return TraceRow(
            arrival_s=self.arrival_s / rate,
            num_prompt_tokens=max(1, round(self.num_prompt_tokens * length)),
            num_output_tokens=max(1, round(self.num_output_tokens * length)),
            block_ids=self.block_ids,
            block_tokens=max(1, round(self.block_tokens * length)),
        )


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, *, length_scale: float = 1.0, rate_scale: float = 1.0) -> list[TraceRow]:
    """Rows in order of arrival, the first at 0 s. The form is told by the first character of the file."""
    for name, scale in (("--trace-scale", length_scale), ("--trace-rate-scale", rate_scale)):
        if scale <= 0:
            raise ConfigError(f"{name} {scale}: must be above 0")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--trace {path}: no text in UTF-8: {error.reason} at byte {error.start}") from error
    rows = list(_read_mooncake(path, text) if text.lstrip().startswith("{") else _read_azure(path, text))
    if not rows:
        raise ConfigError(f"--trace {path}: no requests in it")
    for count in (count for row in rows for count in (row.num_prompt_tokens, row.num_output_tokens)):
        if not 0 <= count <= _MOST_TOKENS / length_scale:
            raise ConfigError(f"--trace {path}: {count} tokens, times {length_scale:g}: 0 to {_MOST_TOKENS:,} are read")
    rows.sort(key=lambda row: row.arrival_s)
    start_s = rows[0].arrival_s
    days = (rows[-1].arrival_s - start_s) / _DAY_S
    if days > _MOST_DAYS:
        raise ConfigError(
            f"--trace {path}: {days:,.0f} days from its first request to its last, {_MOST_DAYS} at most: "
            "are its times of one clock, and Mooncake's in milliseconds?"
        )
    return [
        replace(row, arrival_s=row.arrival_s - start_s).scaled(length=length_scale, rate=rate_scale) for row in rows
    ]


def _read_mooncake(path: Path, text: str) -> Iterator[TraceRow]:
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"--trace {path}, line {number}: {error}") from error
        yield TraceRow(row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids)


def _read_azure(path: Path, text: str) -> Iterator[TraceRow]:
    reader = csv.DictReader(text.splitlines(), restval="")
    try:
        missing = [column for column in _AZURE_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ConfigError(
                f"--trace {path}: neither JSON lines nor a CSV with the columns {', '.join(_AZURE_COLUMNS)}"
                f" (missing: {', '.join(missing)})"
            )
        for row in reader:
            arrival_s = _seconds_of_day_and_time(row["TIMESTAMP"])
            yield TraceRow(arrival_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
    except (csv.Error, ValueError) as error:
        raise ConfigError(f"--trace {path}, line {reader.line_num}: {error}") from error


def _seconds_of_day_and_time(text: str) -> float:
    """Return the seconds of `2023-11-16 18:17:03.9799600`, or of `2024-05-10 00:00:00.009930+00:00`.

    Any number of decimals, of which datetime reads six.
    """
    found = _DAY_AND_TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no date and time")
    moment = datetime.fromisoformat(found["whole"] + (found["zone"] or ""))
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return moment.timestamp() + float(found["fraction"] or 0.0)
