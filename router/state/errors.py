"""Every refusal in one shape: {"error": {"message", "type", "param", "code"}}.

An exception becomes a `HttpFailure` here and nowhere else. Before a stream's head is sent it is an HTTP status with
headers; after that it is one server-sent event (`sse.py`). Retryable statuses carry Retry-After (never more than
a minute: the openai client gives up at once above two); those that a retry cannot help say `x-should-retry: false`.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ...common.errors import CapacityError, KVFerryError, RequestError

MAX_RETRY_AFTER_S = 60.0
RETRYABLE = frozenset({429, 503})
STORAGE_UNAVAILABLE = "storage_unavailable"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# A disk that fails or was mounted anew for reading only, a folder that was taken away. Others are bugs of ours.
_UNUSABLE = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE})

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(slots=True, frozen=True)
class HttpFailure:
    """One error as the client will see it."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    more_headers: tuple[tuple[bytes, bytes], ...] = ()
    close: bool = False  # the rest of the request's body stays unread: the connection cannot go on

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
        )

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.status in RETRYABLE:
            seconds = min(max(self.retry_after_s or 1.0, 0.001), MAX_RETRY_AFTER_S)
            headers.append((b"retry-after", b"%d" % math.ceil(seconds)))
            headers.append((b"retry-after-ms", b"%d" % math.ceil(seconds * 1000)))
        elif self.status >= 400:
            headers.append((b"x-should-retry", b"false"))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.close:
            headers.append((b"connection", b"close"))
        return [*headers, *self.more_headers]


def failure_of(error: BaseException) -> HttpFailure:
    """Map an exception; what is not ours is a 500 that tells the client nothing of the inside."""
    match error:
        case RequestError():
            kind = _TYPES.get(error.status, error.kind) if error.kind == "invalid_request_error" else error.kind
            close = error.status in (408, 413, 505)
            return HttpFailure(error.status, str(error), kind, error.param, error.code, close=close)
        case CapacityError():
            kind, code = ("rate_limit_error", "rate_limit_exceeded")
            if error.status != 429:
                kind, code = ("server_error", "overloaded")
            return HttpFailure(error.status, str(error), kind, None, code, retry_after_s=error.retry_after_s)
        case StreamError():
            kind = _TYPES.get(error.status, "server_error")
            return HttpFailure(error.status, str(error), kind, None, error.code, retry_after_s=error.retry_after_s)
        case OSError() if error.errno in _FULL:
            text = "the disk of the server's folder is full"
            return HttpFailure(507, text, "server_error", None, "insufficient_storage")
        case OSError() if error.errno in _UNUSABLE:
            text = f"the server's folder on disk cannot be used now: {error.strerror}"
            return HttpFailure(503, text, "server_error", None, STORAGE_UNAVAILABLE)
        case KVFerryError():
            return HttpFailure(500, str(error), "server_error", None, "internal_error")
        case _:
            return HttpFailure(500, "internal error; the server's log has more", "server_error", None, "internal_error")


def log_failure(event: str, error: Exception, **what: object) -> None:
    """Tell the log of what failed: of a disk the reason, of anything else where in the code."""
    import structlog  # here, as helper processes, which log nothing, would spend more than half of their start on it

    log = structlog.get_logger(__name__)
    errors = list(_single(error))
    if all(isinstance(each, OSError) and each.errno in _FULL | _UNUSABLE for each in errors):
        log.warning(event, **what, reason=str(errors[0]))
    else:
        log.error(event, **what, exc_info=error)


def _single(error: Exception) -> Iterator[Exception]:
    """Yield an error, or those of a group."""
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _single(each)
    else:
        yield error


def unknown_path(path: str) -> RequestError:
    is_batch = path.startswith("/v1/messages/batches")
    why = "; batches of messages are not served" if is_batch else ""
    return RequestError(f"no such path: {clip(path)}{why}", code="unknown_url", status=404)


def shown(value: object) -> str:
    """A client's value as it may stand in a message. A large one is not even written out."""
    match value:
        case str():
            return clip(value)
        case list():
            return f"an array of {len(value)}"
        case dict():
            return f"an object of {len(value)}"
    return clip(str(value)).strip("'")


def is_unicode(text: str) -> bool:
    """Tell whether a text can be sent: it has no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clip(text: str, limit: int = 64) -> str:
    """`text` as it may stand in a message: quoted, control characters escaped, not longer than about `limit`."""
    quoted = ascii(text if len(text) <= limit else text[:limit] + "...")
    return quoted


class StreamError(KVFerryError):
    """A request failed after it was accepted: `status` if nothing was sent yet, else an error event with `code`."""

    def __init__(self, message: str, code: str, status: int, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s  # a hint for the client, where another try may succeed
