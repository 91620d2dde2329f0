"""Prompts and running answers share a worker's time by rules that workers hold to and the router reckons with."""

from __future__ import annotations

# A queued prompt is due this many times its own predicted time after it came, so that short ones go first and none
# starves. Larger favours short prompts more, smaller is closer to first come, first served.
PROMPT_DUE_STRETCH = 3.0
MIN_CHUNK_TOKENS = 8  # of a prompt in a step, whatever the objective: a prompt always moves on
_OBJECTIVE_SHARE = 0.85  # of an objective that a step may take: results are handed out and sent in the rest
# Without an objective: what prompts wait for, the time of each with those before it, is spread over so many steps of
# the answers that run, the more of these the more, within bounds that are multiples of what the answers alone take;
# and a step may take _MIN_STEP_S in any case, as nobody reads faster. More steps make streams faster and first tokens
# later. Measured with benchmarks.serve at two to sixteen requests in flight, prompts of 512 to 2,048 tokens, on
# processors where 512 tokens take four of the answers' steps and where they take twenty. The lower bound is for the
# former, on which prompts would queue up; where few answers run, prompts come rarely, and it is lower.
_MOST_STEPS = 24
_LEAST_STEPS = 6
_STEPS_PER_ANSWER = 6
_LEAST_ADDED = 1.25  # of what the answers alone take, beside _MANY_ANSWERS and more
_MANY_ANSWERS = 8
_MOST_STRETCH = 12.0
_MIN_STEP_S = 0.02
# Where prompts wait for others: a shorter step would compute too few tokens to be of help, and streams come first.
_MIN_HELPING_STEP_S = 0.03
_LEAST_HELPING_STRETCH = 1.5


def longest_step_s(
    objective_s: float | None, decode_s: float, num_answers: int, waiting_s: float | None, num_waiting: float = 1.0
) -> float:
    """Return how long a step may take that computes prompts beside so many running answers (seconds).

    `objective_s`: the time per token of the strictest answer in it. `decode_s`: of a step with its answers alone.
    `waiting_s`: what all prompts take that wait for this worker; of those that have begun what they took so far as
    well, so that none slows down towards its end. None: they wait for prefill workers, and this one only helps.
    `num_waiting`: how many they are; of so many equal ones the k-th waits for k.
    """
    if objective_s is not None:
        return _OBJECTIVE_SHARE * objective_s
    if waiting_s is None:
        return max(_MIN_HELPING_STEP_S, _LEAST_HELPING_STRETCH * decode_s)
    waited_s = waiting_s * (1 + max(1.0, num_waiting)) / 2
    shared_s = decode_s + waited_s / min(_MOST_STEPS, _LEAST_STEPS + _STEPS_PER_ANSWER * num_answers)
    least_s = decode_s * (1 + _LEAST_ADDED * min(1.0, num_answers / _MANY_ANSWERS))
    return max(_MIN_STEP_S, min(max(shared_s, least_s), _MOST_STRETCH * decode_s))


# A step of background requests alone is cut to about this: who comes while it runs waits for its end. Larger ones
# compute more in a second, smaller ones are noticed less.
BACKGROUND_STEP_S = 0.01
