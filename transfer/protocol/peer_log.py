"""Warnings about other workers: each peer's first failure of a kind is a warning, those that follow are for debugging.

A link that is down fails every write over it. What is worth a line is which peer, and why.
"""

from __future__ import annotations

from collections import OrderedDict

import structlog

MAX_KNOWN = 1024  # pairs of a peer and a reason; with more of them, the one that was longest unseen is told again

log = structlog.get_logger(__name__)


class PeerLog:
    """One kind of event. Used by one thread, or under a lock."""

    def __init__(self, event: str, max_known: int = MAX_KNOWN) -> None:
        self._event = event
        self._max_known = max_known
        self._known: OrderedDict[tuple[str, str], int] = OrderedDict()  # how often each was seen

    def warn(self, peer: str, reason: str, **details: object) -> None:
        """Note a failure. `reason` is one of few; what differs from one to the next belongs to `details`."""
        key = (peer, reason)
        count = self._known[key] = self._known.pop(key, 0) + 1
        if len(self._known) > self._max_known:
            self._known.popitem(last=False)
        (log.warning if count == 1 else log.debug)(self._event, peer=peer, reason=reason, count=count, **details)
