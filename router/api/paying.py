"""Charges a call to its key's quota, where its answer may have been told before.

    a new one            a request, its prompt and its longest answer
    told, and goes on    a request, and the tokens that may still come: the others were paid for when they were told
    told to its end      nothing

Whether it was told is known once the answer is taken, and taking ends an older connection: a new answer is paid for
before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.request import SamplingParams
from ..access.quota import Quotas
from ..kept.answers import KeptAnswers, names_told, take
from ..kept.asking import KEY_HEADER
from ..kept.kept_answer import KeptAnswer, given_back
from .middleware import RequestContext


def enter(quotas: Quotas, answers: KeptAnswers | None, context: RequestContext, *, is_named: bool) -> None:
    """Let a call in; one whose answer `is_named` may come beside used-up quotas if something of that was told.

    Raises CapacityError (429).
    """
    if not context.is_background:
        looks = is_named and answers is not None and quotas.limits.has_rates
        may_repeat = looks and names_told(answers, context.headers, context.tenant)
        context.allowance = quotas.enter(context.tenant, may_repeat=may_repeat)


def charge(context: RequestContext, num_tokens: int) -> None:
    """Charge a call's key with the tokens that it may cost. Raises CapacityError (429)."""
    if context.allowance is not None:
        context.allowance.charge(num_tokens)


async def take_paid(
    answers: KeptAnswers | None,
    context: RequestContext,
    served: str,
    sampling: Sequence[SamplingParams],
    num_choices: int,
    num_prompt_tokens: int,
) -> KeptAnswer | None:
    """Take the answer of a call's key, as `take` does, and charge the key. Raises CapacityError (429), too."""
    allowance = context.allowance
    num_tokens = num_prompt_tokens + num_choices * sum(params.max_tokens for params in sampling)
    is_charged = allowance is None or not allowance.may_repeat
    if is_charged:
        charge(context, num_tokens)
    kept = await take(answers, context.answer_key, served, sampling)
    if allowance is None:
        return kept
    with given_back(kept):
        if kept is not None and kept.is_repeated:
            num_tokens = kept.num_open_tokens(num_choices)
            # Workers compute the prompt of one that goes on: a client that asks for it again and again pays for that.
            if not num_tokens or KEY_HEADER not in context.headers:
                allowance.waive()
        if not is_charged:
            charge(context, num_tokens)
    return kept
