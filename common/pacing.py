"""Prompts and running answers share a worker's time by rules that workers hold to and the router reckons with."""

from __future__ import annotations

from dataclasses import dataclass

# A queued prompt is due this many times its own predicted time after it came, so that short ones go first and none
# starves. Larger favours short prompts more, smaller is closer to first come, first served.
PROMPT_DUE_STRETCH = 3.0
MIN_CHUNK_TOKENS = 8  # of a prompt in a step, whatever the objective: a prompt always moves on
_OBJECTIVE_SHARE = 0.85  # of an objective that a step may take: results are handed out and sent in the rest
# Without an objective: what prompts wait for, the time of each with those before it, is spread over so many steps of
# the answers that run, the more of these the more, within bounds that are multiples of what the answers alone take.
# More steps make streams faster and first tokens later. Measured with benchmarks.serve at two to sixteen requests in
# flight, prompts of 512 to 2,048 tokens, on processors where 512 tokens take four of the answers' steps and where they
# take twenty. The lower bound is for the former, on which prompts would queue up; where few answers run, prompts come
# rarely, and it is lower. Beside one answer 4 steps do as well as 8, and first tokens come a tenth sooner where prompts
# are fast: simulated with the step times of five processors, two and three prompts of 2,048 tokens in flight.
_MOST_STEPS = 24
_STEPS_BESIDE_ONE = 4
_STEPS_PER_FURTHER_ANSWER = 12
_LEAST_ADDED = 1.25  # of what the answers alone take, beside _MANY_ANSWERS and more
_MANY_ANSWERS = 8
_MOST_STRETCH = 12.0
# In any case a step may take so long, as nobody reads faster: nearly the first beside one answer, the second beside
# _MANY_ANSWERS. Of prompts that are cut smaller the others' streams gain little, as all that prompts take comes between
# two of their tokens anyway, and their own answers begin later. Simulated with the step times of five processors: at
# two and four requests in flight first tokens come up to 40 % sooner than with 20 ms, and tokens up to 5 % later.
_MIN_STEP_S = 0.05
_MIN_STEP_BESIDE_MANY_S = 0.02
# Where prompts wait for others, streams come first: pools are parted for their sake. A shorter step would compute too
# few tokens to be of help. Where lone answers are fast it follows them: measured with benchmarks.serve at eight and
# sixteen in flight on processors that take 7 and 13 ms for one on a core. On the faster, 30 ms make answers twice as
# slow as 2.25 times does, which has first tokens a second later; 2 times has them later yet, and answers no faster.
# Between 2.25 and 2.75 either is exchanged for the other.
_MOST_HELPING_STEP_S = 0.03
_HELPING_STRETCH_OF_ONE = 2.5  # of a lone answer's step
_HELPING_STRETCH = 1.5


@dataclass(slots=True, frozen=True)
class RunningAnswers:
    """Answers of which each gets a token in every step."""

    number: int
    step_s: float  # of a step with these alone
    lone_step_s: float  # with one of them alone; 0: not known yet


@dataclass(slots=True, frozen=True)
class WaitingPrompts:
    """Prompts that wait for a worker, those included that have begun."""

    seconds: float  # what all take, with what they took so far, so that none slows down towards its end
    number: float  # of so many equal ones the k-th waits for k


def longest_step_s(objective_s: float | None, answers: RunningAnswers, waiting: WaitingPrompts | None) -> float:
    """Return how long a step may take that computes prompts beside running answers (seconds).

    `objective_s`: the time per token of the strictest of them. `waiting` None: prompts wait for prefill workers, and
    this one only helps.
    """
    if objective_s is not None:
        return _OBJECTIVE_SHARE * objective_s
    step_s = answers.step_s
    if waiting is None:
        of_one_s = _HELPING_STRETCH_OF_ONE * answers.lone_step_s or _MOST_HELPING_STEP_S
        return max(min(of_one_s, _MOST_HELPING_STEP_S), _HELPING_STRETCH * step_s)
    waited_s = waiting.seconds * (1 + max(1.0, waiting.number)) / 2
    further = max(0, answers.number - 1)
    shared_s = step_s + waited_s / min(_MOST_STEPS, _STEPS_BESIDE_ONE + _STEPS_PER_FURTHER_ANSWER * further)
    crowd = min(1.0, answers.number / _MANY_ANSWERS)
    least_s = step_s * (1 + _LEAST_ADDED * crowd)
    min_step_s = _MIN_STEP_S + (_MIN_STEP_BESIDE_MANY_S - _MIN_STEP_S) * crowd
    return max(min_step_s, min(max(shared_s, least_s), _MOST_STRETCH * step_s))


# A step of background requests alone is cut to about this: who comes while it runs waits for its end. Larger ones
# compute more in a second, smaller ones are noticed less.
BACKGROUND_STEP_S = 0.01
