"""The load of a chaos run: a fixed number of requests in flight, each judged when it ends.

    references: every ask once, undisturbed  ->  load: asks drawn at random until told to stop  ->  results

Only what the tally needs is kept of a request that is over; the whole of it goes to the history file.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter

from ...common.errors import ConfigError
from ..load.http_client import HttpClient
from .client import send
from .events import Event, Request, RequestEvent, Sent
from .history import Counted, Verdict, counted, judge
from .requests import Ask, Body

_PAUSE_AFTER_FAILURE_S = 0.2  # a system that refuses is not flooded
_LEAVE_AFTER_S = (0.002, 1.0)  # while it waits, while its prompt is computed or handed over, and in the answer


@dataclass(slots=True)
class Result:
    """A request that is over."""

    number: int
    ask: int
    kind: str
    sent_s: float
    ended_s: float
    answer_id: str
    verdict: Verdict
    counted: Counted | None
    failure: str  # empty: it was answered, or lost, or its client left
    times_s: array[float]  # of its chunks
    has_left: bool = False


class Load:
    """Sends, and knows what became of each request. `tell` hears every event; `numbers` are those of the requests."""

    def __init__(
        self,
        base_url: str,
        began_s: float,
        tell: Callable[[Event], None],
        numbers: Iterator[int] | None = None,
        *,
        comes_back: bool = False,
        leaving: float = 0.0,
    ) -> None:
        """`comes_back`: each client does, when its connection ends too early; the share `leaving` ends it."""
        self.results: list[Result] = []
        self.references: dict[int, Request] = {}  # by ask
        self._client = HttpClient(base_url)
        self._began_s = began_s
        self._tell = tell
        self._numbers = numbers if numbers is not None else count(1)
        self._comes_back = comes_back
        self._leaving = leaving

    async def compute_references(self, asks: Sequence[Ask], concurrency: int) -> list[Ask]:
        """The answers that are right. Returns the asks, those with a stop string complete. Raises ConfigError."""
        waiting = iter(asks)
        complete: dict[int, Ask] = {}

        async def lane() -> None:
            for ask in waiting:
                body = ask.body
                if ask.follows is not None:
                    first = asks[ask.follows]
                    body = _following(body, await self._send(next(self._numbers), first, first.body, is_silent=True))
                if ask.wants_stop:
                    plain = await self._send(next(self._numbers), ask, body, is_silent=True)
                    ask = ask.with_stop(plain.answer()[0])
                    body = ask.body
                request = await self._send(next(self._numbers), ask, body, is_reference=True)
                if (breaches := judge(request).breaches) or not request.is_done:
                    failure = request.failure.message if request.failure is not None else "no answer"
                    raise ConfigError(f"undisturbed {ask.kind} request: {breaches[0] if breaches else failure}")
                complete[ask.number], self.references[ask.number] = ask, request

        await _run_lanes(lane, concurrency)
        return [complete[number] for number in sorted(complete)]

    async def run(self, asks: Sequence[Ask], concurrency: int, seed: int, stop: asyncio.Event) -> None:
        """Send requests until `stop` is set and the last one has ended."""
        source = random.Random(seed)

        async def take(ask: Ask, body: Body) -> Request:
            leave_after_s = source.uniform(*_LEAVE_AFTER_S) if source.random() < self._leaving else None
            request = await self._send(next(self._numbers), ask, body, leave_after_s=leave_after_s)
            self.results.append(result := self._result(request))
            if result.failure or result.verdict.is_lost:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)
            return request

        async def lane() -> None:
            while not stop.is_set():
                ask = source.choice(asks)
                body = ask.send_body(source)
                if ask.follows is not None:
                    first = asks[ask.follows]
                    earlier = await take(first, first.send_body(source))
                    if not earlier.is_done:
                        continue
                    body = _following(body, earlier)
                await take(ask, body)

        await _run_lanes(lane, concurrency)

    async def _send(
        self,
        number: int,
        ask: Ask,
        body: Body,
        *,
        is_reference: bool = False,
        is_silent: bool = False,
        leave_after_s: float | None = None,
    ) -> Request:
        events: list[RequestEvent] = []

        def tell(event: RequestEvent) -> None:
            events.append(event)
            if not is_silent:
                self._tell(event)

        key = uuid.uuid4().hex if self._comes_back else None
        await send(
            self._client,
            number,
            ask,
            body,
            tell,
            began_s=self._began_s,
            is_reference=is_reference,
            key=key,
            leave_after_s=leave_after_s,
        )
        return collect(events)

    def _result(self, request: Request) -> Result:
        failure = request.failure
        return Result(
            number=request.number,
            ask=request.sent.ask,
            kind=request.sent.kind,
            sent_s=request.sent.at_s,
            ended_s=perf_counter() - self._began_s,
            answer_id=request.answer_id,
            verdict=judge(request, self.references.get(request.sent.ask)),
            counted=counted(request),
            failure="" if failure is None else f"{failure.status} {failure.code}: {failure.message}",
            has_left=request.has_left,
            times_s=array("d", request.chunk_times_s()),
        )

    def close(self) -> None:
        self._client.close()


def _following(body: Body, earlier: Request) -> Body:
    """Return the body of a request that goes on with an answer."""
    return body | {"previous_response_id": f"resp_{earlier.answer_id}"}


async def _run_lanes(lane: Callable[[], Coroutine[object, object, None]], count: int) -> None:
    try:
        async with asyncio.TaskGroup() as lanes:
            for _ in range(count):
                lanes.create_task(lane())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


def collect(events: Iterable[RequestEvent]) -> Request:
    """The events of one request, as one."""
    first, *rest = events
    assert isinstance(first, Sent)
    request = Request(first)
    for event in rest:
        request.add(event)
    return request
