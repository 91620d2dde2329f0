"""The outcome of a run: one row for each request, and the figures that are made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..tools.load.stats import Distribution, describe, describe_ms
from .lengths import TOO_LONG
from .scenario import Failure, Goals


class RequestOutcome(NamedTuple):
    """One request, in seconds since the run's start. A time is None where it never came to that."""

    number: int  # in the order of arrival
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int  # got; of those that ended well all that the trace has, unless cut
    ended: str  # finished, failed, refused, lost
    ttft_s: float | None
    tpot_s: float | None  # None for a single token, too
    end_s: float | None
    unloaded_s: float  # first token from an empty prefill worker
    num_cached_tokens: int = 0
    num_attempts: int = 1
    is_local: bool = False  # the decode worker computed its prompt
    is_embedding: bool = False  # its first token is its embedding
    error: str = ""
    is_cut: bool = False  # it ended well where the model's context does, before the trace's answer

    def is_good(self, goals: Goals) -> bool:
        """Both objectives are met."""
        if self.ended != "finished" or self.ttft_s is None or self.ttft_s > goals.ttft_limit_s(self.unloaded_s):
            return False
        return self.tpot_s is None or self.tpot_s <= goals.tpot_s


class FleetSample(NamedTuple):
    """The fleet at one moment."""

    at_s: float
    num_prefill: int
    num_decode: int
    num_pending: int
    num_queued: int
    num_live: int


@dataclass(frozen=True)
class Outcome:
    """All that came of a scenario. The same scenario gives the same outcome, but for real CPU time."""

    goals: Goals
    requests: tuple[RequestOutcome, ...]
    fleet: tuple[FleetSample, ...]  # once a second
    span_s: float  # from the first arrival to the last
    end_s: float
    gpu_hours: float  # of all workers, from their wish to their end or the last arrival
    usd: float | None  # None: the hardware has no price
    num_preemptions: int
    num_adapter_loads: int
    num_draft_tokens: int  # that were verified, and of them those that were right
    num_accepted_tokens: int
    num_retries: int
    num_events: int
    busy_share: float  # of the workers' time in which their engines computed
    idle_failures: tuple[Failure, ...] = ()  # that killed nothing: the run was over, or no such worker there
    cpu_s: float = 0.0  # real: of the simulation
    router_s: float = 0.0  # real: of that, in the dispatcher
    submit_us: Distribution = Distribution(0)  # real: to take a request, and to place it if it is placed at once

    @cached_property
    def finished(self) -> list[RequestOutcome]:
        return [request for request in self.requests if request.ended == "finished"]

    @cached_property
    def num_good(self) -> int:
        return sum(request.is_good(self.goals) for request in self.requests)

    @property
    def attainment(self) -> float:
        """Share of all requests that met both objectives."""
        return self.num_good / len(self.requests) if self.requests else 1.0

    @property
    def goodput_per_s(self) -> float:
        return self.num_good / (self.span_s or 1.0)  # what comes at one moment is a second's, as a trace's rate has it

    @property
    def requests_per_s(self) -> float:
        return len(self.requests) / (self.span_s or 1.0)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def hit_rate(self) -> float:
        """Return the share of finished requests' prompt tokens that were not computed anew."""
        total = sum(request.num_prompt_tokens for request in self.finished)
        return sum(request.num_cached_tokens for request in self.finished) / total if total else 0.0

    @property
    def ended(self) -> dict[str, int]:
        return dict(Counter(request.ended for request in self.requests))

    @property
    def num_too_long(self) -> int:
        """Count the prompts that were refused as the model's context has no room for them."""
        return sum(request.error == TOO_LONG for request in self.requests)

    @property
    def num_cut(self) -> int:
        """Count the answers that ended where the model's context does."""
        return sum(request.is_cut for request in self.requests)

    @property
    def missed(self) -> dict[str, int]:
        """Count the finished requests that missed each objective."""
        late = sum(r.ttft_s is None or r.ttft_s > self.goals.ttft_limit_s(r.unloaded_s) for r in self.finished)
        slow = sum(r.tpot_s is not None and r.tpot_s > self.goals.tpot_s for r in self.finished)
        return {"ttft": late, "tpot": slow}

    @property
    def ttft_ms(self) -> Distribution:
        return describe_ms(request.ttft_s for request in self.requests if not request.is_embedding)

    @property
    def embedding_ms(self) -> Distribution:
        return describe_ms(request.ttft_s for request in self.requests if request.is_embedding)

    @property
    def tpot_ms(self) -> Distribution:
        return describe_ms(request.tpot_s for request in self.requests)

    @property
    def queue(self) -> Distribution:
        return describe(float(sample.num_queued) for sample in self.fleet)
