"""A scenario says what is simulated, as plain values: traffic, fleet, router, objectives, and what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from ..common.config import SpeculativeConfig
from ..common.errors import ConfigError
from ..common.router_config import AutoscaleConfig, RouterConfig
from ..router.placement.policy import RoutingPolicy
from ..router.state.predictor import Predictor
from ..sizing.hardware import Gpu, gpu_named
from ..sizing.shapes import ModelShape, model_named
from ..sizing.steps import Roofline, StepModel
from ..tools.load.traces import TraceRow
from ..wire.fields import Labels
from .costs.network import LATENCY_S, Link, Network

PolicyMaker = Callable[[RouterConfig, Predictor], RoutingPolicy]

_MOST_BLOCKS = 10**7  # of a worker: each is an entry of some lists, and no fleet has workers of so many


@dataclass(slots=True, frozen=True)
class Spike:
    """A while with `factor` times as many requests."""

    at_s: float
    duration_s: float
    factor: float


@dataclass(slots=True, frozen=True)
class Day:
    """A sinusoidal day: the rate goes from `low` to 1 times the traffic's and back, lowest at the start."""

    period_s: float = 86400.0
    low: float = 0.2


@dataclass(slots=True, frozen=True)
class Traffic:
    """The requests that come, and when. Lengths and shared prefixes are the trace's, in its order."""

    trace: str | tuple[TraceRow, ...] = "mooncake-conversation"  # a name, a path, or the rows
    part: Literal["whole", "first", "second"] = "whole"  # of its time
    arrivals: Literal["recorded", "poisson"] = "recorded"
    rate_per_s: float | None = None  # mean, beside spikes and days; None: as recorded
    num_requests: int | None = None  # None: all; more than the trace has: it begins anew, sharing nothing with before
    length_scale: float = 1.0
    spikes: tuple[Spike, ...] = ()
    day: Day | None = None
    embedding_share: float = 0.0  # of the requests, drawn at random, that want their prompt's embedding and no answer
    seed: int = 0  # of what is drawn: Poisson arrivals, adapters, embeddings


@dataclass(slots=True, frozen=True)
class Adapters:
    """Adapters that requests name, and the room that workers have for them."""

    count: int  # 0: requests are for the model itself
    num_bytes: int = 100_000_000  # of each one's file
    max_loras: int = 8
    max_cpu_loras: int | None = None


@dataclass(slots=True, frozen=True)
class Drafts:
    """Decode workers draft tokens of every answer, as many as pay, and so many of them are right."""

    acceptance: float  # the share of drafted tokens that are right, those before them being right
    num_tokens: int = 5  # of one sequence and step, at most
    # What a draft model's steps take of the served model's, its keys and values of a token likewise. 0: there is none,
    # and drafts cost nothing to make.
    model_share: float = 0.0

    def check(self) -> None:
        """Raise ConfigError for what is no share."""
        if not 0 < self.acceptance <= 1:
            raise ConfigError(f"draft_acceptance = {self.acceptance:g} is no share: more than 0, and 1 at most")
        if not 0 <= self.model_share < 1:
            raise ConfigError(f"draft_model_share = {self.model_share:g}: a draft model takes less than the model does")

    @property
    def config(self) -> SpeculativeConfig:
        """Return what workers are told. Raises ConfigError."""
        self.check()
        method, model = ("draft_model", Path(".")) if self.model_share else ("ngram", None)
        try:
            return SpeculativeConfig(method=method, model=model, num_speculative_tokens=self.num_tokens)
        except ValidationError as error:
            raise ConfigError(f"num_speculative_tokens: {error.errors()[0]['msg']}") from None


@dataclass(slots=True, frozen=True)
class Fleet:
    """The workers. With no prefill workers all are colocated: they compute the prompts of their own answers."""

    prefill: int
    decode: int
    gpu: str | Gpu = "H100"
    model: str | ModelShape = "llama-3.1-70b"
    gpus_per_worker: int = 4
    steps: StepModel | None = None  # None: the roofline of the hardware above
    num_blocks: int | None = None  # of a worker; None: what fits into its memory
    host_blocks: int = 0  # of a worker, in host memory: below the device's
    keeps_states: bool = False  # some of the model's layers keep a state in place of keys and values
    block_tokens: int | None = None  # None: 512 where the trace names blocks of prompts, else 64
    max_num_seqs: int = 256
    max_model_len: int = 131072
    prefill_tokens: int = 8192  # largest step of a prefill worker
    decode_tokens: int = 2048  # step budget of a decode worker, which cuts it by the time it takes
    has_objective: bool = True  # decode workers pace local prompts by the scenario's; False: by what waits
    can_change_role: bool = True
    prefix_caching: bool | None = None  # None: where some prefix comes twice
    network: Network = Network(Link(40e9, LATENCY_S))  # RDMA at 80 % of the port
    labels: Callable[[int], Labels] | None = field(default=None, compare=False)  # of the worker of a number
    token_bytes: int | None = None  # of KV on the wire; None: the model's
    adapters: Adapters = Adapters(0)
    drafts: Drafts | None = None  # None: a step yields one token for each row

    @property
    def num_workers(self) -> int:
        return self.prefill + self.decode

    @property
    def hardware(self) -> Gpu:
        return gpu_named(self.gpu) if isinstance(self.gpu, str) else self.gpu

    @property
    def shape(self) -> ModelShape:
        return model_named(self.model) if isinstance(self.model, str) else self.model

    def step_model(self) -> StepModel:
        if self.steps is not None:
            return self.steps
        return Roofline(self.hardware, self.shape, self.gpus_per_worker)

    def block_tokens_of(self, row: TraceRow) -> int:
        """Return the tokens of a block, where the trace's requests are as this one."""
        return self.block_tokens or (row.block_tokens if row.block_ids else 64)

    def blocks(self, block_tokens: int) -> int:
        """Return the blocks of one worker. Raises ConfigError where nothing tells them, or they are too many."""
        if self.num_blocks is not None:
            if self.num_blocks > _MOST_BLOCKS:
                raise ConfigError(f"num_blocks: {self.num_blocks:,} is more than {_MOST_BLOCKS:,}")
            return self.num_blocks
        model = self.step_model()
        if not isinstance(model, Roofline):
            raise ConfigError("num_blocks: a measured step model says nothing about memory")
        count = int(model.num_blocks(block_tokens) / (1 + self.draft_share))
        if count > _MOST_BLOCKS:
            raise ConfigError(
                f"memory_gb: a worker has room for {count:,} blocks, more than {_MOST_BLOCKS:,}; "
                "say how many it has (--num-blocks), or let them be longer (--block-size)"
            )
        return count

    @property
    def host_bytes_per_s(self) -> float:
        """One way, between a worker's GPUs and host memory."""
        return self.hardware.host_gb_per_s * 1e9 * self.gpus_per_worker

    @property
    def kv_token_bytes(self) -> int:
        """Return the bytes of a token's keys and values, those of a draft model among them."""
        own = self.shape.kv_bytes_per_token if self.token_bytes is None else self.token_bytes
        return round(own * (1 + self.draft_share))

    @property
    def draft_share(self) -> float:
        """Return what a draft model takes of what the model does."""
        return self.drafts.model_share if self.drafts is not None else 0.0

    @property
    def usd_per_hour(self) -> float | None:
        """Return the price of one worker; None: it has none."""
        price = self.hardware.usd_per_hour
        return None if price is None else price * self.gpus_per_worker


@dataclass(slots=True, frozen=True)
class Router:
    """The router's settings: how requests are placed."""

    policy: str = "least_loaded"
    make_policy: PolicyMaker | None = field(default=None, compare=False)  # instead of a name: for trials
    local_prefill: bool = True
    max_local_prefill_tokens: int = 0
    max_queue: int = 1_000_000
    knows_objectives: bool = (
        True  # as if given by --ttft-objective-ms and --tpot-objective-ms: hopeless ones are refused
    )


@dataclass(slots=True, frozen=True)
class Goals:
    """The objectives that make a request good."""

    ttft_s: float = 1.0
    ttft_stretch: float = 3.0  # a prompt may take so many times what it takes on an empty prefill worker, if longer
    tpot_s: float = 0.05

    def ttft_limit_s(self, unloaded_s: float) -> float:
        return max(self.ttft_s, self.ttft_stretch * unloaded_s)


@dataclass(slots=True, frozen=True)
class Failure:
    """A worker dies, and another life of it may come."""

    worker: str  # prefill-0, decode-3, ...
    at_s: float
    back_after_s: float | None = None


@dataclass(slots=True, frozen=True)
class RoleChange:
    """An operator's SetRole."""

    worker: str
    at_s: float
    role: Literal["prefill", "decode"]


@dataclass(slots=True, frozen=True)
class Scaled:
    """An autoscaler decides, and this is how its decisions come true."""

    config: AutoscaleConfig
    start_s: float = 60.0  # from the wish for a worker to its first heartbeat
    week_s: float = 0.0  # time of the week when the run begins


@dataclass(slots=True, frozen=True)
class Scenario:
    """One run. Equal scenarios have equal outcomes."""

    traffic: Traffic
    fleet: Fleet
    router: Router = Router()
    goals: Goals = Goals()
    failures: tuple[Failure, ...] = ()
    role_changes: tuple[RoleChange, ...] = ()
    scaled: Scaled | None = None
    max_tokens: int = 4096  # that clients allow: routers do not know where an answer ends
    message_s: float = 0.0003  # between router and workers, one way
    router_s: float = 0.0  # of a request in the router before it is queued: tokenizing
    drain_s: float = 600.0  # after the last arrival, until what is left counts as lost
    jumps: bool = True  # decode steps between two events in one
    seed: int = 0  # of step times' noise
