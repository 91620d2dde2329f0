"""What one seed means: the fleet, the requests with their clients' manners, and the faults. Drawn before anything runs.

Each seed takes a random part of the kinds of faults (swarm testing): a kind that is always there hides what happens
without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import msgspec

from kvferry.common.config import SpeculativeConfig, TransferConfig
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import DEFAULT_CLASS, Pooling, SamplingParams
from kvferry.common.router_config import AutoscaleConfig, PoolBounds, RequestClass, RouterConfig

from .adapters import NUM_NAMES
from .clients import Manners

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
WITH_DRAFT = msgspec.structs.replace(SPEC, num_layers=3, draft="d")  # the last layer is a draft model's
WITH_STATES = msgspec.structs.replace(SPEC, model="s", num_layers=3)  # the last layer keeps states
MAX_MODEL_LEN = 80
LEASE_S = TransferConfig().lease_s
_STATES_SHARE = 0.3  # of the fleets that neither draft by a model nor have several ranks
_WINDOWS_SHARE = 0.3
_RETURNS_SHARE = 0.7
_HEADS_SHARE = 0.3  # of the fleets whose ranks do not hold the same pages


@dataclass(slots=True, frozen=True)
class Ask:
    """One client's request."""

    at_s: float
    router: int
    prompt: tuple[int, ...]
    tenant: int
    n: int
    sampling: SamplingParams
    priority: int
    timeout_s: float | None
    manners: Manners
    is_poison: bool = False  # kills whoever computes it
    grammar: int | None = None  # the state in which its grammar begins; None: it follows none
    pooling: Pooling | None = None  # how its prompt is embedded; None: it is answered
    is_background: bool = False  # it makes way for all others
    request_class: str = DEFAULT_CLASS
    adapter: int = 0  # the number of its adapter's bytes; 0: it has none
    comes_back: bool = False  # with what its client has read, where its router dies

    @property
    def is_kept(self) -> bool:
        """Tell whether its answer may be asked for again."""
        return self.pooling is None and self.sampling.prompt_logprobs is None


@dataclass(slots=True, frozen=True)
class Fault:
    """Happens at a time, or the `nth` time that a worker comes to `point`; then `target` is that worker or its peer."""

    kind: str
    target: str
    at_s: float = 0.0
    lasts_s: float = 0.0
    other: str = ""  # of a path: its other end
    strength: float = 1.0
    point: str = ""
    nth: int = 0

    def __str__(self) -> str:
        when = f"at the {self.nth}th {self.point}" if self.point else f"at {self.at_s:.3f} s"
        where = self.target + (f"~{self.other}" if self.other else "")
        return f"{self.kind} {where} {when}, {self.lasts_s:.2f} s, {self.strength:.2g}"


@dataclass(slots=True, frozen=True)
class Scenario:
    """Everything that is decided before the first event. What chance decides later comes from the same seed."""

    seed: int
    prefill: tuple[int, ...]  # blocks of each worker
    decode: tuple[int, ...]
    num_routers: int
    router: RouterConfig
    transfer: TransferConfig
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]
    calm_at_s: float  # no fault begins or lasts after this
    spec: KVCacheSpec = SPEC
    num_ranks: tuple[int, int] = (1, 1)  # of workers that start as prefill and as decode workers
    max_model_len: int = MAX_MODEL_LEN
    max_num_seqs: int = 6
    max_num_batched_tokens: int = 32
    max_in_flight_bytes: int = 1 << 20
    max_write_bytes: int = 1 << 10
    num_swap_blocks: int = 0
    num_host_blocks: int = 0  # of the prefix cache below the device, on each worker
    num_disk_blocks: int = 0  # of the prefix cache below that
    has_checksums: bool = False
    spoiling: float = 0.0  # chance that a page changes on its way, on any path
    read_s: float = 0.0  # what a read takes on average, beside its way
    speculative: SpeculativeConfig | None = None
    fetch_share: float = 0.0  # of the placements, those that have a prefix read from another worker
    copy_share: float = 0.0  # of the writes, those that the source's CPU makes: all workers are on one host
    step_s: float = 0.004
    s_per_token: float = 0.0003
    wake_s: float = 0.0001  # from news to the engine's next step
    turn_s: float = 0.0003  # from a call to the transfer thread's next turn
    rotation_s: float = 0.015  # how long it takes to replace an agent
    pipe_s: float = 0.001  # between a router and the launcher
    doubling: float = 0.0  # chance that a message that may be doubled is

    @property
    def keeps_states(self) -> bool:
        """Tell whether the last layer keeps a state in place of keys and values."""
        return self.spec.model == WITH_STATES.model

    @property
    def shares_heads(self) -> bool:
        """Tell whether pages are of heads, which a worker's ranks share out."""
        return self.spec.num_kv_heads > 1

    @property
    def workers(self) -> list[str]:
        return [f"p-{i}" for i in range(len(self.prefill))] + [f"d-{i}" for i in range(len(self.decode))]

    def without(self, dropped: frozenset[int]) -> Scenario:
        """The same with some of the faults left out."""
        return replace(self, faults=tuple(f for i, f in enumerate(self.faults) if i not in dropped))


def draw(seed: int, num_requests: int | None = None, *, faulted: bool = True) -> Scenario:
    """The scenario of a seed."""
    random = Random(seed)
    number = num_requests if num_requests is not None else random.randrange(30, 71)
    rate = random.choice((8.0, 15.0, 30.0))
    lasts_s = number / rate
    calm_at_s = lasts_s + random.choice((0.5, 3.0, 5.0)) if faulted else lasts_s
    num_prefill, num_decode = random.choice(((1, 1), (1, 2), (2, 1), (2, 2), (2, 2), (3, 2)))
    num_routers = 2 if random.random() < 0.25 else 1
    blocks = random.choice((24, 32, 48, 96))
    has_checksums = random.random() < 0.25
    base = Scenario(
        seed=seed,
        prefill=tuple(random.choice((24, 48, 96)) for _ in range(num_prefill)),
        decode=tuple(blocks for _ in range(num_decode)),
        num_routers=num_routers,
        router=_router(random, faulted),
        transfer=TransferConfig(
            kv_checksum="on" if has_checksums else "off", lease_s=random.choice((LEASE_S, LEASE_S, 0.15))
        ),
        asks=tuple(_with_more(seed, _asks(random, number, lasts_s, num_routers, faulted))),
        faults=(),
        calm_at_s=calm_at_s,
        max_num_seqs=random.choice((3, 8, 16)),
        max_num_batched_tokens=random.choice((16, 32, 64)),
        max_in_flight_bytes=random.choice((1 << 9, 1 << 20)),
        max_write_bytes=random.choice((1 << 8, 1 << 10)),
        num_swap_blocks=random.choice((0, 0, 16, 64)),
        num_host_blocks=random.choice((0, 0, 16, 64)),
        num_disk_blocks=random.choice((0, 24, 96)),
        has_checksums=has_checksums,
        spoiling=random.choice((0.0, 0.02)) if has_checksums and faulted else 0.0,
        read_s=random.choice((0.0, 0.0, 0.5)),
        speculative=random.choice((None, SpeculativeConfig(method="ngram", num_speculative_tokens=4))),
        fetch_share=random.choice((0.0, 0.5, 1.0, 1.0)),
        copy_share=random.choice((0.0, 0.0, 0.0, 0.5, 1.0)),
        step_s=random.choice((0.002, 0.005, 0.01)),
        turn_s=random.choice((0.0001, 0.0005, 0.003)),
        rotation_s=random.choice((0.015, 0.015, 0.4)),
        doubling=random.choice((0.0, 0.0, 0.02, 0.1)) if faulted else 0.0,
    )
    base = _with_draft_model(Random(f"draft model {seed}"), base)
    base = _with_earlier_answers(Random(f"suffixes {seed}"), base)
    base = _with_ranks(Random(f"ranks {seed}"), base)
    base = _with_heads(Random(f"heads {seed}"), base)
    base = _with_states(Random(f"states {seed}"), base)
    base = _with_windows(Random(f"windows {seed}"), base)
    base = _with_autoscaler(Random(f"autoscaler {seed}"), base)
    if not faulted:
        return base
    base = _with_classes(Random(f"classes {seed}"), base)
    base = _with_edits(Random(f"edits {seed}"), replace(base, faults=tuple(_faults(random, base))))
    return _with_returns(Random(f"returns {seed}"), base)


def _with_returns(random: Random, scenario: Scenario) -> Scenario:
    """Some clients come back when their router has died; in some fleets routers die while they tell answers."""
    asks = [
        replace(ask, comes_back=random.random() < _RETURNS_SHARE and ask.is_kept and not ask.is_poison)
        for ask in scenario.asks
    ]
    faults = list(scenario.faults)
    if random.random() < 0.2:
        for _ in range(random.randrange(1, 4)):
            nth, lasts_s = 1 + int(random.expovariate(1.0) * 60), random.uniform(0.1, 0.5)
            faults.append(Fault("kill_router", "peer", lasts_s=lasts_s, point="StepTokens", nth=nth))
    return replace(scenario, asks=tuple(asks), faults=tuple(faults))


def _with_draft_model(random: Random, scenario: Scenario) -> Scenario:
    """Of the fleets that draft, half do so by a model."""
    if scenario.speculative is None or random.random() < 0.5:
        return scenario
    by_model = SpeculativeConfig(method="draft_model", model=Path("d"), num_speculative_tokens=4)
    return replace(scenario, speculative=by_model, spec=WITH_DRAFT)


def _with_earlier_answers(random: Random, scenario: Scenario) -> Scenario:
    """Of the other fleets that draft, some do so from what they have answered, by matches of one token."""
    if scenario.speculative is None or scenario.spec.draft or random.random() < 0.6:
        return scenario
    few = random.choice((0, 2, 10_000))
    suffix = SpeculativeConfig(method="suffix", prompt_lookup_min=1, suffix_decoding_max_cached_requests=few)
    return replace(scenario, speculative=suffix)


def _with_ranks(random: Random, scenario: Scenario) -> Scenario:
    """Some fleets have workers of several ranks, which hold the same pages. They fetch nothing from one another."""
    if random.random() > 0.15:
        return scenario
    spec = msgspec.structs.replace(scenario.spec, layout="latent")
    num_ranks = random.choice(((1, 2), (2, 1), (2, 2), (3, 2), (2, 3)))
    return replace(scenario, spec=spec, num_ranks=num_ranks, fetch_share=0.0)


def _with_heads(random: Random, scenario: Scenario) -> Scenario:
    """In a quarter of the fleets ranks share out the heads, as a rule on one side otherwise than on the other; in some
    each has a head that others have as well.
    """
    if scenario.spec.is_replicated or random.random() > _HEADS_SHARE:
        return scenario
    sizes = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 2))
    fleets = (*((size, max(size)) for size in sizes), ((1, 4), 2), ((4, 2), 2), ((2, 4), 2))
    num_ranks, num_heads = random.choice(fleets)
    spec = msgspec.structs.replace(scenario.spec, num_kv_heads=num_heads)
    return replace(scenario, spec=spec, num_ranks=num_ranks)


def _with_states(random: Random, scenario: Scenario) -> Scenario:
    """Some fleets' models keep states, which one rank computes."""
    if scenario.spec is not SPEC or random.random() > _STATES_SHARE:
        return scenario
    return replace(scenario, spec=WITH_STATES, num_ranks=(1, 1))


def _with_windows(random: Random, scenario: Scenario) -> Scenario:
    """Some fleets' models have a layer with a window: handoffs and fetches leave out what it does not reach, and all
    states but the last.
    """
    if random.random() > _WINDOWS_SHARE:
        return scenario
    window, slack = random.choice((3, 6, 12)), random.choice((0, 0, 4, 9))
    windows = random.choice(((0, 0, 1), (0, window, 1))) if scenario.keeps_states else (0, window)
    return replace(scenario, spec=msgspec.structs.replace(scenario.spec, windows=windows, window_slack=slack))


def _with_autoscaler(random: Random, scenario: Scenario) -> Scenario:
    """Some fleets grow, shrink and share their workers anew, every few tenths of a second."""
    if random.random() > 0.15:
        return scenario
    num_workers = len(scenario.workers)
    most = num_workers + random.choice((0, 1, 2))
    bounds = PoolBounds(at_least=1, at_most=most - 1)
    autoscale = AutoscaleConfig(
        mode="on",
        prefill=bounds,
        decode=bounds,
        max_workers=most,
        spare_workers=random.choice((0, 0, 1)),
        scale_interval=random.choice((0.2, 0.5)),
        scale_down_after=random.choice((0.5, 2.0)),
        role_change_after=random.choice((0.2, 1.0)),
    )
    router = scenario.router.model_copy(update={"autoscale": autoscale})
    return replace(scenario, router=router, pipe_s=random.choice((0.001, 0.001, 0.5)))


_CLASSES = (
    RequestClass(name="chat", ttft_objective_ms=300.0, tpot_objective_ms=20.0, priority=-1, weight=2.0),
    RequestClass(name="slow", ttft_objective_ms=3000.0, priority=1),
    RequestClass(name="short", deadline_s=1.0),
)


def _with_classes(random: Random, scenario: Scenario) -> Scenario:
    """In some seeds requests are of several classes, with objectives, ranks and deadlines of their own."""
    if random.random() > 0.25:
        return scenario
    names = (DEFAULT_CLASS, *(known.name for known in _CLASSES))
    asks = tuple(replace(ask, request_class=random.choice(names)) for ask in scenario.asks)
    return replace(scenario, asks=asks, router=scenario.router.model_copy(update={"classes": _CLASSES}))


def _with_edits(random: Random, scenario: Scenario) -> Scenario:
    """Where the fleet may change, operators say now and then how large it shall be for a while."""
    if scenario.router.autoscale.mode != "on":
        return scenario
    edits = [
        fault
        for _ in range(random.randrange(6))
        for fault in _on_router("edit", random, scenario, random.uniform(0, scenario.calm_at_s))
    ]
    return replace(scenario, faults=tuple(sorted((*scenario.faults, *edits), key=lambda fault: fault.at_s)))


def _router(random: Random, faulted: bool) -> RouterConfig:
    return RouterConfig(
        model_dir=Path("m"),
        served_model_name="m",
        local_prefill=random.random() < 0.75,
        max_local_prefill_tokens=random.choice((0, 0, 6)),
        expect_prefill=random.random() < 0.95,
        max_queue=random.choice((8, 4096, 4096, 4096, 4096, 4096)) if faulted else 4096,
        max_attempts=random.choice((2, 5, 5, 5)) if faulted else 5,
        policy=random.choice(("slo", "slo", "slo", "least_loaded", "kv_cost", "round_robin")),
        ttft_objective_ms=random.choice((None, None, 300.0, 2000.0)) if faulted else None,
        tpot_objective_ms=random.choice((None, 10.0, 50.0)),
    )


def _asks(random: Random, number: int, lasts_s: float, num_routers: int, faulted: bool) -> list[Ask]:
    num_prefixes = random.choice((3, 3, 12))
    lengths = [random.choice((8, 16, 18, 24)) for _ in range(num_prefixes)]
    prefixes = [tuple(random.randrange(1, 64) for _ in range(length)) for length in lengths]
    shared = random.choice((0.5, 0.5, 0.9))  # of the prompts, those that begin like others
    manners = random.choice((0.0, 0.1, 0.3)) if faulted else 0.0
    asks: list[Ask] = []
    poison = random.randrange(number) if faulted and random.random() < 0.1 else -1
    for at_s in sorted(random.uniform(0, lasts_s) for _ in range(number)):
        prompt = tuple(random.randrange(1, 64) for _ in range(random.choice((1, 3, 5, 9, 14, 20))))
        if random.random() < shared:
            prompt = random.choice(prefixes) + prompt
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=random.choice((1, 2, 6, 12, 16, 32)),
            min_tokens=random.choice((0, 0, 3)),
            ignore_eos=random.random() < 0.3,
            seed=random.randrange(1 << 30),
            prompt_logprobs=0 if random.random() < 0.1 else None,
        )
        asks.append(
            Ask(
                at_s=at_s,
                router=random.randrange(num_routers),
                prompt=prompt,
                tenant=random.choice((0, 0, 0, 1)),
                n=random.choice((1, 1, 1, 1, 2, 3)),
                sampling=sampling,
                priority=random.choice((0, 0, 0, 1)),
                timeout_s=random.choice((0.3, 1.0, 5.0)) if faulted and random.random() < 0.1 else None,
                manners=_manners(random, manners),
                is_poison=len(asks) == poison,
            )
        )
    return asks


def _with_grammars(random: Random, asks: list[Ask]) -> list[Ask]:
    """Some requests of some seeds follow a grammar, of which there are few: they are asked for again."""
    share = random.choice((0.0, 0.2, 0.6))
    return [replace(ask, grammar=random.randrange(6)) if random.random() < share else ask for ask in asks]


def _with_embeddings(random: Random, asks: list[Ask]) -> list[Ask]:
    """In some seeds some prompts are embedded, others answered."""
    share = random.choice((0.0, 0.0, 0.2, 0.6))
    return [_embedded(ask, random.choice(list(Pooling))) if random.random() < share else ask for ask in asks]


def _embedded(ask: Ask, pooling: Pooling) -> Ask:
    return replace(ask, pooling=pooling, n=1, sampling=SamplingParams(temperature=0.0, max_tokens=1), grammar=None)


def _with_background(random: Random, asks: list[Ask]) -> list[Ask]:
    """Some requests of some seeds are in the background: they leave their workers again and again."""
    share = random.choice((0.0, 0.0, 0.0, 0.4))
    return [replace(ask, is_background=random.random() < share) for ask in asks]


def _with_adapters(seed: int, asks: list[Ask]) -> list[Ask]:
    """In two seeds of ten requests name adapters; a name is loaded anew from time to time, as other bytes."""
    if seed % 10 not in (0, 9):
        return asks
    random = Random(f"adapters {seed}")
    share, lasts_s = random.choice((0.3, 0.8)), random.choice((0.3, 1.0, 5.0))
    return [
        replace(ask, adapter=1 + random.randrange(NUM_NAMES) + NUM_NAMES * (int(ask.at_s / lasts_s) % 3))
        if random.random() < share and ask.pooling is None
        else ask
        for ask in asks
    ]


def _with_more(seed: int, asks: list[Ask]) -> list[Ask]:
    """Add what is drawn from sources of its own: all else of a seed stays as it was without it."""
    asks = _with_grammars(Random(f"grammars {seed}"), asks)
    asks = _with_embeddings(Random(f"embeddings {seed}"), asks)
    asks = _with_background(Random(f"background {seed}"), asks)
    return _with_adapters(seed, asks)


def _manners(random: Random, share: float) -> Manners:
    kind = random.random()
    reads_every_s = 0.1 if random.random() < 0.1 else 0.0
    if kind < share:
        return Manners(leaves_after_s=random.expovariate(5.0), reads_every_s=reads_every_s)
    if kind < 1.5 * share:
        return Manners(leaves_at_token=random.randrange(1, 8), reads_every_s=reads_every_s)
    if kind < 2.5 * share:
        return Manners(stop_tokens=frozenset(random.sample(range(1, 64), 12)), reads_every_s=reads_every_s)
    return Manners(reads_every_s=reads_every_s)


# Where a worker may be caught in the act: message types as they leave, and the engine's and agent's own points.
POINTS = (
    ("step", 40), ("write", 30), ("notify", 15), ("adopt", 15), ("Grant", 15), ("KVOpen", 15), ("KVOpened", 15),
    ("FirstToken", 15), ("HandoffDone", 15), ("StepTokens", 60), ("KVDone", 15), ("KVClosed", 4), ("KVRenew", 3),
    ("PrefillTask", 15), ("ReserveKV", 15), ("Abort", 8), ("HandoffFailed", 4), ("rotate", 2), ("Drain", 1),
    ("SetRole", 2), ("read", 6), ("KVFetch", 8), ("KVFetchable", 8), ("KVFetchDone", 6),
)  # fmt: skip
_AT_POINTS = ("kill", "hang", "hang", "cut_control", "cut_data", "break", "set_role", "set_role")


def _faults(random: Random, scenario: Scenario) -> list[Fault]:
    """A few kinds of faults, a few times each, at times and at points."""
    kinds = [kind for kind in _DRAW if random.random() < (0.1 if kind == "kill_router" else 0.4)]
    density = random.choice((0.5, 1.0, 2.0))
    faults = []
    for kind in kinds:
        for _ in range(1 + int(random.expovariate(1.0) * density * scenario.calm_at_s / 2)):
            faults += _DRAW[kind](kind, random, scenario, random.uniform(0, scenario.calm_at_s))
    if random.random() < 0.7:
        for _ in range(random.randrange(1, 9)):
            point, often = random.choice(POINTS)
            kind = random.choice(_AT_POINTS)
            lasts_s = _draw_lasts(random)
            nth = 1 + int(random.expovariate(1.0) * often)
            faults.append(Fault(kind, random.choice(("self", "peer")), lasts_s=lasts_s, point=point, nth=nth))
    return sorted(faults, key=lambda fault: fault.at_s)


def _draw_lasts(random: Random) -> float:
    """Short against steps, long against leases, and between."""
    return random.choice((0.02, 0.2, 1.2, 2.5, 4.0, 4.0, 6.0)) * random.uniform(0.5, 1.5)


def _on_worker(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    return [Fault(kind, random.choice(scenario.workers), at_s, _draw_lasts(random))]


def _on_draining(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    """A drain, and sometimes a role change in it."""
    drain = _on_worker(kind, random, scenario, at_s)
    if random.random() < 0.7:
        return drain
    return [*drain, Fault("set_role", drain[0].target, at_s + random.uniform(0, 0.2), _draw_lasts(random))]


def _on_router(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    return [Fault(kind, f"r-{random.randrange(scenario.num_routers)}", at_s, random.uniform(0.1, 1.0))]


def _on_pair(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    prefill, decode = _pair(random, scenario)
    if random.random() < 0.2:  # after a role change it goes the other way
        prefill, decode = decode, prefill
    strength = random.choice((0.3, 2.0, 4.0) if kind == "late_writes" else (0.2, 0.7, 1.0))
    return [Fault(kind, prefill, at_s, _draw_lasts(random), decode, strength)]


def _on_session(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    router = f"r-{random.randrange(scenario.num_routers)}"
    return [Fault(kind, random.choice(scenario.workers), at_s, _draw_lasts(random), router)]


def _on_any_path(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    if random.random() < 0.5:
        return _on_session(kind, random, scenario, at_s)
    return _on_pair(kind, random, scenario, at_s)


def _on_all(kind: str, random: Random, scenario: Scenario, at_s: float) -> list[Fault]:
    return [Fault(kind, "all", at_s, random.choice((0.3, 1.0, 3.0)))]


def _pair(random: Random, scenario: Scenario) -> tuple[str, str]:
    return f"p-{random.randrange(len(scenario.prefill))}", f"d-{random.randrange(len(scenario.decode))}"


_DRAW: dict[str, Callable[[str, Random, Scenario, float], list[Fault]]] = {
    kind: draw_one
    for draw_one, kinds in (
        (_on_worker, ("kill", "lose_host", "hang", "isolate", "set_role", "fail_rotation", "fail_disk", "slow_disk")),
        (_on_draining, ("drain",)),
        (_on_router, ("kill_router",)),
        (_on_pair, ("cut_data", "cut_control", "cut_pair", "fail_writes", "late_writes", "lose_notes", "corrupt")),
        (_on_session, ("cut_session",)),
        (_on_any_path, ("break", "slow")),
        (_on_all, ("swizzle",)),
    )
    for kind in kinds
}
KINDS = (*_DRAW, "edit")
