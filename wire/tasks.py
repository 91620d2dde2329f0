"""A router asks workers by these for one request's blocks, prompt and tokens."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..common.grammar import MAX_MASK_BYTES, unpack_mask
from ..common.request import Pooling, RequestSpec
from .fields import Choices, Count, Message, Name
from .first_mask import FirstMask
from .grants import GrantInfo

PackedMask = Annotated[bytes, msgspec.Meta(max_length=MAX_MASK_BYTES)]


class ReserveKV(Message):
    """Asks a decode worker for room for this request's prompt (and its choices' first block)."""

    spec: RequestSpec
    max_local_tokens: Count = 0  # at most so many uncached tokens: answer NoCapacity("held") and run it locally
    queue_if_full: bool = False  # wait for blocks, for two seconds at most, rather than be refused at once
    retains_prefix: bool = True  # False: the prefill worker caches the prompt's KV, a copy here is evicted first


class FetchFrom(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A worker that is said to hold leading blocks of a prompt: reading them there beats computing them."""

    worker_id: Name
    kv_address: Name
    num_tokens: Count  # from the prompt's start on
    within_s: float = 1.0  # what is not here by then is computed


class LocalTask(Message):
    """Has a decode worker compute the prompt itself. Replaces a reservation of the same request."""

    spec: RequestSpec
    fetch: FetchFrom | None = None
    tokens_behind: Count | None = None  # of prompts that wait in the queue for it; None: they wait for prefill workers
    first_mask: PackedMask = b""  # of the tokens to sample (`common.grammar.pack_mask`); empty: the worker finds it

    def __post_init__(self) -> None:
        """Check what the types cannot say. From the wire, a ValueError here is a refused frame."""
        _check_first_mask(self.first_mask, samples=self.spec.grammar is not None and not self.spec.is_resume)

    def first_grammar(self) -> FirstMask | None:
        """Return what the first tokens follow; None: no grammar, or the request's own."""
        return _first_grammar(self.first_mask)


class PrefillTask(Message):
    """Has a prefill worker compute the prompt, ship it under the grant and sample the first tokens."""

    spec: RequestSpec
    grant: GrantInfo
    sample: bool = True  # False when resuming: ship the prompt's KV alone
    fetch: FetchFrom | None = None
    retains_prefix: bool = True  # False: the decode worker caches the prompt's KV, a copy here is evicted first
    first_mask: PackedMask = b""  # of the tokens to sample (`common.grammar.pack_mask`); empty: there is no grammar

    def __post_init__(self) -> None:
        """Check what the types cannot say. From the wire, a ValueError here is a refused frame."""
        samples = self.sample and self.spec.grammar is not None
        if samples and not self.first_mask:
            raise ValueError("first tokens are sampled by a grammar, and their mask is missing")
        _check_first_mask(self.first_mask, samples=samples)

    def first_grammar(self) -> FirstMask | None:
        """Return what the first tokens follow; None: no grammar."""
        return _first_grammar(self.first_mask)


def _check_first_mask(packed: bytes, *, samples: bool) -> None:
    """Raise ValueError for a mask where no first token is sampled by a grammar, and for bytes that are no mask."""
    if packed and not samples:
        raise ValueError("a mask of first tokens comes, and none is sampled by a grammar")
    if packed:
        unpack_mask(packed)


def _first_grammar(packed: bytes) -> FirstMask | None:
    return FirstMask(unpack_mask(packed)) if packed else None


class EmbedTask(Message):
    """Has a worker of either role compute the prompt for its embedding alone: no KV leaves, no token is sampled."""

    spec: RequestSpec
    pooling: Pooling
    fetch: FetchFrom | None = None


class Abort(Message):
    """Ends a request on both workers. Idempotent; a decode worker that had a handoff answers HandoffDone or -Failed."""

    request_id: Name
    attempt: Count
    unless_arrived: bool = False  # decode: keep the request if its KV has arrived
    choices: Choices = ()  # empty: the whole request; else only these choices end (a stop string was found)
