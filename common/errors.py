"""The exception tree: one branch for each party that can act on the error.

KVFerryError
├── ConfigError            the operator: a flag, a file, a missing extra (exit code 2)
├── RequestError           the client: 4xx, names the parameter
├── CapacityError          try again later: 429 or 503 with Retry-After
├── ProtocolError          a peer sent what no correct peer sends; its connection ends
├── TransferError          moving KV failed: names the peer
└── WorkerLost             a worker's connection ended or it hangs
"""

from __future__ import annotations


class KVFerryError(Exception):
    """Root of everything that kvferry raises on purpose."""


class ConfigError(KVFerryError):
    """A setting, file or installation is wrong; the message says the rule and the nearest right value."""


class RequestError(KVFerryError):
    """The client's request is wrong. Rendered in the OpenAI error shape."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.kind = kind


class CapacityError(KVFerryError):
    """No room now. `retry_after_s` is a hint for the caller; `status` is 429, or 503 where others fill the server."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, status: int = 429) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status


class ProtocolError(KVFerryError):
    """A frame that is too large, malformed, unauthenticated or of another protocol version.

    `kind`, for counts: frame (malformed, or of the wrong kind), size, seal, hello, flood.
    """

    def __init__(self, message: str, *, kind: str = "frame") -> None:
        super().__init__(message)
        self.kind = kind


class TransferError(KVFerryError):
    """A KV transfer failed. `peer` is the transfer agent or worker on the other side.

    `may_land`: some of it may still be carried out; False where it was never begun, or ended in the failed call.
    """

    def __init__(self, message: str, *, peer: str = "", may_land: bool = True) -> None:
        super().__init__(message)
        self.peer = peer
        self.may_land = may_land


class WorkerLost(KVFerryError):
    """A worker died, hung or was cut off."""


class InvalidTransition(KVFerryError):
    """A state machine was asked for an edge that its table does not have: a bug of ours."""
