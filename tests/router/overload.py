"""A server in virtual time, under more load than it can take: the dispatcher is real, its workers are arithmetic.

Each worker computes prompts one after the other at a fixed rate and decodes any number of answers beside that; an
answer ends `decode_s` after its first token and holds its row until then. Arrivals are drawn from a seed.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from kvferry.common.errors import CapacityError
from kvferry.router.state.request import RequestStatus
from kvferry.router.state.token_stream import TokenStream
from kvferry.wire.tasks import LocalTask

from .fleet import Fleet, Link, config, received, tokens

STEP_S = 0.005
HEARTBEAT_S = 0.1


@dataclass
class Server:
    """One worker."""

    link: Link
    tokens_per_s: float
    decode_s: float
    prompts: deque[tuple[LocalTask, float]] = field(default_factory=deque)  # with the tokens that are left
    answers: deque[tuple[LocalTask, float]] = field(default_factory=deque)  # with the time of their end
    steps: int = 0

    def run(self, fleet: Fleet, seconds: float) -> None:
        now = fleet.clock.now()
        while self.link.sent:
            message = self.link.sent.pop(0)
            if isinstance(message, LocalTask):
                self.prompts.append((message, float(message.spec.num_prompt_tokens)))
        while self.answers and self.answers[0][1] <= now:
            task, _ = self.answers.popleft()
            fleet.step(self.link, task, tokens(0, 1, 1, "stop"))
        budget = self.tokens_per_s * seconds
        while self.prompts and budget > 0:
            task, left = self.prompts.popleft()
            if left > budget:
                self.prompts.appendleft((task, left - budget))
                break
            budget -= left
            self.steps += 1
            fleet.step(self.link, task, tokens(0, 0, 1))
            self.answers.append((task, now + self.decode_s))

    def beat(self, fleet: Fleet) -> None:
        fleet.beat(
            self.link,
            num_running=len(self.answers) + bool(self.prompts),
            num_waiting=max(0, len(self.prompts) - 1),
            waiting_tokens=int(sum(left for _, left in self.prompts)),
            num_free_blocks=4096,
            num_blocks=4096,
            steps=self.steps,
            step_tokens=512,
            step_s=512 / self.tokens_per_s,
        )


@dataclass
class Outcome:
    """What the clients saw. Prompt tokens are the unit of work."""

    offered: int = 0  # tokens
    good: int = 0  # tokens of requests whose first token came within the objective
    ttfts_s: list[float] = field(default_factory=list)
    num_refused: int = 0
    num_late: int = 0  # admitted, and sent away from the queue
    retry_after_s: list[float] = field(default_factory=list)
    longest_queue: int = 0

    def ttft_s(self, share: float) -> float:
        return sorted(self.ttfts_s)[int(share * (len(self.ttfts_s) - 1))]


def lengths(rng: random.Random) -> int:
    """Prompt tokens: most are short, some eight times as long."""
    return rng.choice((64, 64, 128, 128, 256, 512))


def simulate(
    load: float,
    *,
    objective_s: float,
    seconds: float,
    num_workers: int = 2,
    tokens_per_s: float = 4000.0,
    decode_s: float = 0.2,
    max_num_seqs: int = 256,
    rows_per_s: float | None = None,
    warm_s: float = 0.0,
    seed: int = 1,
) -> Outcome:
    """`load` times what the workers can do arrives. `rows_per_s`: their rate where rows are what is scarce."""
    rng = random.Random(seed)
    fleet = Fleet(config(expect_prefill=False, ttft_objective_ms=objective_s * 1e3))
    servers = [
        Server(
            fleet.join(f"d-{i}", num_blocks=4096, max_num_seqs=max_num_seqs, max_num_batched_tokens=512),
            tokens_per_s,
            decode_s,
        )
        for i in range(num_workers)
    ]
    mean_tokens = (64 + 64 + 128 + 128 + 256 + 512) / 6
    capacity_per_s = num_workers * (tokens_per_s / mean_tokens if rows_per_s is None else rows_per_s)
    outcome, streams = Outcome(), list[tuple[TokenStream, float]]()
    next_s, beat_s = fleet.clock.now(), 0.0
    begin_s = fleet.clock.now() + warm_s
    end_s = begin_s + seconds
    while fleet.clock.now() < end_s:
        now = fleet.clock.now()
        while next_s <= now:
            rate = capacity_per_s * (load if now >= begin_s else min(load, 0.5))
            next_s += rng.expovariate(rate)
            num_tokens = lengths(rng)
            counts = now >= begin_s
            outcome.offered += num_tokens * counts
            try:
                streams.append((fleet.submit(num_tokens, max_tokens=4), now if counts else -1.0))
            except CapacityError as error:
                outcome.num_refused += 1
                outcome.retry_after_s.append(error.retry_after_s)
        fleet.clock.advance(STEP_S)
        for server in servers:
            server.run(fleet, STEP_S)
        if fleet.clock.now() >= beat_s:
            beat_s = fleet.clock.now() + HEARTBEAT_S
            for server in servers:
                server.beat(fleet)
            fleet.dispatcher.tick()
            outcome.longest_queue = max(outcome.longest_queue, fleet.dispatcher.view().num_queued)
    for stream, at_s in streams:
        if at_s >= 0:
            _count(outcome, stream, objective_s)
    assert not fleet.dispatcher.breaches()
    return outcome


def _count(outcome: Outcome, stream: TokenStream, objective_s: float) -> None:
    request = stream.request
    received(stream)
    if request.status is RequestStatus.FAILED:
        outcome.num_late += 1
        return
    first_s = request.timestamps.get("first_token")
    if first_s is None:
        return
    ttft_s = first_s - request.timestamps["queued"]
    outcome.ttfts_s.append(ttft_s)
    if ttft_s <= objective_s:
        outcome.good += request.num_prompt_tokens
