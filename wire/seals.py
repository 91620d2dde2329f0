"""Every frame of a session carries a seal, by which its reader knows that it is the peer's next one, unchanged."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from ..common.errors import ProtocolError

SEAL_BYTES = 16


class Seals:
    """The authentication of one direction of one session.

    A seal is a keyed BLAKE2b over the frame, with the frame's number as the salt. The key comes from the shared secret
    and both nonces, so that a frame is good in one session, in one direction and at one place only.
    """

    __slots__ = ("_key", "_number")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0  # frames so far

    def next(self, frame: bytes) -> bytes:
        """The seal of the next frame, which is `frame`."""
        salt = self._number.to_bytes(16, "little")
        self._number += 1
        return hashlib.blake2b(frame, digest_size=SEAL_BYTES, key=self._key, salt=salt).digest()

    def open(self, sealed: bytes, peer: str) -> bytes:
        """The next frame without its seal, if it is the peer's."""
        frame, seal = sealed[:-SEAL_BYTES], sealed[-SEAL_BYTES:]
        if len(sealed) < SEAL_BYTES or not hmac.compare_digest(seal, self.next(frame)):
            raise ProtocolError(
                f"frame {self._number} from {peer} has a wrong seal: changed, injected, repeated or out of order",
                kind="seal",
            )
        return frame


@dataclass(slots=True)
class SealPair:
    """The seals of one end of a session."""

    outgoing: Seals
    incoming: Seals
