"""Time limits of requests: a pure judgement when one is due, carried out by `due_checks.py`.

    deadline over, no worker for too long                    the request fails
    an answer or a token is missing, the workers are idle    the attempt fails
    the prefill worker is through and nothing arrived        the decode worker is asked
    a handoff failed with every pair                         they are tried again, as long as attempts are left

Most of these never fire: a worker that cannot go on says so, and one that is gone is seen at once. They are what is
left when a message got lost with its session, so that every request ends.
"""

from __future__ import annotations

from enum import Enum

from ..state.attempt import ANSWER_WITHIN_S, Attempt, AttemptState
from ..state.errors import StreamError
from ..state.failures import Blame
from ..state.pools import Pools
from ..state.request import RequestStatus
from ..state.tracked_request import TrackedRequest
from ..state.worker import RouterWorker

WORKER_WAIT_S = 30.0  # for a worker to come, or to come back
PAIR_WAIT_S = 1.0  # a handoff failed with every pair: a worker of one may just be found dead, or was only late
FORGOTTEN_S = 3.5  # no message, and a heartbeat after that says that the worker is idle
QUEUE_CHECK_S = 1.0  # a queued request is looked at so often at least
CHECK_AGAIN_S = 0.1  # after a limit that has passed and decides nothing yet
GAP_LIMIT_S = 1.0  # then a missing token does not come any more
HELD_LIMIT_S = 1.0  # prompt logprobs that have not come by then do not hold back tokens any longer
ARRIVAL_LIMIT_S = 30.0  # from the last news of a computed prompt to its KV's arrival


class DeadlineVerdict(Enum):
    ASK = "ask"  # ask the decode worker whether the KV has arrived
    TRY_AGAIN = "try again"  # the pairs that have failed


class Deadlines:
    """`Deadlines` knows since when a role has had no worker, and judges requests."""

    def __init__(self, pools: Pools, *, expects_prefill: bool, may_prefill_locally: bool) -> None:
        self._pools = pools
        self._roles = ("decode",) if may_prefill_locally else ("decode", "prefill")
        decodes_embed = may_prefill_locally or not expects_prefill
        self._embedding_roles = ("prefill",) * expects_prefill + ("decode",) * decodes_embed  # one of them is enough
        self._absent_s: dict[str, float] = {}

    def check_pools(self, now_s: float) -> None:
        for role in ("decode", "prefill"):
            if self._pools.has_ready(role):
                self._absent_s.pop(role, None)
            else:
                self._absent_s.setdefault(role, now_s)

    def forgive_workers(self, now_s: float) -> None:
        for worker in self._pools:
            worker.forgive_silence(now_s)

    def judge_deadline(self, tracked: TrackedRequest, now_s: float) -> StreamError | Blame | DeadlineVerdict | None:
        if tracked.deadline_s is not None and now_s >= tracked.deadline_s:
            request = tracked.request
            allowed_s = request.timeout_s if request.allowed_s is None else request.allowed_s
            text = f"the request's {allowed_s:g} s are over, it was {request.status.value}"
            return StreamError(text, "deadline_exceeded", 504)
        attempt = tracked.attempt
        if attempt is None:
            return self._judge_queued(tracked, now_s)
        missing = _missing_answer(attempt, now_s) or _missing_token(attempt, now_s)
        return missing or _forgotten(attempt, tracked.event_s, now_s)

    def next_check_s(self, tracked: TrackedRequest, now_s: float) -> float:
        """Return when `judge_deadline` may have something to say, if nothing happens before that."""
        at_s = self._attempt_check_s(tracked, now_s)
        if tracked.deadline_s is not None:
            at_s = min(at_s, tracked.deadline_s)
        if tracked.attempt is not None and tracked.attempt.gap_s is not None:
            at_s = min(at_s, tracked.attempt.gap_s + GAP_LIMIT_S)
        if tracked.stream.is_held:
            at_s = min(at_s, tracked.request.timestamps.get("first_token", now_s) + HELD_LIMIT_S)
        return at_s if at_s > now_s else now_s + CHECK_AGAIN_S

    def _attempt_check_s(self, tracked: TrackedRequest, now_s: float) -> float:
        if tracked.charge is not None and not tracked.charge.is_paid:
            return now_s + CHECK_AGAIN_S
        if tracked.attempt is None:
            at_s = now_s + QUEUE_CHECK_S
            if tracked.search.lacks_s is not None:
                at_s = min(at_s, tracked.search.lacks_s + PAIR_WAIT_S)
            absent_s = self._absent_of(tracked).values()
            return min([at_s, *(max(since_s, tracked.event_s) + WORKER_WAIT_S for since_s in absent_s)])
        answer_due_s = tracked.attempt.answer_due_s
        return tracked.event_s + FORGOTTEN_S if answer_due_s is None else answer_due_s

    def _absent_of(self, tracked: TrackedRequest) -> dict[str, float]:
        """Return since when there has been no worker of each role without which the request cannot be served."""
        absent_s = self._absent_s
        if tracked.request.pooling is None:
            return {role: absent_s[role] for role in self._roles if role in absent_s}
        if not all(role in absent_s for role in self._embedding_roles):
            return {}
        return {self._embedding_roles[0]: max(absent_s[role] for role in self._embedding_roles)}

    def _judge_queued(self, tracked: TrackedRequest, now_s: float) -> StreamError | DeadlineVerdict | None:
        for role, since_s in self._absent_of(tracked).items():
            waited_s = now_s - max(since_s, tracked.event_s)
            if waited_s >= WORKER_WAIT_S:
                return StreamError(f"no {role} worker for {waited_s:.0f} s", f"no_{role}_capacity", 503)
        search = tracked.search
        if search.misfit_s is not None and now_s - search.misfit_s >= WORKER_WAIT_S:
            text = f"no worker that could hold the request for {now_s - search.misfit_s:.0f} s"
            return StreamError(text, "no_decode_capacity", 503)
        if search.lacks_s is not None and now_s - search.lacks_s >= PAIR_WAIT_S:
            return DeadlineVerdict.TRY_AGAIN
        return None


def forgive(attempt: Attempt, now_s: float) -> None:
    """Let an answer and a token that are missing come as late as if they were missed from now on."""
    if attempt.answer_due_s is not None:
        attempt.answer_due_s = now_s + ANSWER_WITHIN_S
    if attempt.gap_s is not None:
        attempt.gap_s = now_s


def _missing_answer(attempt: Attempt, now_s: float) -> Blame | None:
    if attempt.answer_due_s is None or now_s < attempt.answer_due_s:
        return None
    if attempt.lost_prefill is not None:
        return attempt.lost_prefill
    return Blame("no_answer", f"decode worker {attempt.decode.worker_id} did not answer in time")


def _missing_token(attempt: Attempt, now_s: float) -> Blame | None:
    if attempt.gap_s is None or now_s - attempt.gap_s < GAP_LIMIT_S:
        return None
    if not any(choice.has_gap for choice in attempt.request.choices):
        attempt.gap_s = None
        return None
    return Blame("gap", f"a token of {attempt.pair} is missing")


def _forgotten(attempt: Attempt, event_s: float, now_s: float) -> Blame | DeadlineVerdict | None:
    if attempt.answer_due_s is not None or attempt.request.status is RequestStatus.RESERVED:
        return None
    if attempt.is_prefilling_remotely:
        assert attempt.prefill is not None
        is_late = attempt.state >= AttemptState.COMPUTED and now_s - event_s > ARRIVAL_LIMIT_S
        return DeadlineVerdict.ASK if is_late or _is_idle_since(attempt.prefill, event_s) else None
    if _is_idle_since(attempt.decode, event_s):
        role = "decode" if attempt.embedder is None else "prefill"
        text = f"{role} worker {attempt.decode.worker_id} is idle and said nothing of the request"
        return Blame("forgotten", text)
    return None


def _is_idle_since(worker: RouterWorker, event_s: float) -> bool:
    return worker.is_idle and worker.status_s > event_s + FORGOTTEN_S
