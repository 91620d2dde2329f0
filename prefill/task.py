"""One attempt at a prompt on a prefill worker, and what its last chunk yields for the router."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.batch import RowOutput
from ..common.request import FinishReason, RequestSpec, finish_reason
from ..common.vectors import unit
from ..wire.grants import GrantInfo
from ..wire.results import ChoiceTokens, Embedding, FirstToken, WorkerFailure, nonfinite_states
from .scheduler import Prompt


@dataclass(slots=True, eq=False)
class Task:
    """One attempt at a request on this worker."""

    router_id: str
    spec: RequestSpec
    grant: GrantInfo | None  # None: the prompt is embedded here, and nothing is shipped
    prompt: Prompt
    open_id: int | None = None  # the shipment, once its first chunk was scheduled, or before if that takes time
    is_begun: bool = False  # its first chunk was scheduled
    stepping: bool = False  # its row is in the step that computes now
    dead: bool = False  # aborted meanwhile
    pooled: bytes = b""  # the sum of the hidden states so far (common/vectors.py)


def first_tokens(
    task: Task, result: RowOutput, *, eos_token_ids: frozenset[int], max_model_len: int
) -> tuple[ChoiceTokens, ...]:
    """Return the token of each choice that the prompt's last row yielded, and which choices end with it."""
    seq = task.prompt.seq
    choices = []
    for choice, (token,) in zip(task.spec.choices, result.runs, strict=True):
        reason: FinishReason | None = finish_reason(
            seq.sampling,
            token.token_id,
            num_output_tokens=1,
            num_tokens=seq.num_prompt_tokens + 1,
            eos_token_ids=eos_token_ids,
            max_model_len=max_model_len,
            ends_by_grammar=seq.ends_by_grammar,
        )
        choices.append(ChoiceTokens(choice, 0, (token,), reason))
    return tuple(choices)


def first_token_message(task: Task, choices: tuple[ChoiceTokens, ...], now_s: float) -> FirstToken:
    queue_s, prefill_s = _times_s(task.prompt, now_s)
    return FirstToken(
        request_id=task.spec.request_id,
        attempt=task.spec.attempt,
        choices=choices,
        num_cached_tokens=task.prompt.seq.num_cached_tokens,
        prefill_s=prefill_s,
        queue_s=queue_s,
    )


def embedding_message(task: Task, now_s: float) -> Embedding | WorkerFailure:
    """Return the vector of a prompt that is computed, or that it has none."""
    seq, vector = task.prompt.seq, unit(task.pooled)
    if vector is None:
        return nonfinite_states(seq)
    queue_s, prefill_s = _times_s(task.prompt, now_s)
    return Embedding(
        request_id=task.spec.request_id,
        attempt=task.spec.attempt,
        vector=vector,
        num_cached_tokens=seq.num_cached_tokens,
        prefill_s=prefill_s,
        queue_s=queue_s,
    )


def _times_s(prompt: Prompt, now_s: float) -> tuple[float, float]:
    """Return how long the prompt waited for its first chunk, and how long it has taken since."""
    started = prompt.started_s if prompt.started_s is not None else prompt.received_s
    return max(0.0, started - prompt.received_s), max(0.0, now_s - started)
