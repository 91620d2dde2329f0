"""The central queue: requests that no worker holds, in the order in which they are served.

    priority    lower first, strictly
    lateness    what can still meet its objective comes before what cannot, and before what makes way so that as few
                as possible miss theirs (triage.py, arrival_load.py); but an eighth of the service is for those, if
                there are any (priority_level.py)
    tenants     fair shares of both (fair_order.py)
    due time    inside a tenant: arrival + objective. A long prompt's objective is a multiple of its own time, so short
                ones overtake it while it has time left; as its due time stands still, nobody is overtaken for ever

Bounded for newcomers only: a request that comes back after a failed attempt was admitted before. Background requests
are bounded by whoever asks them, and take nobody's place here. Requests that are put off, or that wait for a worker of
their own, stand apart and do not count as waiting for room.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from ..state.request import RouterRequest
from ..state.tracked_request import TrackedRequest
from .arrival_load import ArrivalLoad
from .fair_order import Ticket
from .priority_level import Place, PriorityLevel, RequestTicket
from .triage import Waiting, put_off

_MAX_MOVES = 32  # requests that are found to be late in one look at the order: a bound on what it costs
_MAX_TRIAGED = 256  # of a priority, the first ones: a bound on what a look costs, behind which nobody is put off


class RequestQueue:
    """Adding, removing and looking at the first ones cost about the same for ten requests and for ten thousand."""

    def __init__(self, max_size: int, *, by_arrival: bool = False) -> None:
        """`by_arrival`: what a prompt takes moves nobody; objectives of classes and deadlines still do."""
        self.max_size = max_size
        self._by_arrival = by_arrival
        self.num_by_class: Counter[str] = Counter()
        self._num_background = 0
        self._membership = 0  # of the pools, when those that no worker could hold were last looked at
        self._places: dict[TrackedRequest, Place] = {}
        self._levels: dict[int, PriorityLevel] = {}
        self._priorities: list[int] = []  # of the levels, sorted
        self._apart: dict[TrackedRequest, None] = {}  # they wait for something else

    def __len__(self) -> int:
        return len(self._places) + len(self._apart)

    def __iter__(self) -> Iterator[TrackedRequest]:
        """Iterate over a copy, in no order: placing and failing change the queue."""
        return iter([*self._places, *self._apart])

    @property
    def num_waiting(self) -> int:
        """The number of requests that wait for room."""
        return len(self._places)

    def tokens_up_to(self, priority: int) -> int:
        """Return the prompt tokens of those that wait for room and are of this priority or a higher one."""
        return sum(self._levels[one].num_tokens for one in self._priorities[: bisect_right(self._priorities, priority)])

    @property
    def num_bounded(self) -> int:
        """The number of those that somebody waits for: `max_size` is theirs."""
        return len(self) - self._num_background

    @property
    def is_full(self) -> bool:
        """A newcomer that somebody waits for would have to be refused."""
        return self.num_bounded >= self.max_size

    # --- changes --------------------------------------------------------------------------------------------

    def add(self, tracked: TrackedRequest, *, apart: bool = False) -> None:
        self._count(tracked, 1)
        if apart:
            self._apart[tracked] = None
        else:
            self._line_up(tracked)

    def take(self, tracked: TrackedRequest) -> None:
        """Take out a request that is placed: its tenant has had a turn, and has it again if it comes back unserved."""
        place = self._places.pop(tracked, None)
        if place is None:
            self.remove(tracked)
            return
        self._count(tracked, -1)
        level = self._levels[tracked.request.priority]
        level.take(place)
        level.num_hurried -= place.can_miss
        tracked.is_charged = not place.is_late
        self._tidy(tracked.request.priority)

    def remove(self, tracked: TrackedRequest) -> None:
        """Take out a request that has ended, or is to stand in another place. Idempotent."""
        place = self._places.pop(tracked, None)
        if place is not None:
            level = self._levels[tracked.request.priority]
            level.order_of(place).remove(place.ticket)
            level.num_hurried -= place.can_miss
            self._tidy(tracked.request.priority)
        elif tracked in self._apart:
            del self._apart[tracked]
        else:
            return
        self._count(tracked, -1)

    def _count(self, tracked: TrackedRequest, change: int) -> None:
        self.num_by_class[tracked.request.request_class] += change
        self._num_background += change * tracked.request.is_background

    def _line_up(self, tracked: TrackedRequest) -> None:
        request = tracked.request
        ticket = _ticket_of(tracked, by_arrival=self._by_arrival)
        has_objective = request.objectives.ttft_s is not None or tracked.deadline_s is not None
        is_new = not request.attempt_number and not request.is_resume  # else its delay is our doing
        must_hurry = has_objective and is_new
        start_by_s = ticket.due_s - request.unloaded_s if must_hurry else float("inf")
        place, level = Place(ticket, start_by_s), self._level(request.priority)
        self._places[tracked] = place
        level.timely.add(ticket, refund=tracked.is_charged)
        level.num_hurried += place.can_miss
        tracked.is_charged = False

    def _level(self, priority: int) -> PriorityLevel:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = PriorityLevel()
            insort(self._priorities, priority)
        return level

    def _tidy(self, priority: int) -> None:
        if not len(self._levels[priority]):
            del self._levels[priority]
            self._priorities.remove(priority)

    def set_apart(self, tracked: TrackedRequest) -> None:
        """Let it wait for something else than room: `first` lines it up again once it is not put off any more."""
        self.remove(tracked)
        self.add(tracked, apart=True)

    def look_again(self, membership: int) -> None:
        """Line up those again that no worker could hold, if the workers are others than at the last call."""
        if membership != self._membership:
            self._membership = membership
            for tracked in self._apart:
                tracked.search.is_aside = False

    # --- who is next ----------------------------------------------------------------------------------------

    def first(self, number: int, now_s: float, *, embeddings: bool | None = None) -> list[TrackedRequest]:
        """The next ones to serve, in order. None of them stands apart.

        `embeddings`: those alone, or all others alone, by priority and due time, while the rest lacks a worker.
        """
        for tracked in [one for one in self._apart if not (one.must_run_alone or one.is_put_off(now_s))]:
            del self._apart[tracked]
            self._line_up(tracked)
        if embeddings is not None:
            some = (one for one in self._places if (one.request.pooling is not None) is embeddings)
            return heapq.nsmallest(number, some, key=lambda one: (one.request.priority, self._places[one].ticket.entry))
        found: list[TrackedRequest] = []
        for priority in self._priorities:
            if len(found) >= number:
                break
            found += self._first_of(self._levels[priority], number - len(found), now_s)
        return found

    def triage(self, now_s: float, rate: float, arrivals: ArrivalLoad) -> None:
        """Decide who makes way so that the fewest miss their objectives, those of the next moment included.

        `rate`: seconds of work that are done in a second.
        """
        for priority, level in self._levels.items():
            if not level.num_hurried:
                continue  # nobody can be late there: a round for each token or vector does not look at hundreds
            if len(level.timely) and (longest_s := arrivals.longest_s(priority, now_s, rate)) != float("inf"):
                line = self._line(level)
                level.move_to_late(place for place, one in line if one.work_s >= longest_s and one.can_wait(now_s))
            if len(level.timely) > 1:
                level.move_to_late(put_off(self._line(level), now_s, rate))

    def _line(self, level: PriorityLevel) -> list[tuple[Place, Waiting]]:
        """The first of those that can still be in time."""
        places = [self._places[ticket.item] for ticket in islice(level.timely, _MAX_TRIAGED)]
        return [(place, Waiting(place.start_by_s, place.ticket.item.request.unloaded_s)) for place in places]

    def _first_of(self, level: PriorityLevel, number: int, now_s: float) -> list[TrackedRequest]:
        """Return the next requests of a level; who is found to be late on the way is late from now on."""
        moves = _MAX_MOVES
        while True:
            found: list[TrackedRequest] = []
            late: list[Place] = []
            for ticket in level.in_order():
                place = self._places[ticket.item]
                if place.start_by_s < now_s and not place.is_late and len(late) < moves:
                    late.append(place)
                    continue
                found.append(ticket.item)
                if len(found) == number:
                    break
            if not late:
                return found
            level.move_to_late(late)
            moves -= len(late)

    def alone(self, now_s: float) -> list[TrackedRequest]:
        """Return the requests that wait for a worker of their own."""
        alone = [tracked for tracked in self._apart if tracked.must_run_alone and not tracked.is_put_off(now_s)]
        return sorted(alone, key=lambda tracked: (tracked.request.priority, tracked.request.arrival))

    # --- for newcomers --------------------------------------------------------------------------------------

    def ahead_of(self, request: RouterRequest, now_s: float) -> tuple[int, int]:
        """Prompt tokens and requests that it would wait behind if it came now."""
        deadline_s = None if request.timeout_s is None else now_s + request.timeout_s
        due = due_s(request, now_s, deadline_s, by_arrival=self._by_arrival)
        tokens = number = 0
        for priority in self._priorities:
            level = self._levels[priority]
            if priority > request.priority:
                break
            if priority < request.priority:
                tokens += level.num_tokens
                number += len(level)
            else:
                own_tokens, own_number = level.ahead_of(request, due)
                tokens, number = tokens + own_tokens, number + own_number
        return tokens, number

    def victim_for(self, request: RouterRequest) -> TrackedRequest | None:
        """Return who makes room for it in a full queue: the last one due whose client has got nothing yet.

        Looked at are those of the lowest priority below its own, or, where its own tenant has fewer requests here than
        another one, those of the other one.
        """
        for priority in reversed(self._priorities):
            level = self._levels[priority]
            if priority < request.priority:
                break
            least = 0 if priority > request.priority else level.num_of(request.tenant) + 2
            names = level.tenants()
            sizes = sorted(((level.num_of(name), name) for name in names), reverse=True)
            for size, name in sizes:
                if size < least:
                    break
                found = level.last_of(name)
                if found is not None:
                    return found
        return None


def due_s(request: RouterRequest, queued_s: float, deadline_s: float | None, *, by_arrival: bool = False) -> float:
    """Return when its first token is due. Without an objective, long prompts may wait for longer all the same."""
    objectives, unloaded_s = request.objectives, 0.0 if by_arrival else request.unloaded_s
    limit_s = objectives.ttft_limit_s(unloaded_s)
    due = queued_s + (limit_s if limit_s is not None else objectives.ttft_stretch * unloaded_s)
    return due if deadline_s is None else min(due, deadline_s)


def _ticket_of(tracked: TrackedRequest, *, by_arrival: bool) -> RequestTicket:
    request = tracked.request
    due = due_s(request, request.timestamps["queued"], tracked.deadline_s, by_arrival=by_arrival)
    cost = request.num_prompt_tokens / request.objectives.weight
    return Ticket(tracked, request.tenant, request.arrival, due, request.num_prompt_tokens, cost)
