"""A request as it was asked (`SamplingParams`, `RequestSpec`) and the token state of one answer (`Sequence`).

A *request* is one client call for one prompt; it has `n` *choices*. A worker holds one `Sequence` for each
choice that it runs, except while the prompt is computed: then choice 0 stands for all of them, and the rest
are forked from it when the prompt's last token has been sampled.

This module knows neither blocks on a device nor the network.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, NewType

import msgspec
from msgspec.structs import force_setattr

from .adapter import NO_ADAPTER, HeldAdapter
from .grammar import TOKEN_KINDS, CompiledGrammar, Grammar, Matcher

RequestId = NewType("RequestId", str)
BlockId = int
TokenRun = Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=1024)]

MAX_CHOICES = 16
BACKGROUND_PRIORITY = 2**31  # behind everything that a client can name: nobody waits for these requests
DEFAULT_CLASS = "default"  # of requests that name no class
# Logits are float32: divided by less than this they overflow. The bounds for temperatures are vLLM's.
GREEDY_BELOW = 1e-5
MIN_TEMPERATURE = 0.01
MIN_REPETITION_PENALTY = 0.01
WHOLE_NUMBERS = range(-(2**63), 2**64)  # that messages, and answers that repeat a part of a body, have room for


class FinishReason(StrEnum):
    STOP = "stop"  # eos, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # the client left or an operator ended it
    ERROR = "error"


class Pooling(StrEnum):
    """The tokens of a prompt whose hidden states, added up and scaled to length 1, are its embedding."""

    LAST = "last"
    MEAN = "mean"  # every one
    CLS = "cls"  # the first one

    @property
    def allows_reuse(self) -> bool:
        """Tell whether a prompt whose beginning is in a prefix cache need not be computed again."""
        return self is Pooling.LAST


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rules by which the tokens of one request are chosen, and when they end. Stop *strings* are the router's.

    What is too small to divide logits by is raised here, for every way in: bodies, a model's defaults, the wire.
    """

    temperature: float = 1.0  # 0 = greedy, as is all below GREEDY_BELOW; else at least MIN_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # at least MIN_REPETITION_PENALTY
    logit_bias: Annotated[dict[int, float], msgspec.Meta(max_length=1024)] = {}
    max_tokens: int = 16
    min_tokens: int = 0
    stop_token_ids: Annotated[tuple[int, ...], msgspec.Meta(max_length=1024)] = ()
    bad_words: Annotated[tuple[TokenRun, ...], msgspec.Meta(max_length=1024)] = ()  # of which none is completed
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token's and the k best
    prompt_logprobs: int | None = None
    seed: int = 0  # the router draws one where the client gives none

    def __post_init__(self) -> None:
        temperature = max(MIN_TEMPERATURE, self.temperature) if self.temperature >= GREEDY_BELOW else 0.0
        force_setattr(self, "temperature", temperature)
        force_setattr(self, "repetition_penalty", max(MIN_REPETITION_PENALTY, self.repetition_penalty))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class RequestSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One attempt at a request as the router sends it to workers."""

    request_id: Annotated[str, msgspec.Meta(max_length=256)]
    attempt: Annotated[int, msgspec.Meta(ge=0)]
    prompt: bytes  # token ids, int32 little endian
    sampling: SamplingParams
    choices: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=MAX_CHOICES)] = (0,)  # still running
    outputs: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MAX_CHOICES)] = ()  # accepted, for each; empty: none
    cache_salt: Annotated[bytes, msgspec.Meta(max_length=2048)] = b""
    priority: int = 0  # lower runs first
    arrival: int = 0  # the router's counter: orders requests of one priority
    remaining_s: float | None = None  # until the request's deadline
    model: Annotated[str, msgspec.Meta(max_length=256)] = ""  # the served name of whose answer it is; "": the worker's
    adapter: Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[0-9a-f]*\Z")] = ""  # digest of its bytes; "": none
    grammar: Grammar | None = None  # None: any token may follow any other
    adapter_path: Annotated[str, msgspec.Meta(max_length=4096)] = ""  # where the adapter's bytes are, on workers

    def __post_init__(self) -> None:
        """Check what the types cannot say. From the wire, a ValueError here is a refused frame."""
        if any(len(ids) % 4 for ids in (self.prompt, *self.outputs)):
            raise ValueError("token ids are 4 bytes each")
        if self.outputs and len(self.outputs) != len(self.choices):
            raise ValueError("accepted tokens belong to as many choices")
        if not 0 <= min(self.choices) <= max(self.choices) < MAX_CHOICES:
            raise ValueError(f"choices are numbered from 0 to {MAX_CHOICES - 1}")

    def prompt_token_ids(self) -> list[int]:
        return unpack_ids(self.prompt)

    def output_token_ids(self, index: int) -> list[int]:
        """Return the accepted tokens of the choice at `index` of `choices`."""
        return unpack_ids(self.outputs[index]) if self.outputs else []

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) // 4

    @property
    def is_resume(self) -> bool:
        return any(self.outputs)


def pack_ids(token_ids: Iterable[int]) -> bytes:
    return array("i", token_ids).tobytes()


def unpack_ids(data: bytes) -> list[int]:
    ids = array("i")
    ids.frombytes(data)
    return ids.tolist()


class SampledToken(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One sampled token, or one of a prompt; `logprob` and `top` (best first) only where logprobs were asked for."""

    token_id: int
    logprob: float | None = None
    top: Annotated[tuple[tuple[int, float], ...], msgspec.Meta(max_length=64)] = ()
    rank: Annotated[int, msgspec.Meta(ge=0)] = 0  # of a prompt's: its place among all tokens, from 1 on; 0: not told

    @property
    def is_nan(self) -> bool:
        """Tell whether the model's logits were no distribution: the token has no log-probability."""
        return self.logprob is not None and math.isnan(self.logprob)


def reuses_prefix(sampling: SamplingParams, pooling: Pooling | None) -> bool:
    """Tell whether nothing is wanted of prompt tokens whose KV is there already: of those no logits and no states."""
    return sampling.prompt_logprobs is None and (pooling is None or pooling.allows_reuse)


@dataclass(slots=True, eq=False)
class Sequence:
    """The token state of one choice on one worker."""

    request_id: RequestId
    attempt: int
    choice: int
    token_ids: MutableSequence[int]  # prompt, then output
    num_prompt_tokens: int
    sampling: SamplingParams
    cache_salt: bytes = b""
    adapter: str = ""
    priority: int = 0
    arrival: int = 0
    pending_choices: tuple[int, ...] = ()  # choices forked from this one when its prompt is done
    samples: bool = True  # False: the prompt is computed for its KV alone (resume through prefill)
    pooling: Pooling | None = None  # of the prompt's hidden states, which are wanted and not a next token
    num_computed_tokens: int = 0  # tokens whose KV exists in block_table
    num_fed_again: int = 0  # tokens of an accepted draft whose keys and values are there, and no state behind them
    num_cached_tokens: int = 0  # computed tokens that came from the prefix cache
    has_begun: bool = False  # it had blocks before: what it finds in the cache may be its own work
    is_fetching: bool = False  # KV of it is on its way from another worker: it is not begun
    num_promoted_tokens: int = 0  # the last cached tokens, whose KV is not there before the first step has begun
    block_table: list[BlockId] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks hashed so far
    num_published_blocks: int = 0
    num_thin_blocks: int = 0  # leading ones that lack what windows no longer reach (`kvcache/thin.py`)
    is_retained_elsewhere: bool = False  # the prompt's KV, for those that share its beginning
    held_adapter: HeldAdapter | None = None  # `adapter` on this worker
    grammar: CompiledGrammar | None = None  # that the answer follows
    matcher: Matcher | None = None  # the engine's: where the answer stands in it (`engine/masks.py`)
    num_matched_tokens: int = 0  # tokens of the answer that the matcher has taken
    mask_s: float | None = None  # how long its last mask took to find; None: it has had none
    draft_limit: int = 2**31  # drafted tokens behind which masks would be found in time, going by that
    ends_by_grammar: bool = False  # an end token is where the grammar ends it, whatever else is asked
    grammar_failure: str = ""  # why no token can follow; empty: one can, as far as is known

    @classmethod
    def of(cls, spec: RequestSpec, choice: int, outputs: Iterable[int] = ()) -> Sequence:
        """Make a choice of a request, with the tokens of its answer that are known. It holds no blocks."""
        return cls(
            request_id=RequestId(spec.request_id),
            attempt=spec.attempt,
            choice=choice,
            token_ids=[*spec.prompt_token_ids(), *outputs],
            num_prompt_tokens=spec.num_prompt_tokens,
            sampling=spec.sampling,
            cache_salt=spec.cache_salt,
            adapter=spec.adapter,
            priority=spec.priority,
            arrival=spec.arrival,
            ends_by_grammar=spec.grammar is not None and spec.grammar.kind not in TOKEN_KINDS,
        )

    @property
    def adapter_slot(self) -> int:
        """Return where the engine has the sequence's adapter; NO_ADAPTER: nowhere."""
        slot = None if self.held_adapter is None else self.held_adapter.slot
        return NO_ADAPTER if slot is None else slot

    @property
    def awaits_adapter(self) -> bool:
        """Tell whether nothing of it may be computed yet, as its adapter is not here."""
        return self.held_adapter is not None and self.held_adapter.slot is None

    @property
    def may_begin(self) -> bool:
        """Tell whether its adapter, if it has one, is here and takes new sequences."""
        return self.held_adapter is None or self.held_adapter.is_open

    @property
    def can_sample(self) -> bool:
        """Tell whether the token after the last known one may be chosen: its grammar, if it has one, is ready."""
        return self.grammar is None or self.grammar.is_ready or not self.samples

    @property
    def num_computable_tokens(self) -> int:
        """Count the known tokens without KV that may be computed now.

        The last one's logits choose the next token. While its grammar is not ready a sequence waits as a whole: that
        takes less than a step more. If that is late, the others are computed.
        """
        if self.awaits_adapter:
            return 0
        if self.can_sample:
            return self.num_uncomputed_tokens
        assert self.grammar is not None
        return self.num_uncomputed_tokens - 1 if self.grammar.is_late else 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncached_tokens(self) -> int:
        """Count the known tokens that were not found in a cache, computed by now or not."""
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return list(self.token_ids[self.num_prompt_tokens :])

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def age_key(self) -> tuple[int, int, str, int]:
        """Return the key of a total order: the smallest is served first and preempted last."""
        return (self.priority, self.arrival, self.request_id, self.choice)


def finish_reason(
    sampling: SamplingParams,
    token_id: int,
    *,
    num_output_tokens: int,
    num_tokens: int,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    ends_by_grammar: bool = False,
) -> FinishReason | None:
    """Does the answer end with `token_id`, its latest token? Counts include that token.

    An answer that a grammar ends can have an end token only where nothing else may come (`SampleRow.allowed_words`), or
    where it may end: it does, whatever `min_tokens` and `ignore_eos` say.
    """
    if ends_by_grammar and token_id in eos_token_ids:
        return FinishReason.STOP
    is_end = (token_id in eos_token_ids and not sampling.ignore_eos) or token_id in sampling.stop_token_ids
    if is_end and num_output_tokens >= sampling.min_tokens:
        return FinishReason.STOP
    if num_output_tokens >= sampling.max_tokens or num_tokens >= max_model_len:
        return FinishReason.LENGTH
    return None
