"""The order between requests of equal urgency: fair shares between tenants, and by due time as far as shares allow.

Service is counted in virtual time, which grows as it would if all tenants that wait were served at once, each at an
equal rate. A tenant may be served as soon as its own count is not ahead of it:

    served  ─> its tenant's count + cost, virtual time + cost / tenants that wait
    next    ─> of the tenants whose count is not ahead, the one whose first request is due first

So a tenant that floods is ahead after one request and waits until the others have had as much, while tenants that ask
little are served by due time alone, as one tenant's own requests are. What somebody did not ask for is not saved up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

from .ordered import Ordered

Item = TypeVar("Item")


@dataclass(slots=True, eq=False)
class Ticket(Generic[Item]):
    """A place in the order."""

    item: Item
    tenant: str
    number: int  # unique: who came first, where two are due at the same time
    due_s: float
    num_tokens: int
    cost: float  # what its tenant is charged: tokens, less for those who weigh more

    @property
    def entry(self) -> tuple[float, int, Ticket[Item]]:
        return (self.due_s, self.number, self)


def _tokens_of(entry: tuple[float, int, Ticket[Item]]) -> int:
    return entry[2].num_tokens


@dataclass(slots=True, eq=False)
class _Tenant(Generic[Item]):
    """One that waits. It is in one of two lists, under the key that it had when it was put there."""

    name: str
    number: int
    start: float  # its count: from this virtual time on it may be served
    tickets: Ordered[tuple[float, int, Ticket[Item]]] = field(default_factory=lambda: Ordered(_tokens_of))
    is_eligible: bool = False
    key: tuple[float, int] = (0.0, 0)


@dataclass(slots=True, eq=False)
class _Turn(Generic[Item]):
    """A tenant's place while the order is looked at and nothing is served."""

    tickets: Iterator[tuple[float, int, Ticket[Item]]]
    ticket: Ticket[Item]
    start: float


_Listed = tuple[float, int, _Tenant[Item]]


class FairOrder(Generic[Item]):
    """Tickets of any number of tenants. All operations cost a few binary searches."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._size = 0
        self._tenants: dict[str, _Tenant[Item]] = {}
        self._virtual = 0.0
        self._eligible: Ordered[_Listed[Item]] = Ordered()  # by their first ticket
        self._ahead: Ordered[_Listed[Item]] = Ordered()  # of virtual time; by their count
        self._left: dict[str, float] = {}  # counts of tenants that wait no more and are ahead
        self._leaving: list[tuple[float, str]] = []  # a heap of (count, tenant) over `_left`
        self._numbers = count()

    def __len__(self) -> int:
        return self._size

    # --- changes --------------------------------------------------------------------------------------------

    def add(self, ticket: Ticket[Item], *, refund: bool = False) -> None:
        """`refund`: it was charged before and got nothing for it."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None:
            start = max(self._virtual, self._left.pop(ticket.tenant, 0.0))
            tenant = self._tenants[ticket.tenant] = _Tenant(ticket.tenant, next(self._numbers), start)
        else:
            self._unlist(tenant)
        if refund:
            tenant.start = max(self._virtual, tenant.start - ticket.cost)
        tenant.tickets.add(ticket.entry)
        self._size += 1
        self.num_tokens += ticket.num_tokens
        self._list(tenant)

    def remove(self, ticket: Ticket[Item]) -> None:
        """Take out a ticket that leaves unserved."""
        tenant = self._tenants[ticket.tenant]
        self._unlist(tenant)
        self._drop(tenant, ticket)
        self._let_in()

    def take(self, ticket: Ticket[Item]) -> None:
        """Take out a ticket that is served: its tenant is charged."""
        tenant = self._tenants[ticket.tenant]
        self._unlist(tenant)
        tenant.start += ticket.cost
        self._virtual += ticket.cost / len(self._tenants)
        self._drop(tenant, ticket)
        self._let_in()

    def _drop(self, tenant: _Tenant[Item], ticket: Ticket[Item]) -> None:
        tenant.tickets.remove(ticket.entry)
        self._size -= 1
        self.num_tokens -= ticket.num_tokens
        if len(tenant.tickets):
            self._list(tenant)
            return
        del self._tenants[tenant.name]
        if not self._tenants:  # nobody waits: what was before does not matter to those who come
            self._virtual = 0.0
            self._left.clear()
            self._leaving.clear()
        elif tenant.start > self._virtual:
            self._left[tenant.name] = tenant.start
            heappush(self._leaving, (tenant.start, tenant.name))

    def _list(self, tenant: _Tenant[Item]) -> None:
        tenant.is_eligible = tenant.start <= self._virtual
        if tenant.is_eligible:
            due_s, number, _ = tenant.tickets.first
            tenant.key = (due_s, number)
            self._eligible.add((*tenant.key, tenant))
        else:
            tenant.key = (tenant.start, tenant.number)
            self._ahead.add((*tenant.key, tenant))

    def _unlist(self, tenant: _Tenant[Item]) -> None:
        (self._eligible if tenant.is_eligible else self._ahead).remove((*tenant.key, tenant))

    def _let_in(self) -> None:
        """Let in those whose turn it is by now. If it is nobody's, virtual time goes on to who is least ahead."""
        if not len(self._eligible) and len(self._ahead):
            self._virtual = max(self._virtual, self._ahead.first[0])
        while len(self._ahead) and self._ahead.first[0] <= self._virtual:
            tenant = self._ahead.first[2]
            self._unlist(tenant)
            self._list(tenant)
        while self._leaving and self._leaving[0][0] <= self._virtual:
            start, name = heappop(self._leaving)
            if self._left.get(name) == start:
                del self._left[name]

    # --- reading --------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Ticket[Item]]:
        """Yield tickets in the order of service if nobody comes. Costs what is read; ends with any change."""
        virtual, num_waiting = self._virtual, len(self._tenants)
        listed = iter(self._eligible)
        resting = iter(self._ahead)
        first, next_ahead = next(listed, None), next(resting, None)
        ready: list[tuple[float, int, _Turn[Item]]] = []
        ahead: list[tuple[float, int, _Turn[Item]]] = []
        while True:
            while next_ahead is not None and next_ahead[0] <= virtual:
                _push(ready, _turn_of(next_ahead[2]))
                next_ahead = next(resting, None)
            while ahead and ahead[0][0] <= virtual:
                _push(ready, heappop(ahead)[2])
            if first is not None and (not ready or first[:2] < ready[0][:2]):
                _push(ready, _turn_of(first[2]))
                first = next(listed, None)
            if not ready:
                starts = [entry[0] for entry in (next_ahead, ahead[0] if ahead else None) if entry is not None]
                if not starts:
                    return
                virtual = min(starts)
                continue
            turn = heappop(ready)[2]
            ticket = turn.ticket
            yield ticket
            turn.start += ticket.cost
            virtual += ticket.cost / num_waiting
            following = next(turn.tickets, None)
            if following is None:
                num_waiting -= 1
            else:
                turn.ticket = following[2]
                heappush(ahead, (turn.start, turn.ticket.number, turn))

    def ahead_of(self, tenant: str, due_s: float, num_tokens: int) -> tuple[int, int]:
        """Tokens and number of those that a newcomer waits behind: its tenant's that are due before it, and of each
        other tenant as many tokens as its own tenant gets until then, if they are there."""
        own = self._tenants.get(tenant)
        tokens, number = (0, 0) if own is None else own.tickets.before((due_s, float("inf")))
        num_own, own_tokens = (0, 0) if own is None else (len(own.tickets), own.tickets.weight)
        num_others = len(self._tenants) - (own is not None)
        if not num_others:
            return tokens, number
        their_tokens, theirs = self.num_tokens - own_tokens, self._size - num_own
        share = min(their_tokens, num_others * (tokens + num_tokens))
        return tokens + share, number + round(theirs * share / max(1, their_tokens))

    def num_of(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return 0 if known is None else len(known.tickets)

    def tenants(self) -> Iterator[tuple[str, int]]:
        """Yield each tenant that waits, with the number of its tickets."""
        return ((tenant.name, len(tenant.tickets)) for tenant in self._tenants.values())

    def backwards(self, tenant: str) -> Iterator[Ticket[Item]]:
        """A tenant's tickets, the last one due first."""
        known = self._tenants.get(tenant)
        return (ticket for _, _, ticket in reversed(known.tickets)) if known is not None else iter(())


def _turn_of(tenant: _Tenant[Item]) -> _Turn[Item]:
    tickets = iter(tenant.tickets)
    return _Turn(tickets, next(tickets)[2], tenant.start)


def _push(heap: list[tuple[float, int, _Turn[Item]]], turn: _Turn[Item]) -> None:
    heappush(heap, (turn.ticket.due_s, turn.ticket.number, turn))
