"""Labels that a client gives to what is kept for it: of the bounds that OpenAI has, so that they stay labels."""

from __future__ import annotations

from ...common.errors import RequestError

_MAX_PAIRS, _MAX_KEY_CHARS, _MAX_VALUE_CHARS = 16, 64, 512


def checked_metadata(value: object) -> dict[str, str] | None:
    """Return a body's `metadata`. Raises RequestError (400)."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_PAIRS:
        raise RequestError(f"metadata: must be an object of at most {_MAX_PAIRS} pairs", param="metadata")
    for key, text in value.items():
        if not isinstance(text, str) or len(key) > _MAX_KEY_CHARS or len(text) > _MAX_VALUE_CHARS:
            raise RequestError(
                f"metadata: names of up to {_MAX_KEY_CHARS} and texts of up to {_MAX_VALUE_CHARS} characters",
                param="metadata",
            )
    return value
