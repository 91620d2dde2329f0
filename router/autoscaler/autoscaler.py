"""Decides how many prefill and decode workers there should be; pure, with the time passed in.

    snapshot ─> rates (forecast) + lengths (sample) ─> workers that each pool needs (sizing)
             ─> larger at once · smaller after a while of enough, with headroom · within bounds, schedule, manual edits
             ─> a worker that one pool can spare changes its role first; then additions; removals last

Workers that were asked for and are not there yet count as there, so nothing is asked for twice. Who leaves or
changes is the emptiest. Nothing is done here: a decision is a value, and `scaling` carries it out or only shows it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from .correction import Correction
from .forecast import RateForecast
from .lengths import LengthSample
from .scale_types import (
    POOLS,
    AutoscalerSettings,
    Bounds,
    Counts,
    LoadSnapshot,
    Member,
    MemberState,
    Pool,
    ScaleDecision,
    ScaleForecast,
    StepTimes,
)
from .schedule import Schedule
from .sizing import DecodeLoad, PrefillLoad, needed_of_both
from .way import counts_of, lend, way_to

# None of these numbers is derived. Who changes one measures it with benchmarks.autoscale.
_FEW = 8  # sampled answers: with fewer nothing is known about lengths, and nothing is decided
_WORTH = 1.1  # a full fleet is split anew for so much more of what its poorer pool can carry; nearer to 1: more flips
_LARGEST_SHRINK = 0.25  # of a pool, in one decision; larger saves more after a peak and misses more where that was none


class Autoscaler:
    """`decide` once per interval, in order of time. Operators' edits (`hold`) are kept until they are released."""

    def __init__(self, settings: AutoscalerSettings, times: StepTimes, *, seed: int = 0) -> None:
        self._settings = settings
        self._times = times
        self._schedule = Schedule(settings.schedule)
        self._requests, self._tokens = RateForecast(), RateForecast()
        self._lengths = LengthSample(seed=seed)
        self._corrections = {pool: Correction(settings.target) for pool in POOLS}
        self._past: deque[tuple[float, Counts]] = deque()  # (when, needed with headroom)
        self._needs: deque[tuple[float, Counts]] = deque()  # (when, needed)
        self._since_s: float | None = None  # when needs were first known
        self._fleet: tuple[tuple[str, Pool], ...] = ()
        self._changed_s = 0.0  # when the fleet was last another
        self._shrunk_s = -math.inf  # when it last said that somebody should leave
        self._held: tuple[Counts, float | None] | None = None  # an operator's counts, until when

    # --- operators ----------------------------------------------------------------------------------------------

    def hold(self, counts: Counts, until_s: float | None = None) -> None:
        """Want these counts and no others, until `release` or that time."""
        self._held = (counts, until_s)

    def release(self) -> None:
        self._held = None

    def lapse(self, now_s: float) -> None:
        """Release counts whose time is over."""
        if self._held is not None and self._held[1] is not None and now_s >= self._held[1]:
            self._held = None

    @property
    def held(self) -> tuple[Counts, float | None] | None:
        return self._held

    # --- one interval -------------------------------------------------------------------------------------------

    def decide(self, load: LoadSnapshot) -> ScaleDecision:
        self._observe(load)
        fleet = [member for member in load.members if member.state is not MemberState.DRAINING]
        have = counts_of(fleet)
        forecast = self._look_ahead(load, have)
        self._learn(load, forecast)
        if self._held is not None:
            wanted, why = self._held[0], "held by an operator"
        else:
            wanted, why = self._wanted(load, have, forecast, fleet)
        decision = way_to(wanted, have, fleet, forecast, why)
        if decision.removals:
            self._shrunk_s = load.now_s
        return decision

    def _observe(self, load: LoadSnapshot) -> None:
        self._requests.observe([1.0] * len(load.prompts), load.interval_s, load.day_s)
        self._tokens.observe([float(n) for n in load.prompts], load.interval_s, load.day_s)
        self._lengths.add(load.answers, load.now_s)
        fleet = tuple(sorted((m.worker_id, m.pool) for m in load.members if m.state is MemberState.READY))
        if fleet != self._fleet:
            self._fleet, self._changed_s = fleet, load.now_s
        self.lapse(load.now_s)

    def _learn(self, load: LoadSnapshot, forecast: ScaleForecast) -> None:
        settled = load.now_s - self._changed_s >= self._settings.settle_s
        ready = counts_of(member for member in load.members if member.state is MemberState.READY)
        for work in POOLS:
            kept = load.ttft if work == "prefill" else load.tpot
            pool: Pool = work if self._settings.prefill.at_most else "decode"  # which does the prompts' work, too
            counts = settled and ready.in_pool(pool) >= forecast.needed.in_pool(pool) > 0
            self._corrections[work].observe(kept, load.interval_s, counts=counts)

    def _look_ahead(self, load: LoadSnapshot, have: Counts) -> ScaleForecast:
        """Return the load by the time that a worker asked for now takes work, and what that load needs."""
        limits = load.limits
        if limits is None or self._unknown(load):
            return ScaleForecast(self._requests.level, self._tokens.level)
        if self._since_s is None:
            self._since_s = load.now_s
        settings, answers = self._settings, self._lengths.answers
        ahead_s = load.start_s + load.interval_s
        requests, tokens = self._requests.at(ahead_s), self._tokens.at(ahead_s)
        prompts = PrefillLoad.from_answers(answers, self._times, limits, settings.objectives)
        crowd = DecodeLoad.from_answers(answers, self._times, limits, settings.objectives)
        factor = {pool: self._corrections[pool].factor for pool in POOLS}

        def need(tokens_per_s: float, requests_per_s: float) -> Counts:
            rate = tokens_per_s / max(1.0, prompts.mean_tokens)
            rate *= factor["prefill"]
            requests_per_s *= factor["decode"]
            if not settings.prefill.at_most:
                return Counts(0, needed_of_both(prompts, crowd, rate, requests_per_s, settings.target))
            return Counts(prompts.needed(rate, settings.target), crowd.needed(requests_per_s, settings.target))

        less = 1.0 - settings.clear
        backlog = load.queued_tokens / settings.backlog_s
        self._needs.append((load.now_s, need(tokens + backlog, requests)))
        needed = need((tokens + backlog) * less, requests * less)
        if load.now_s - self._shrunk_s >= settings.shrink_after_s:  # else only what is clear: no back and forth
            needed = _at_least(needed, self._lasting(load.now_s))
        roomy = needed
        if jumps := [pool for pool in POOLS if needed.in_pool(pool) > settings.jump * have.in_pool(pool)]:
            more = 1.0 + settings.jump_headroom
            room = need((tokens + backlog) * more, requests * more)
            roomy = Counts(*((room if pool in jumps else needed).in_pool(pool) for pool in POOLS))
        more = 1.0 + settings.headroom
        safe = need(max(tokens, self._tokens.level) * more, max(requests, self._requests.level) * more)
        self._past.append((load.now_s, _at_least(safe, roomy)))
        while self._past[0][0] < load.now_s - settings.shrink_after_s:
            self._past.popleft()
        return ScaleForecast(
            requests,
            tokens,
            requests * crowd.mean_output,
            needed,
            roomy,
            self._most_needed(load.now_s - settings.shrink_after_s),
            (factor["prefill"], factor["decode"]),
        )

    def _unknown(self, load: LoadSnapshot) -> str:
        """Return what is missing to size the load; empty: nothing is."""
        if load.limits is None:
            return "no worker's step times are known"
        return "no lengths known yet" if len(self._lengths) < _FEW and self._requests.level > 0 else ""

    def _lasting(self, now_s: float) -> Counts:
        """Return what was needed all the time lately."""
        while self._needs[0][0] < now_s - self._settings.confirm_s:
            self._needs.popleft()
        return Counts(min(n.prefill for _, n in self._needs), min(n.decode for _, n in self._needs))

    def _most_needed(self, since_s: float) -> Counts:
        past = [needed for when_s, needed in self._past if when_s >= since_s]
        return Counts(max((n.prefill for n in past), default=0), max((n.decode for n in past), default=0))

    # --- the decision ---------------------------------------------------------------------------------------------

    def _wanted(
        self, load: LoadSnapshot, have: Counts, forecast: ScaleForecast, fleet: list[Member]
    ) -> tuple[Counts, str]:
        bounds = self._bounds(load)
        if unknown := self._unknown(load):
            return self._within(_at_least(have, load.desired or have), bounds, have), unknown
        needed = _largest(forecast.needed, self._settings.spare_workers)
        roomy = _largest(forecast.after_jump, self._settings.spare_workers)
        enough = _largest(forecast.with_headroom, self._settings.spare_workers)
        may_shrink = self._since_s is not None and load.now_s - self._since_s >= self._settings.shrink_after_s
        sizes = {
            pool: _size(
                have.in_pool(pool), roomy.in_pool(pool), enough.in_pool(pool), bounds[pool], may_shrink=may_shrink
            )
            for pool in POOLS
        }
        wanted = Counts(sizes["prefill"], sizes["decode"])
        lately = _largest(self._most_needed(load.now_s - self._settings.flip_after_s), self._settings.spare_workers)
        wanted = lend(wanted, have, lately, bounds, fleet)
        wanted = self._within(wanted, bounds, have, needed)
        return wanted, _explain(forecast, have, wanted)

    def _bounds(self, load: LoadSnapshot) -> dict[Pool, Bounds]:
        usual: dict[Pool, Bounds] = {"prefill": self._settings.prefill, "decode": self._settings.decode}
        ahead_s = load.start_s + load.interval_s
        bounds = {
            pool: self._schedule.soon(pool, own, load.weekday, load.day_s, ahead_s) if own.at_most else own
            for pool, own in usual.items()  # windows make no pool that the deployment does not have
        }
        least = Counts(bounds["prefill"].at_least, bounds["decode"].at_least)
        if least.total > self._settings.total:
            least = self._shared(least)
            bounds = {pool: replace(own, at_least=least.in_pool(pool)) for pool, own in bounds.items()}
        return bounds

    def _shared(self, least: Counts) -> Counts:
        """Return as much of the windows' minima as both pools may have together: else nobody could come or go."""
        prefill, decode, total = self._settings.prefill, self._settings.decode, self._settings.total
        splits = [Counts(count, total - count) for count in range(prefill.at_least, total - decode.at_least + 1)]
        return max(splits, key=lambda split: _poorest(split, least), default=least)

    def _within(self, wanted: Counts, bounds: dict[Pool, Bounds], have: Counts, needed: Counts | None = None) -> Counts:
        """Inside both pools' bounds; where both together are too many, shared so that the poorer one is best off."""
        counts = Counts(bounds["prefill"].clamp(wanted.prefill), bounds["decode"].clamp(wanted.decode))
        total = self._settings.total
        if counts.total <= total:
            return counts
        need = needed or wanted
        splits = [
            Counts(prefill, total - prefill)
            for prefill in range(bounds["prefill"].at_least, bounds["prefill"].at_most + 1)
            if bounds["decode"].at_least <= total - prefill <= bounds["decode"].at_most
        ]
        best = max(splits, key=lambda split: _poorest(split, need), default=have)
        stays = have in splits and _poorest(best, need) < _WORTH * _poorest(have, need)
        return have if stays else best


def _at_least(one: Counts, other: Counts) -> Counts:
    return Counts(max(one.prefill, other.prefill), max(one.decode, other.decode))


def _largest(counts: Counts, num_spares: int) -> Counts:
    """Return the counts with the spares, each in the pool where it is the larger part."""
    for _ in range(num_spares):
        if 0 < counts.prefill < counts.decode:
            counts = Counts(counts.prefill + 1, counts.decode)
        else:
            counts = Counts(counts.prefill, counts.decode + 1)
    return counts


def _poorest(split: Counts, needed: Counts) -> float:
    """Return what part of its need the poorer pool has."""
    return (
        min(split.in_pool(pool) / needed.in_pool(pool) for pool in POOLS if needed.in_pool(pool))
        if needed.total
        else 1.0
    )


def _size(have: int, needed: int, enough: int, bounds: Bounds, *, may_shrink: bool) -> int:
    """Return the size of one pool, without a look at the other."""
    if needed > have:
        return bounds.clamp(needed)
    if may_shrink and enough < have:
        step = max(1, int(_LARGEST_SHRINK * have))
        return bounds.clamp(max(enough, have - step))
    return bounds.clamp(have)


def _explain(forecast: ScaleForecast, have: Counts, wanted: Counts) -> str:
    rates = (
        f"{forecast.requests_per_s:.3g} requests/s with {forecast.prompt_tokens_per_s:.4g} prompt and "
        f"{forecast.output_tokens_per_s:.4g} output tokens/s need {forecast.needed}"
    )
    if wanted == have:
        return rates
    lines = []
    for pool in POOLS:
        now, then = have.in_pool(pool), wanted.in_pool(pool)
        if then > now:
            lines.append(f"{pool} grows from {now} to {then}")
        elif then < now:
            enough = forecast.with_headroom.in_pool(pool)
            why = f": {enough} were enough for a while" if enough <= then else ""  # else the other pool needs it more
            lines.append(f"{pool} shrinks from {now} to {then}{why}")
    return f"{rates}; {'; '.join(lines)}"
