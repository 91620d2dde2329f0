"""The queued requests of one priority: those that can still be in time, and late ones with a share of the service.

One late request goes when LATE_EVERY - 1 others have gone, and so many times its own predicted time. A late request is
therefore served after at most LATE_EVERY x (late ones that come before it + 1) others, or so many times its own and
their time, and those that come before it are never more than those that are due before it, and each other tenant's
fair share beside its own tenant's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ..state.request import RouterRequest
from ..state.tracked_request import TrackedRequest
from .fair_order import FairOrder, Ticket

LATE_EVERY = 8  # one in so many served is a late one; smaller helps the late and makes more requests late

RequestTicket = Ticket[TrackedRequest]


@dataclass(slots=True, eq=False)
class Place:
    """The place of a queued request."""

    ticket: RequestTicket
    start_by_s: float  # it misses its objective if it starts later; infinity where it has none, or need not hurry
    is_late: bool = False

    @property
    def can_miss(self) -> bool:
        return self.start_by_s != float("inf")


@dataclass(slots=True, eq=False)
class PriorityLevel:
    """The requests of one priority."""

    timely: FairOrder[TrackedRequest] = field(default_factory=FairOrder)
    late: FairOrder[TrackedRequest] = field(default_factory=FairOrder)
    num_since_late: int = 0  # timely ones served while a late one waited
    work_since_late_s: float = 0.0  # theirs
    num_hurried: int = 0  # of all, those that can miss an objective

    def __len__(self) -> int:
        return len(self.timely) + len(self.late)

    @property
    def num_tokens(self) -> int:
        """The tokens of their prompts."""
        return self.timely.num_tokens + self.late.num_tokens

    def order_of(self, place: Place) -> FairOrder[TrackedRequest]:
        return self.late if place.is_late else self.timely

    def take(self, place: Place) -> None:
        if place.is_late or not len(self.late):
            self.num_since_late, self.work_since_late_s = 0, 0.0
        else:
            self.num_since_late += 1
            self.work_since_late_s += place.ticket.item.request.unloaded_s
        self.order_of(place).take(place.ticket)

    def move_to_late(self, places: Iterable[Place]) -> None:
        for place in places:
            self.timely.remove(place.ticket)
            place.is_late = True
            self.late.add(place.ticket)

    def in_order(self) -> Iterator[RequestTicket]:
        late, num_since, work_s = iter(self.late), self.num_since_late, self.work_since_late_s
        next_late = next(late, None)
        for ticket in self.timely:
            if next_late is not None and _is_their_turn(next_late, num_since, work_s):
                yield next_late
                next_late, num_since, work_s = next(late, None), 0, 0.0
            yield ticket
            num_since += 1
            work_s += ticket.item.request.unloaded_s
        if next_late is not None:
            yield next_late
            yield from late

    def ahead_of(self, request: RouterRequest, due: float) -> tuple[int, int]:
        """Prompt tokens and number of those that a newcomer would wait behind."""
        tokens, number = self.timely.ahead_of(request.tenant, due, request.num_prompt_tokens)
        num_late = min(len(self.late), number // (LATE_EVERY - 1))
        return tokens + self.late.num_tokens * num_late // max(1, len(self.late)), number + num_late

    def tenants(self) -> set[str]:
        return {name for order in (self.late, self.timely) for name, _ in order.tenants()}

    def num_of(self, tenant: str) -> int:
        return self.timely.num_of(tenant) + self.late.num_of(tenant)

    def last_of(self, tenant: str) -> TrackedRequest | None:
        """Return the tenant's last one due whose client waits and has got nothing yet."""
        for order in (self.late, self.timely):
            for ticket in order.backwards(tenant):
                if not (ticket.item.request.is_resume or ticket.item.request.is_background):
                    return ticket.item
        return None


def _is_their_turn(late: RequestTicket, num_since: int, work_since_s: float) -> bool:
    others = LATE_EVERY - 1
    return num_since >= others and work_since_s >= others * late.item.request.unloaded_s
