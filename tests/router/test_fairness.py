"""Floods through the whole router: API keys, the real dispatcher and its queue. What counts is the order of service."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import pytest

from kvferry.common.router_config import RequestClass
from kvferry.router.access.keys import ApiKeys
from kvferry.router.app import build_app
from kvferry.router.metrics.metrics import RouterMetrics
from kvferry.router.state.classes import RequestClasses
from kvferry.router.state.request import RouterRequest
from kvferry.router.state.token_stream import TokenStream
from kvferry.router.state.views import PoolView
from kvferry.wire.tasks import LocalTask

from .fakes import MODEL, catalogue_of
from .fleet import Fleet, config, tokens

KEYS = ("flooding-key", "quiet-key")


class Router:
    """The application over a dispatcher with one worker that takes one request at a time."""

    def __init__(self, **changes: object) -> None:
        self.fleet = Fleet(config(expect_prefill=False, **changes))
        self.worker = self.fleet.join("d-0", max_num_seqs=1, max_num_batched_tokens=16)
        self.app = build_app(
            catalogue_of(self),
            RouterMetrics(MODEL),
            keys=ApiKeys(KEYS),
            clock=self.fleet.clock,
            seed=1,
            classes=RequestClasses.from_config(self.fleet.config),
        )
        self._submitted = asyncio.Event()
        self._tasks: list[asyncio.Task[httpx.Response]] = []
        transport = httpx.ASGITransport(self.app)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    # --- what the API needs of a dispatcher ---------------------------------------------------------------------

    def submit(self, request: RouterRequest) -> TokenStream:
        stream = self.fleet.dispatcher.submit(request)
        self._submitted.set()
        return stream

    def longest_answer(self, num_prompt_tokens: int, num_choices: int, limit: int) -> int:
        return self.fleet.dispatcher.longest_answer(num_prompt_tokens, num_choices, limit)

    def ready(self) -> list[str]:
        return self.fleet.dispatcher.ready()

    def view(self) -> PoolView:
        return self.fleet.dispatcher.view()

    # --- clients and the worker ---------------------------------------------------------------------------------

    async def ask(
        self, key: str, number: int = 1, *, may_be_refused: bool = False, user: str | None = None, name: str = "default"
    ) -> None:
        """Returns when all of them are queued, or refused. `name`: of their class."""
        headers = {"authorization": f"Bearer {key}", "x-request-class": name}
        body = {"prompt": "abcd", "max_tokens": 2, "user": user}
        for _ in range(number):
            self._submitted.clear()
            task = asyncio.create_task(self._client.post("/v1/completions", json=body, headers=headers))
            self._tasks.append(task)
            submitted = asyncio.create_task(self._submitted.wait())
            await asyncio.wait((task, submitted), return_when=asyncio.FIRST_COMPLETED)
            submitted.cancel()
            assert may_be_refused or not task.done() or task.result().status_code == 200

    async def serve(self, number: int) -> list[str]:
        """Whose requests the worker gets, one after the other: the first digits of their tenants."""
        served = []
        for _ in range(number):
            task = self.worker.take(LocalTask)
            tracked = self.fleet.dispatcher._in_flight.get(task.spec.request_id)
            assert tracked is not None
            served.append(tracked.request.tenant)
            self.fleet.clock.advance(0.1)
            self.fleet.step(self.worker, task, tokens(0, 0, 1, "stop"))
            self.fleet.beat(self.worker)
            await asyncio.sleep(0)
        return served

    async def close(self) -> list[httpx.Response]:
        while self.worker.sent:
            await self.serve(1)
        answers = await asyncio.gather(*self._tasks)
        await self._client.aclose()
        assert not self.fleet.dispatcher.breaches()
        return answers


async def test_a_flood_of_one_key_does_not_delay_another_keys_requests() -> None:
    router = Router()
    await router.ask(KEYS[0], 60)
    await router.serve(5)
    await router.ask(KEYS[1], 3)
    served = await router.serve(8)
    [quiet] = [tenant for tenant, number in Counter(served).items() if number == 3]
    places = [place for place, tenant in enumerate(served) if tenant == quiet]
    assert places[-1] <= 6  # the one that ran already, then turn by turn
    answers = await router.close()
    assert {answer.status_code for answer in answers} == {200}


async def test_many_users_behind_one_key_are_one_tenant() -> None:
    router = Router()
    await router.ask(KEYS[0], 30)
    await router.ask(KEYS[0], 1, user="somebody")
    served = await router.serve(31)
    assert len(set(served)) == 1
    await router.close()


async def test_a_flood_with_an_objective_does_not_get_another_keys_request_refused() -> None:
    router = Router(ttft_objective_ms=1500.0)
    await router.ask(KEYS[0], 12)
    await router.serve(12)  # ten a second: it is known by now
    await router.ask(KEYS[0], 40, may_be_refused=True)
    queued = router.fleet.dispatcher.view().num_queued
    assert queued < 20 and router.fleet.observer.rejected["objective"] == 39 - queued
    await router.ask(KEYS[1], 1)  # it is queued, not refused
    served = await router.serve(3)
    assert len(set(served)) == 2
    answers = await router.close()
    assert Counter(answer.status_code for answer in answers)[429] == 39 - queued


async def test_a_full_queue_makes_room_for_who_has_less_in_it() -> None:
    router = Router(max_queue=10)
    await router.ask(KEYS[0], 11)  # one runs
    await router.ask(KEYS[1], 1)
    served = await router.serve(3)
    assert len(set(served)) == 2
    answers = await router.close()
    assert Counter(answer.status_code for answer in answers) == {200: 11, 429: 1}
    assert router.fleet.observer.rejected == {"displaced": 1}


@pytest.mark.parametrize("priority", [0, 1])
async def test_urgency_goes_before_shares(priority: int) -> None:
    router = Router(classes=(RequestClass(name="batch", priority=priority),))
    await router.ask(KEYS[0], 10)
    await router.ask(KEYS[1], 1, name="batch")
    served = await router.serve(11)
    assert (len(set(served[:10])) == 1) is (priority == 1)
    await router.close()
