"""The last requests, the slowest and the failed ones, with what was decided about them: for /admin/requests.

    request ends ─> judge ─> Record ─> recent (the last thousand), slowest (of the last hour), failed

Bounded in number and in size: a record holds numbers, names of workers and reasons, never a prompt or an answer.
Times are durations; ages count from now.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from .decisions import Decision
from .outcome import ServiceOutcome, judge
from .request import RUN_MARK, RouterRequest

MAX_RECENT = 1000
MAX_FAILED = 200
MAX_SLOWEST = 50
_SLOW_FOR_S = 3600.0
_TENANT_DIGITS = 12  # of a name that is a hash: enough to tell tenants apart
_ID_PREFIXES = ("chatcmpl-", "cmpl-", "msg_", "resp_", "batch_req_")  # of the ids in answers

Kind = Literal["recent", "slowest", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(slots=True, frozen=True)
class Record:
    """One request as it is, or as it ended."""

    request_id: str
    tenant: str
    status: str
    error_code: str
    priority: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_choices: int
    max_tokens: int
    num_output_tokens: int
    num_failures: int
    prefill_worker: str | None
    decode_worker: str | None
    waiting_for: str
    queued_s: float  # the dispatcher's clock
    ended_s: float | None
    decisions: tuple[Decision, ...]
    outcome: ServiceOutcome

    @classmethod
    def from_request(cls, request: RouterRequest) -> Record:
        return cls(
            request_id=request.request_id,
            tenant=request.tenant[:_TENANT_DIGITS],
            status=request.status.value,
            error_code=request.error_code,
            priority=request.priority,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_choices=request.n,
            max_tokens=request.sampling.max_tokens,
            num_output_tokens=request.num_output_tokens,
            num_failures=request.num_failures,
            prefill_worker=request.prefill_worker,
            decode_worker=request.decode_worker,
            waiting_for=request.waiting_for,
            queued_s=request.timestamps.get("queued", 0.0),
            ended_s=request.timestamps.get("finished"),
            decisions=tuple(request.decisions),
            outcome=judge(request),
        )

    def summary(self, now_s: float) -> dict[str, object]:
        """Return it as a line of a list."""
        outcome = self.outcome
        return {
            "request_id": self.request_id,
            "class": outcome.request_class,
            "status": self.status,
            "error": self.error_code or None,
            "age_s": round(now_s - self.queued_s, 3),
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_output_tokens,
            "ttft_ms": _ms(outcome.ttft_s),
            "predicted_ttft_ms": _ms(outcome.predicted_ttft_s),
            "tpot_ms": _ms(outcome.tpot_s),
            "good": outcome.is_good,
            "missed_stage": outcome.missed_stage or None,
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
        }

    def details(self, now_s: float) -> dict[str, object]:
        """Return all of it."""
        outcome = self.outcome
        return self.summary(now_s) | {
            "tenant": self.tenant,
            "priority": self.priority,
            "cached_tokens": self.num_cached_tokens,
            "choices": self.num_choices,
            "max_tokens": self.max_tokens,
            "failed_attempts": self.num_failures,
            "waiting_for": self.waiting_for or None,
            "objectives": {"ttft_ms": _ms(outcome.ttft_limit_s), "tpot_ms": _ms(outcome.tpot_limit_s)},
            "predicted_tpot_ms": _ms(outcome.predicted_tpot_s),
            "phases_ms": {name: _ms(seconds) for name, seconds in outcome.phases_s.items()},
            "decisions": [_decision(decision, self.queued_s) for decision in self.decisions],
        }


class RequestHistory:
    """`RequestHistory` keeps one router's records. They are made where a request ends, and read where somebody asks."""

    def __init__(self) -> None:
        self._recent: deque[Record] = deque(maxlen=MAX_RECENT)
        self._failed: deque[Record] = deque(maxlen=MAX_FAILED)
        self._slowest: list[Record] = []  # by time to first token, the slowest first

    def add(self, request: RouterRequest) -> ServiceOutcome:
        """A request that has ended."""
        record = Record.from_request(request)
        self._recent.append(record)
        if record.status == "failed":
            self._failed.append(record)
        self._forget_slow(record.ended_s or 0.0)
        ttft_s = record.outcome.ttft_s
        if ttft_s is not None and (len(self._slowest) < MAX_SLOWEST or ttft_s > _ttft_s(self._slowest[-1])):
            self._slowest = sorted([*self._slowest, record], key=_ttft_s, reverse=True)[:MAX_SLOWEST]
        return record.outcome

    def _forget_slow(self, now_s: float) -> None:
        since_s = now_s - _SLOW_FOR_S
        if any((record.ended_s or 0.0) < since_s for record in self._slowest):
            self._slowest = [record for record in self._slowest if (record.ended_s or 0.0) >= since_s]

    def list(
        self, kind: Kind, request_class: str | None = None, limit: int = 100, *, now_s: float | None = None
    ) -> list[Record]:
        """The newest first; of the slowest, the slowest. `now_s`: the time, where it may be later than the last end."""
        match kind:
            case "recent":
                records: Iterable[Record] = reversed(self._recent)
            case "failed":
                records = reversed(self._failed)
            case "slowest":
                if now_s is not None:
                    self._forget_slow(now_s)
                records = self._slowest
        found = (one for one in records if request_class is None or one.outcome.request_class == request_class)
        return [record for record, _ in zip(found, range(limit), strict=False)]

    def find(self, request_id: str) -> Record | None:
        return next((record for record in self._all() if is_named(record.request_id, request_id)), None)

    def _all(self) -> Iterator[Record]:
        yield from reversed(self._recent)
        yield from reversed(self._failed)
        yield from self._slowest


def is_named(request_id: str, name: str) -> bool:
    """`name`: the id itself, or the call's, under which its client knows it (the first prompt's of a batch).

    Of an answer that several routers ran, a call's name means whichever run this one had.
    """
    prefix = next((known for known in _ID_PREFIXES if name.startswith(known)), "")
    call = name.removeprefix(prefix)
    return request_id == name or request_id.partition(RUN_MARK)[0] in (call, f"{call}-0")


def _ttft_s(record: Record) -> float:
    return record.outcome.ttft_s or 0.0


def _decision(decision: Decision, queued_s: float) -> dict[str, object]:
    return {
        "attempt": decision.attempt,
        "at_ms": _ms(decision.at_s - queued_s),
        "policy": decision.policy,
        "reason": decision.reason,
        "waited_for": decision.waited_for or None,
        "prefill_worker": decision.prefill_worker,
        "decode_worker": decision.decode_worker,
        "ttft_ms": _ms(decision.ttft_s),
        "tpot_ms": _ms(decision.tpot_s),
        "candidates": [_renamed(asdict(candidate)) for candidate in decision.candidates],
    }


def _renamed(fields: dict[str, float | None]) -> dict[str, object]:
    """Seconds as milliseconds."""
    return {
        f"{name[:-2]}_ms" if name.endswith("_s") else name: _ms(value) if name.endswith("_s") else value
        for name, value in fields.items()
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
