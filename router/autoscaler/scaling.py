"""Scaling in a router: asks the autoscaler once per interval, and carries out what it decides.

    record + workers + launcher's fleet ─> snapshot ─> Autoscaler ─> SetRole to workers
                                                                └─> scale {add, remove} to the launcher ─> fleet {...}

With several routers, one decides (the launcher says which) and the others send it what they saw; all show its
decision. A decision waits until the launcher has answered the last one, so nothing is asked for twice. Without a
launcher only roles are changed here; what is desired is a metric for whoever starts workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from ...common.clock import Clock
from ...common.errors import RequestError
from ...common.router_config import AutoscaleConfig
from ..state.objectives import Objectives
from ..state.predictor import Predictor
from ..state.views import PoolView
from .autoscaler import Autoscaler
from .inputs import TypicalLimits, TypicalTimes, settings_of
from .load_record import LoadRecord, Replicas, SeenLoad
from .members import FleetMembers
from .scale_types import POOLS, Counts, LoadSnapshot, MemberState, ScaleDecision, WorkerLimits

_ANSWER_S = 30.0  # for the launcher to answer a request, before another one is made; shorter may ask for the same twice
_FIRST_START_S = 60.0  # until a start was measured; larger scales further ahead
_MOST_SEEN = 64  # reports of other routers that wait for the next decision: a bound on memory

log = structlog.get_logger(__name__)


class ScaleOperations(Protocol):
    """Scaling needs this of the dispatcher."""

    def view(self) -> PoolView: ...

    def set_role(self, worker_id: str, role: str) -> bool: ...

    def drain_worker(self, worker_id: str, deadline_s: float) -> bool: ...


class Scaling:
    """`Scaling` decides for one router, on its event loop."""

    def __init__(
        self,
        config: AutoscaleConfig,
        objectives: Objectives,
        dispatcher: ScaleOperations,
        predictor: Predictor,
        record: LoadRecord,
        clock: Clock,
        week_s: Callable[[], float],
        *,
        launcher: Callable[[Mapping[str, object]], None] | None = None,
    ) -> None:
        self._config = config
        self._dispatcher = dispatcher
        self._record = record
        self._clock = clock
        self._week_s = week_s
        self._launcher = launcher
        self._times, self._limits = TypicalTimes(predictor), TypicalLimits()
        self._autoscaler = Autoscaler(settings_of(config, objectives), self._times)
        self._fleet = FleetMembers()
        self._is_leader = launcher is None
        self._seen: list[SeenLoad] = []  # by other routers
        self._began_s = clock.now()  # the interval that is under way
        self._is_wanted = False  # a decision, by an operator: at the next tick
        self._seq = 0
        self._asked_s: float | None = None  # when the launcher was asked for what it has not answered yet
        self._shown: tuple[Counts, str] | None = None
        self._decision: ScaleDecision | None = None
        self._mean_prompt = 0.0

    # --- from the launcher --------------------------------------------------------------------------------------

    def on_launcher(self, event: Mapping[str, object]) -> None:
        match event["event"]:
            case "fleet":
                self._on_fleet(event)
            case "load":
                self._seen = [*self._seen[-_MOST_SEEN:], SeenLoad.from_event(event)]
            case "drain":
                limit_s = event.get("limit_s")
                limit_s = float(limit_s) if isinstance(limit_s, int | float) else 0.0
                self._dispatcher.drain_worker(str(event.get("worker_id")), limit_s)

    def _on_fleet(self, event: Mapping[str, object]) -> None:
        now, is_later = self._clock.now(), self._fleet.is_told
        self._fleet.on_launcher(event, now)
        if self._fleet.seq >= self._seq:
            self._seq, self._asked_s = self._fleet.seq, None
        self._is_leader = bool(event.get("leader"))
        self._on_held(event.get("held"), now, is_later=is_later)
        desired = event.get("desired")
        if not self._is_leader and self._is_decided and isinstance(desired, list) and len(desired) == 2:
            self._shown = Counts(int(desired[0]), int(desired[1])), str(event.get("reason", ""))

    def _on_held(self, held: object, now: float, *, is_later: bool) -> None:
        """`is_later`: the first word tells what was asked for long ago, and workers have yet to say what they are."""
        if isinstance(held, list) and len(held) == 3:
            before, counts, left_s = self._autoscaler.held, Counts(int(held[0]), int(held[1])), held[2]
            self._autoscaler.hold(counts, now + left_s if isinstance(left_s, int | float) else None)
            self._is_wanted |= is_later and (before is None or before[0] != counts)
        else:
            self._autoscaler.release()

    # --- operators ------------------------------------------------------------------------------------------------

    def hold(self, counts: Counts, for_s: float | None) -> None:
        """Raises RequestError for counts that the deployment has no room for."""
        config = self._config
        if not config.prefill.at_most and counts.prefill:
            raise RequestError("prefill: this deployment has no prefill workers", param="prefill")
        if counts.decode < 1 or counts.total > config.max_workers:
            raise RequestError(
                f"{counts}: at least one decode worker and at most {config.max_workers} workers in all, "
                "see --prefill-max and --decode-max",
                param="decode",
            )
        if self._launcher is not None:
            self._launcher({"event": "hold", "counts": [counts.prefill, counts.decode], "for_s": for_s})
        else:
            self._autoscaler.hold(counts, None if for_s is None else self._clock.now() + for_s)
            self._is_wanted = True

    def release(self) -> None:
        if self._launcher is not None:
            self._launcher({"event": "hold", "counts": None})
        else:
            self._autoscaler.release()

    @property
    def _is_decided(self) -> bool:
        """Say whether this or another router decides anything."""
        return self._config.mode != "off" or self._autoscaler.held is not None

    @property
    def desired(self) -> Counts | None:
        """None: nothing is decided here."""
        return self._shown[0] if self._shown is not None else None

    def replicas(self) -> Replicas:
        """Return the counts for the metrics. Nothing is desired while nobody decides."""
        return Replicas(self.desired, self.current() if self.desired is not None else None)

    def current(self) -> Counts:
        members = self._fleet.members(self._dispatcher.view(), self._clock.now())
        pools = [member.pool for member in members if member.state is not MemberState.DRAINING]
        return Counts(pools.count("prefill"), pools.count("decode"))

    def describe(self) -> dict[str, object]:
        """Return what the admin listener shows."""
        held = self._autoscaler.held
        now = self._clock.now()
        described: dict[str, object] = {
            "mode": self._config.mode,
            "decides_here": self._is_leader,
            "current": _as_json(self.current()),
            "desired": _as_json(self.desired) if self.desired is not None else None,
            "reason": self._shown[1] if self._shown is not None else "",
            "held": None,
            "limits": {"max_workers": self._config.max_workers, **_limits(self._config)},
            "start_s": None if self._fleet.start_s is None else round(self._fleet.start_s, 1),
        }
        if held is not None:
            until = held[1]
            described["held"] = {**_as_json(held[0]), "for_s": None if until is None else round(until - now, 1)}
        if self._decision is not None:
            described["forecast"] = _forecast(self._decision)
        return described

    # --- once per interval ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Called several times a second."""
        now = self._clock.now()
        self._autoscaler.lapse(now)
        if not self._is_decided:
            self._shown, self._decision = None, None
        interval_s = now - self._began_s
        is_over = interval_s >= self._config.scale_interval
        if not is_over and not self._is_wanted:
            return
        self._is_wanted, view = False, self._dispatcher.view()
        if not is_over:  # what came is counted when it is: other routers tell theirs once in each
            if self._is_leader and self._is_decided:
                self._decide(view, SeenLoad(num_queued=view.num_queued), 0.0)
            return
        self._began_s = now
        self._fleet.measure_starts(view, now)
        seen, others, self._seen = self._record.take(view.num_queued), self._seen, []
        if not self._is_leader and self._launcher is not None:
            self._launcher(seen.as_event())
        elif self._is_decided:
            self._decide(view, seen.joined(others), interval_s)

    def _decide(self, view: PoolView, seen: SeenLoad, interval_s: float) -> None:
        now = self._clock.now()
        limits = self._limits.of(view.workers)
        if not self._times.choose(view.workers):
            limits = None
        if limits is None and self._launcher is None and self._autoscaler.held is None:
            return  # without a launcher nobody says what the fleet should be, and who starts workers reads what is said
        waits = self._asked_s is not None and now - self._asked_s < _ANSWER_S
        decision = self._autoscaler.decide(self._snapshot(view, limits, seen, interval_s, now))
        shown = Counts(decision.prefill, decision.decode), decision.reason
        is_news = self._shown is None or self._shown[0] != shown[0]
        self._shown, self._decision = shown, decision
        if is_news:
            log.info("autoscale", mode=self._config.mode, desired=_as_json(shown[0]), reason=decision.reason)
        if self._config.mode == "on" or self._autoscaler.held is not None:
            self._carry_out(decision, view, now, waits=waits, is_news=is_news)
        elif is_news and self._launcher is not None:
            self._request_scale(decision, Counts(0, 0), (), now)

    def _carry_out(self, decision: ScaleDecision, view: PoolView, now: float, *, waits: bool, is_news: bool) -> None:
        for worker_id, pool in decision.flips:
            if self._dispatcher.set_role(worker_id, pool):
                self._fleet.give_role(worker_id, pool, now)
                log.info("role_change", worker_id=worker_id, role=pool, reason=decision.reason)
        # One that drains although nobody here asked for it will not be counted on again: its place is given to another.
        drained = [m.worker_id for m in self._fleet.members(view, now) if m.state is MemberState.DRAINING]
        lost = [name for name in drained if name in self._fleet]
        is_request = bool(is_news or decision.removals or lost or decision.additions.total)
        if self._launcher is not None and is_request and not waits:
            self._request_scale(decision, decision.additions, decision.removals, now, lost=lost)

    def _request_scale(
        self, decision: ScaleDecision, add: Counts, remove: Sequence[str], now: float, *, lost: Sequence[str] = ()
    ) -> None:
        """`lost`: they drain already, and shall not come back."""
        assert self._launcher is not None
        self._seq += 1
        if add.total or remove or lost:
            self._asked_s = now
        self._launcher(
            {
                "event": "scale",
                "seq": self._seq,
                "add": _as_json(add),
                "remove": list(remove),
                "lost": list(lost),
                "desired": [decision.prefill, decision.decode],
                "reason": decision.reason,
            }
        )

    def _snapshot(
        self, view: PoolView, limits: WorkerLimits | None, seen: SeenLoad, interval_s: float, now: float
    ) -> LoadSnapshot:
        if seen.prompts:
            self._mean_prompt = sum(seen.prompts) / len(seen.prompts)
        return LoadSnapshot(
            now_s=now,
            interval_s=interval_s,
            week_s=self._week_s(),
            prompts=seen.prompts,
            answers=seen.answers,
            members=tuple(self._fleet.members(view, now)),
            limits=limits,
            queued_tokens=round(seen.num_queued * self._mean_prompt),
            ttft=seen.ttft,
            tpot=seen.tpot,
            start_s=_FIRST_START_S if self._fleet.start_s is None else self._fleet.start_s,
            desired=self.desired,
        )


def _as_json(counts: Counts) -> dict[str, int]:
    return {"prefill": counts.prefill, "decode": counts.decode}


def _limits(config: AutoscaleConfig) -> dict[str, object]:
    return {
        "prefill": [config.prefill.at_least, config.prefill.at_most],
        "decode": [config.decode.at_least, config.decode.at_most],
    }


def _forecast(decision: ScaleDecision) -> dict[str, object]:
    forecast = decision.forecast
    return {
        "requests_per_s": round(forecast.requests_per_s, 3),
        "prompt_tokens_per_s": round(forecast.prompt_tokens_per_s, 1),
        "output_tokens_per_s": round(forecast.output_tokens_per_s, 1),
        "needed": _as_json(forecast.needed),
        "with_headroom": _as_json(forecast.with_headroom),
        "correction": {pool: round(factor, 3) for pool, factor in zip(POOLS, forecast.correction, strict=True)},
    }
