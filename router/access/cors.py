"""Web pages of other origins may do nothing (CORS), unless an operator names their origins.

    preflight (OPTIONS, Origin, Access-Control-Request-Method)   answered before keys are looked at: it carries none
    any other request with an allowed Origin                     its answer says so, errors too

Any header may be sent: those that mean nothing here are ignored from everybody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...common.errors import RequestError
from ..state.errors import clip

MAX_AGE_S = 600  # for which a browser need not ask again
_METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED = (
    b"x-request-id, request-id, x-kvferry-ignored, idempotent-replayed, server-timing, openai-processing-ms, "
    b"retry-after, retry-after-ms, x-should-retry, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}")

Headers = list[tuple[bytes, bytes]]


class Cors:
    """The origins that are allowed; `*`: all."""

    def __init__(self, origins: tuple[str, ...] = ()) -> None:
        self._allows_all = "*" in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def preflight(self, method: str, headers: Mapping[bytes, bytes]) -> Headers | None:
        """Return what a preflight's answer has beside `headers`; None: it is none. Raises RequestError (403)."""
        if not self._origins or method != "OPTIONS" or b"access-control-request-method" not in headers:
            return None
        if not self.headers(headers):
            raise _not_allowed(headers.get(b"origin", b""))
        names = headers.get(b"access-control-request-headers", b"")
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", names if _HEADER_NAMES.fullmatch(names) else b"authorization"),
            (b"access-control-max-age", b"%d" % MAX_AGE_S),
        ]

    def check_form(self, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a form of a page that may not ask: browsers send forms anywhere, without a preflight."""
        origin = headers.get(b"origin")
        if origin is not None and not self.headers(headers):
            raise _not_allowed(origin)

    def headers(self, headers: Mapping[bytes, bytes]) -> Headers:
        """Return what an answer carries for the page that asked."""
        origin = headers.get(b"origin")
        if origin is None or not (self._allows_all or origin in self._origins):
            return []
        return [
            (b"access-control-allow-origin", b"*" if self._allows_all else origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"Origin"),
        ]


def _not_allowed(origin: bytes) -> RequestError:
    text = clip(origin.decode("latin-1"))
    return RequestError(f"the origin {text} is not allowed", code="origin_not_allowed", status=403)
