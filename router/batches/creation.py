"""The body of POST /v1/batches: checked field by field, and made a record."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection

from ...common.errors import RequestError
from ..kept.metadata import checked_metadata
from ..state.errors import shown
from .record import BatchRecord

_FIELDS = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_WINDOW_S = 30 * 86400


def new_record(
    raw: dict[str, object],
    endpoints: Collection[str],
    owner: str,
    now_s: float,
    model: str | None,
    name: str | None,
    taken_by: str,
) -> BatchRecord:
    """Return the record of the batch that a body asks for. Raises RequestError (400).

    `model`, `taken_by`: of the router that takes it. `name`: of 32 hexadecimal digits or more, equal where a client
    sends its request again; None: it will not.
    """
    if unknown := raw.keys() - _FIELDS:
        name = min(unknown)
        raise RequestError(f"{shown(name)}: there is no such field", param=name[:64], code="unknown_parameter")
    endpoint, file_id = raw.get("endpoint"), raw.get("input_file_id")
    if not isinstance(endpoint, str) or endpoint not in endpoints:
        known = ", ".join(sorted(endpoints))
        raise RequestError(f"endpoint: must be one of {known}, got {shown(endpoint)}", param="endpoint")
    if not isinstance(file_id, str):
        raise RequestError(f"input_file_id: must be a file's id, got {shown(file_id)}", param="input_file_id")
    window, window_s = _window(raw.get("completion_window"))
    return BatchRecord(
        id=f"batch_{(name or secrets.token_hex(16))[:32]}",
        owner=owner,
        endpoint=endpoint,
        input_file_id=file_id,
        completion_window=window,
        metadata=checked_metadata(raw.get("metadata")),
        model=model,
        taken_by=taken_by,
        output_lifetime_s=_lifetime_s(raw.get("output_expires_after")),
        created_at=int(now_s),
        created_ns=int(now_s * 1e9),
        expires_at=int(now_s + window_s),
    )


def _window(value: object) -> tuple[str, int]:
    """Return a window's text and its seconds. OpenAI's is 24h."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = int(match[1]) * _SECONDS[match[2]] if match is not None else 0
    if match is None or seconds > _MAX_WINDOW_S:
        raise RequestError(
            f"completion_window: must be a time such as 24h, 30m or 7d, up to 30d, got {shown(value)}",
            param="completion_window",
        )
    return match[0], seconds


def _lifetime_s(value: object) -> float | None:
    if value is None:
        return None
    seconds = value.get("seconds") if isinstance(value, dict) else None
    if not isinstance(value, dict) or value.get("anchor") != "created_at" or type(seconds) is not int or seconds < 1:
        raise RequestError(
            "output_expires_after: needs anchor 'created_at' and a whole number of seconds",
            param="output_expires_after",
        )
    return float(seconds)
