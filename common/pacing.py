"""Prompts and running answers share a worker's time by rules that workers hold to and the router reckons with."""

from __future__ import annotations

# A queued prompt is due this many times its own predicted time after it came, so that short ones go first and none
# starves. Larger favours short prompts more, smaller is closer to first come, first served.
PROMPT_DUE_STRETCH = 3.0
MIN_CHUNK_TOKENS = 16  # of a prompt in a step, whatever the objective: a prompt always moves on
_OBJECTIVE_SHARE = 0.85  # of an objective that a step may take: results are handed out and sent in the rest
# Without an objective: a step may take this many times what its answers alone would, and _MIN_STEP_S in any case, since
# nobody reads faster. Larger makes first tokens sooner and streams slower.
_DECODE_STEP_STRETCH = 4.0
_MIN_STEP_S = 0.05


def longest_step_s(objective_s: float | None, decode_s: float) -> float:
    """Return how long a step may take that computes prompts beside running answers (seconds).

    `objective_s`: the time per token of the strictest answer in it. `decode_s`: of a step with its answers alone.
    """
    if objective_s is not None:
        return _OBJECTIVE_SHARE * objective_s
    return max(_MIN_STEP_S, _DECODE_STEP_STRETCH * decode_s)


# A step of background requests alone is cut to about this: who comes while it runs waits for its end. Larger ones
# compute more in a second, smaller ones are noticed less.
BACKGROUND_STEP_S = 0.01
