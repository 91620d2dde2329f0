"""Faults on a real cluster: streams of every kind, what they should say, and one fault at a time.

Drill.learn          the answers of an undisturbed cluster
Drill.arm            a failpoint for whichever process comes to it first
Drill.stream         all kinds at once; `judge` holds each against what was learned
Drill.settle         every worker is there, no block is held and none is in quarantine
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import psutil

from kvferry.common.config import FAILPOINTS_VARIABLE
from kvferry.tools.chaos.client import send
from kvferry.tools.chaos.events import Delta, Request, RequestEvent
from kvferry.tools.chaos.history import judge
from kvferry.tools.chaos.load import collect
from kvferry.tools.chaos.requests import Ask, Body
from kvferry.tools.chaos.serve_system import Sample, parse_metrics
from kvferry.tools.chaos.system import balance
from kvferry.tools.load.http_client import HttpClient

from .cluster import Cluster, wait_until

NUM_TOKENS = 100
SOME_TOKENS = 4  # have been told: the stream flows
_SETTLED_WITHIN_S = 240.0


def ask(number: int, kind: str, *, is_stream: bool = True, **more: object) -> Ask:
    """Its prompt fills some blocks and a part of one."""
    prompt = [(number * 37 + 5 * i * i + 3 * i) % 400 + 4 for i in range(50 + 23 * number)]
    body: Body = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "seed": number, "ignore_eos": True}
    body |= {"stream": is_stream, "return_token_ids": True, **more}
    if is_stream:
        body["stream_options"] = {"include_usage": True}
    num_choices = body.get("n", 1)
    assert isinstance(num_choices, int)
    return Ask(number, kind, "/v1/completions", body, num_choices, NUM_TOKENS, is_stream, wants_stop=kind == "stop")


ASKS = (
    ask(0, "greedy", temperature=0),
    ask(1, "seeded", temperature=1.0),
    ask(2, "choices", temperature=0.9, n=2),
    ask(3, "stop", temperature=0),
    ask(4, "logprobs", temperature=0.8, logprobs=2),
    ask(5, "penalties", temperature=1.0, frequency_penalty=0.5, presence_penalty=0.3),
)


def _salted(one: Ask) -> Ask:
    """No prefix cache knows the prompt: its KV has to be computed and shipped."""
    return replace(one, body={**one.body, "cache_salt": uuid.uuid4().hex})


@dataclass
class Drill:
    """On this host; a subclass reaches a router elsewhere."""

    failpoints: Path
    num_workers: int
    asks: list[Ask] = field(default_factory=list)
    references: dict[int, Request] = field(default_factory=dict)

    # --- how the router is reached ----------------------------------------------------------------------------

    def send(self, asks: Sequence[Ask], when_flowing: Callable[[], None]) -> dict[int, list[RequestEvent]]:
        """All at once; `when_flowing` is called once each has told some tokens. Returns the events of each."""
        raise NotImplementedError

    def metrics(self) -> list[Sample]:
        raise NotImplementedError

    def log_tail(self) -> str:
        raise NotImplementedError

    # --- the drill --------------------------------------------------------------------------------------------

    @staticmethod
    def environment(failpoints: Path) -> dict[str, str]:
        return {FAILPOINTS_VARIABLE: f"@{failpoints}"}

    def arm(self, text: str) -> None:
        fresh = self.failpoints.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.failpoints)

    @property
    def has_acted(self) -> bool:
        """The fault that was armed has happened: who acts takes the file away."""
        return not self.failpoints.exists()

    def learn(self, asks: Sequence[Ask] = ASKS) -> None:
        for one in asks:
            if one.wants_stop:
                [plain] = self.stream([one])
                one = replace(one.with_stop(plain.answer()[0]), wants_stop=False)
            [self.references[one.number]] = self.stream([one])
            self.asks.append(one)
        assert all(request.is_done for request in self.references.values()), self.log_tail()

    def stream(
        self, asks: Sequence[Ask] | None = None, *, when_flowing: Callable[[], None] = lambda: None
    ) -> list[Request]:
        """Send all that were learned, or `asks`, and read them to their ends."""
        salted = [_salted(one) for one in (self.asks if asks is None else asks)]
        events = self.send(salted, when_flowing)
        return [collect(events[one.number]) for one in salted]

    def stream_beside(self, act: Callable[[], None]) -> list[Request]:
        """The same while `act` runs, from the first request on."""
        with ThreadPoolExecutor(1) as beside:
            acting = beside.submit(act)
            requests = self.stream()
            acting.result()
        return requests

    def check(self, requests: Sequence[Request]) -> None:
        """To the byte what an undisturbed cluster said."""
        for request in requests:
            verdict = judge(request, self.references[request.sent.ask])
            assert request.is_done, f"{request.sent.kind}: {request.failure}\n{self.log_tail()}"
            assert verdict.breaches == [], request.sent.kind

    def settle(self, *, quarantine_ends: bool = True) -> None:
        """Wait for it. A quarantine that nobody needs may last ten seconds: not each test has to see its end."""

        def is_settled() -> bool:
            books = balance(self.metrics())
            if not quarantine_ends:
                books.num_quarantined = 0
            return books.is_quiet and books.num_workers == self.num_workers

        try:
            wait_until(is_settled, "rest", _SETTLED_WITHIN_S)
        except AssertionError as error:
            samples = self.metrics()
            blocks = [(s.labels, s.value) for s in samples if s.name == "kvferry_blocks" and s.value]
            raise AssertionError(f"{error}: {balance(samples)}\n{blocks}\n{self.log_tail()}") from error

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        samples = [sample for sample in self.metrics() if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@dataclass
class LocalDrill(Drill):
    cluster: Cluster = field(kw_only=True)
    killed: dict[str, psutil.Process] = field(default_factory=dict)
    comes_back: bool = False  # each client does, when its connection ends too early

    def send(self, asks: Sequence[Ask], when_flowing: Callable[[], None]) -> dict[int, list[RequestEvent]]:
        return asyncio.run(self._send(asks, when_flowing))

    async def _send(self, asks: Sequence[Ask], when_flowing: Callable[[], None]) -> dict[int, list[RequestEvent]]:
        client = HttpClient(self.cluster.base_url)
        began_s = perf_counter()
        missing = {one.number: SOME_TOKENS for one in asks}
        events: dict[int, list[RequestEvent]] = {one.number: [] for one in asks}

        def tell(event: RequestEvent) -> None:
            events[event.request].append(event)
            if isinstance(event, Delta) and event.text and event.request in missing:
                missing[event.request] -= 1
                if not missing[event.request]:
                    del missing[event.request]
                    if not missing:
                        when_flowing()

        keys = {one.number: uuid.uuid4().hex if self.comes_back else None for one in asks}
        try:
            await asyncio.gather(
                *(send(client, one.number, one, one.body, tell, began_s=began_s, key=keys[one.number]) for one in asks)
            )
        finally:
            client.close()
        return events

    def metrics(self) -> list[Sample]:
        return parse_metrics(self.cluster.client.get("/metrics").text)

    def log_tail(self) -> str:
        return self.cluster.log.read_text()[-3000:]

    def kill(self, worker_ids: Sequence[str]) -> None:
        """All at once. `settle` waits for others in their places: nobody may have noticed yet that they are gone."""
        victims = {}
        for worker_id in worker_ids:
            [victims[worker_id]] = self._children(worker_id)
        self.killed |= victims
        # Nothing else in between: a router that is quicker tries a request on one that lives still, and then it is one
        # that three workers died of.
        for pid in [child.pid for child in victims.values()]:
            os.kill(pid, signal.SIGKILL)

    @contextlib.contextmanager
    def workers_stand_still(self) -> Iterator[None]:
        """For less time than a router takes one for hung that is silent."""
        workers = [*self.cluster.programs("p-"), *self.cluster.programs("d-")]
        for worker in workers:
            worker.suspend()
        try:
            yield
        finally:
            for worker in workers:
                worker.resume()

    def settle(self, *, quarantine_ends: bool = True) -> None:
        def is_replaced() -> bool:
            try:
                now = {name: [child.pid for child in self._children(name)] for name in self.killed}
            except psutil.Error:  # one of them has just gone
                return False
            return all(now[name] not in ([], [killed.pid]) for name, killed in self.killed.items())

        wait_until(is_replaced, f"others than {[*self.killed]}", _SETTLED_WITHIN_S)
        self.killed.clear()
        super().settle(quarantine_ends=quarantine_ends)

    def _children(self, worker_id: str) -> list[psutil.Process]:
        return self.cluster.programs(worker_id)
