"""Formats, and published patterns, in words that the library knows.

OpenAPI, Pydantic and zod have formats of their own. zod writes each of its formats with the pattern that it stands for;
some of its patterns look around, which the library cannot: they are written out.
"""

from __future__ import annotations

from .references import Schema

_BASE64 = "^(?:[{0}]{{4}})*(?:[{0}]{{2}}==|[{0}]{{3}}=)?$"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS: dict[str, Schema] = {
    "json-pointer": {"pattern": f"^{_POINTER}$"},
    "relative-json-pointer": {"pattern": f"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$"},
    "byte": {"pattern": _BASE64.format("A-Za-z0-9+/")},  # OpenAPI's; the next ones are Pydantic's
    "base64": {"pattern": _BASE64.format("A-Za-z0-9+/")},
    "base64url": {"pattern": _BASE64.format("A-Za-z0-9_-")},
    "ipvanyaddress": {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
    "iri": {"format": "uri"},
    "iri-reference": {"format": "uri"},
    "uri-reference": {"format": "uri"},
    "uri-template": {"format": "uri"},
    "idn-email": {"format": "email"},
    "idn-hostname": {"format": "hostname"},
    "cidrv4": {"pattern": rf"^(?:{_BYTE}\.){{3}}{_BYTE}/(?:[0-9]|[12][0-9]|3[0-2])$"},  # zod's, down to the end
    "cuid": {"pattern": "^[cC][0-9a-z]{8,}$"},
    "cuid2": {"pattern": "^[0-9a-z]+$"},
    "e164": {"pattern": "^\\+[1-9][0-9]{6,14}$"},
    "ksuid": {"pattern": "^[A-Za-z0-9]{27}$"},
    "lowercase": {"pattern": "^[^A-Z]*$"},
    "nanoid": {"pattern": "^[a-zA-Z0-9_-]{21}$"},
    "ulid": {"pattern": "^[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}$"},
    "uppercase": {"pattern": "^[^a-z]*$"},
    "xid": {"pattern": "^[0-9a-vA-V]{20}$"},
}

_SECONDS = r"\d+(?:[.,]\d+)?S"
_DATE = r"(?:\d+Y(?:\d+M)?(?:\d+D)?|\d+M(?:\d+D)?|\d+D)"
_TIME = rf"T(?:\d+H(?:\d+M)?(?:{_SECONDS})?|\d+M(?:{_SECONDS})?|{_SECONDS})"
# Pattern -> one that takes the same texts.
PATTERNS = {
    # z.email(): no dot at the beginning, and none behind another
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^(?:[A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@(?:[A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
    # z.iso.duration(): something behind P, and behind T
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        rf"^P(?:\d+W|{_DATE}(?:{_TIME})?|{_TIME})$"
    ),
}
