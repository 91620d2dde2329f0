"""The requests that a decode worker runs: their sequences, who waits for them, and how each of them ends.

add ─> live: one sequence per unfinished choice ─> the last choice has ended, or `end` ─> remembered as ended
"""

from __future__ import annotations

from collections.abc import Iterator

from ..common.request import RequestSpec, Sequence
from .outbox import Outbox
from .running import EndedAttempts, Live
from .scheduler import DecodeScheduler


class Requests:
    """Keeps requests, scheduler and outbox in step: what ends leaves all three."""

    def __init__(self, scheduler: DecodeScheduler, outbox: Outbox) -> None:
        self._scheduler = scheduler
        self._outbox = outbox
        self._live: dict[str, Live] = {}  # by request id
        self._ended = EndedAttempts()
        self.stale_messages = 0

    def __len__(self) -> int:
        return len(self._live)

    def get(self, request_id: str) -> Live | None:
        return self._live.get(request_id)

    def of(self, seq: Sequence) -> Live:
        """The request that a scheduled sequence belongs to."""
        return self._live[seq.request_id]

    @property
    def routers(self) -> set[str]:
        return {live.router_id for live in self._live.values()}

    def add(self, live: Live) -> None:
        self._live[live.spec.request_id] = live

    def drop_older(self, spec: RequestSpec) -> bool:
        """A new attempt ends the one before it. False: it is not new, and is dropped itself."""
        live = self._live.get(spec.request_id)
        if live is not None and live.spec.attempt >= spec.attempt:
            self.stale_messages += 1
            return False
        if live is not None:
            self.end(live)
        return True

    def has_ended(self, spec: RequestSpec) -> bool:
        """The attempt ended here before; it is not begun a second time."""
        ended = self._ended.has(spec)
        self.stale_messages += ended
        return ended

    def note_ended(self, request_id: str, attempt: int) -> None:
        self._ended.add(request_id, attempt)

    def drop_choice(self, live: Live, choice: int) -> None:
        """One choice is not wanted any more. While the prompt is computed, all choices hang on one sequence."""
        if any(seq.pending_choices for seq in live.sequences.values()):
            live.dropped.add(choice)  # forgotten when the prompt is done
        elif choice in live.sequences:
            self._scheduler.remove(live.sequences.pop(choice))
        if live.is_over:
            self.end(live)

    def remove(self, live: Live, seq: Sequence) -> None:
        """A choice has ended; with the last one the request has."""
        self._scheduler.remove(live.sequences.pop(seq.choice))
        if not live.sequences:
            self.finish(live)

    def end(self, live: Live) -> None:
        """Nobody waits for the rest of it."""
        for seq in live.sequences.values():
            self._scheduler.remove(seq)
        live.sequences.clear()
        self._outbox.drop(live)
        self.finish(live)

    def finish(self, live: Live) -> None:
        """Nothing of it runs any more; its last tokens may yet have to leave."""
        del self._live[live.spec.request_id]
        self.note_ended(live.spec.request_id, live.spec.attempt)

    def keep_only(self, router_id: str, keep: frozenset[tuple[str, int]]) -> None:
        """End the router's but those of the (request id, attempt) pairs in `keep`."""
        for live in list(self._live.values()):
            if live.router_id == router_id and (live.spec.request_id, live.spec.attempt) not in keep:
                self.end(live)

    def expired(self, now_s: float) -> Iterator[Live]:
        """Those of which something waits to be begun beyond its deadline."""
        for seq in list(self._scheduler.waiting):
            live = self._live.get(seq.request_id)
            if live is not None and live.expires_s is not None and now_s >= live.expires_s:
                yield live

    def check(self) -> None:
        """Assert that requests and scheduler know the same sequences."""
        assert all(live.sequences for live in self._live.values())
        known = {seq for live in self._live.values() for seq in live.sequences.values()}
        assert known == set(self._scheduler.sequences())
