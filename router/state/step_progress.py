"""Heartbeats tell how long a worker's steps take, and whether they still end."""

from __future__ import annotations

from dataclasses import dataclass

from ...wire.workers import WorkerStatus

STEP_LIMIT_S = 3.0  # a step may take this, or five times what it should
FIRST_STEP_LIMIT_S = 60.0  # nothing is known yet, and the first step warms up
STALL_LIMIT_S = 15.0  # work waits and none runs: the worker may wait for a fence (10 s)
_SLACK = 5.0  # times that a full step may take what it should, by the largest step seen
_PREFILL_STEP_TOKENS = 16  # from so many on, a step tells how long prompt tokens take


@dataclass(slots=True)
class StepProgress:
    """The steps of one worker, as far as its heartbeats have told of them."""

    _largest_step: tuple[int, float] = (0, 0.0)  # tokens, seconds
    _prefill_step: tuple[int, float] = (0, 0.0)  # the latest one that was no mere decode step
    _progress_s: float = 0.0  # when a step last finished, or none was to be

    @property
    def prefill_step_s(self) -> float:
        """Return how long the latest step with prompt tokens took."""
        return self._prefill_step[1]

    @property
    def s_per_token(self) -> float:
        """Return the seconds that a prompt token took in it; 0: there was none yet."""
        tokens, step_s = self._prefill_step
        return step_s / tokens if tokens else 0.0

    def on_status(self, previous: WorkerStatus | None, status: WorkerStatus, now_s: float) -> None:
        stepped = previous is None or status.steps != previous.steps
        if stepped and status.step_tokens >= self._largest_step[0]:
            self._largest_step = (status.step_tokens, status.step_s)
        if stepped and status.step_tokens >= _PREFILL_STEP_TOKENS:
            self._prefill_step = (status.step_tokens, status.step_s)
        # What waits may wait for an adapter: its worker gives up a load that takes long (`worker.adapters`).
        loads = status.loading_adapters and not status.num_running
        if stepped or loads or not (status.num_running or status.num_waiting):
            self._progress_s = now_s

    def forgive(self, now_s: float) -> None:
        """Count a standstill from now on."""
        self._progress_s = now_s

    def hang(self, status: WorkerStatus, status_s: float, now_s: float, max_step_tokens: int) -> str | None:
        """Return why a worker counts as hung that still beats, or None. `status_s`: when its heartbeat came."""
        limit_s = self._step_limit_s(max_step_tokens)
        if status.busy_for_s > limit_s:
            return f"a step runs for {status.busy_for_s:.1f} s, the limit is {limit_s:.1f} s"
        if not status.num_running:
            limit_s = max(limit_s, STALL_LIMIT_S)
        # A step that runs now began when what it waited for was there: a prefix that was read from elsewhere.
        began_s = status_s - status.busy_for_s if status.busy_for_s else self._progress_s
        stalled_s = now_s - max(self._progress_s, began_s)
        if (status.num_running or status.num_waiting) and stalled_s > limit_s:
            return f"work waits and no step has finished for {stalled_s:.1f} s, the limit is {limit_s:.1f} s"
        return None

    def _step_limit_s(self, max_step_tokens: int) -> float:
        tokens, step_s = self._largest_step
        if not tokens:
            return FIRST_STEP_LIMIT_S
        full_step_s = step_s * max(1.0, max_step_tokens / tokens)
        return max(STEP_LIMIT_S, _SLACK * full_step_s)
