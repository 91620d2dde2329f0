"""A worker answers its router by these: a request's tokens, refusals and failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from ..common.request import MAX_CHOICES, RequestSpec, SampledToken, Sequence
from .fields import Count, Message, Name, Text, Tokens, Vector
from .grants import GrantInfo


class Grant(Message):
    request_id: Name
    attempt: Count
    grant: GrantInfo


class NoCapacity(Message):
    """`reason`: blocks, growth, never_fits, draining, stale, expired, held, wrong_role, no_agent (nobody can write here
    now), or one of served.UNSERVED."""

    request_id: Name
    attempt: Count
    reason: Name
    num_free_blocks: Count = 0
    num_cached_tokens: Count = 0
    retry_after_s: float = 0.05
    detail: Text = ""


class TaskRefused(Message):
    """A task was not begun, or its answer ended. `reason`: blocks, never_fits, draining, incompatible, stale, expired,
    wrong_role, or one of served.UNSERVED."""

    request_id: Name
    attempt: Count
    reason: Name
    detail: Text = ""


class HandoffDone(Message):
    """The decode worker has all of the KV: the prefill worker's part in the request is over."""

    request_id: Name
    attempt: Count
    num_bytes: Count = 0


class HandoffFailed(Message):
    """`blame`: peer, link, self, fenced, expired, refused, draining, checksum, abort, ended, unknown. `worker_id`: the
    peer that failed.

    fenced: of a healthy peer, whose handoff ended because the agent that it wrote to was replaced. refused: its prefill
    worker asked for the grant and may not open it. draining: its decode worker drains.
    """

    request_id: Name
    attempt: Count
    reason: Text
    blame: Name
    worker_id: Name = ""


class ChoiceTokens(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """New tokens of one choice: indices first_index, first_index + 1, ... of its output."""

    choice: Count
    first_index: Count
    tokens: Tokens
    finish: Name | None = None  # FinishReason; tokens end with it


ChoiceList = Annotated[tuple[ChoiceTokens, ...], msgspec.Meta(max_length=MAX_CHOICES)]


class FirstToken(Message):
    """The prefill worker's first tokens; a decode worker that computed the prompt itself sends StepTokens."""

    request_id: Name
    attempt: Count
    choices: ChoiceList
    num_cached_tokens: Count
    prefill_s: float  # from the first chunk's start to the first token
    queue_s: float  # from the task's receipt to the first chunk's start


class Embedding(Message):
    """Answers an EmbedTask, whose request has ended with it."""

    request_id: Name
    attempt: Count
    vector: Vector  # of length 1, one value for each feature of the model's hidden states
    num_cached_tokens: Count
    prefill_s: float  # from the first chunk's start to the vector
    queue_s: float  # from the task's receipt to the first chunk's start

    def __post_init__(self) -> None:
        if len(self.vector) % 4:
            raise ValueError("a value of a vector is 4 bytes")


class PromptLogprobs(Message):
    """Entry i is about prompt token `start` + i, given the tokens before it. Sent before the first token."""

    request_id: Name
    attempt: Count
    start: Count
    tokens: Tokens


def in_pieces(
    spec: RequestSpec, first: int, tokens: tuple[SampledToken, ...], size: int = 256
) -> Iterator[PromptLogprobs]:
    """Yield prompt logprobs from prompt token `first` on, in messages that stay small whatever the prompt's length."""
    for offset in range(0, len(tokens), size):
        yield PromptLogprobs(
            request_id=spec.request_id,
            attempt=spec.attempt,
            start=first + offset,
            tokens=tokens[offset : offset + size],
        )


class RequestTokens(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    request_id: Name
    attempt: Count
    choices: ChoiceList
    num_cached_tokens: Count = 0


class StepTokens(Message):
    """Everything that one step of a decode worker yielded for one router."""

    updates: Annotated[tuple[RequestTokens, ...], msgspec.Meta(max_length=16384)]
    is_rest: bool = False  # of the step that the message before is of


def halves(message: StepTokens) -> tuple[StepTokens, StepTokens]:
    """Split what one step has yielded for several requests, in their order."""
    middle = len(message.updates) // 2
    first = StepTokens(updates=message.updates[:middle], is_rest=message.is_rest)
    return first, StepTokens(updates=message.updates[middle:], is_rest=True)


class WorkerFailure(Message):
    """A request that a worker could not run."""

    request_id: Name
    attempt: Count
    reason: Text
    code: Name = ""  # of the client's error, where every worker would fail alike; empty: another one may do better


def nothing_to_choose(seq: Sequence, grammar_failure: str) -> WorkerFailure:
    """Report that no token follows: because of its grammar, which `grammar_failure` tells, or of its logits."""
    if not grammar_failure:
        return nonfinite_logits(seq)
    reason = f"the grammar cannot be followed behind token {seq.num_tokens}: {grammar_failure}"
    return WorkerFailure(request_id=seq.request_id, attempt=seq.attempt, reason=reason, code="grammar_failed")


def nonfinite_states(seq: Sequence) -> WorkerFailure:
    """Report hidden states that are no numbers: by model and prompt."""
    reason = f"the hidden states of the prompt's {seq.num_tokens} tokens are NaN or infinite: there is no embedding"
    return WorkerFailure(request_id=seq.request_id, attempt=seq.attempt, reason=reason, code="nonfinite_states")


def nonfinite_logits(seq: Sequence) -> WorkerFailure:
    """Report logits that are no distribution: by model and prompt, or by what the request does to the logits."""
    reason = f"the logits that follow token {seq.num_tokens} are NaN or infinite: there is no token to choose"
    return WorkerFailure(request_id=seq.request_id, attempt=seq.attempt, reason=reason, code="nonfinite_logits")
