"""A worker as its routers know it: who it is, how it is, what it caches, what role it has."""

from __future__ import annotations

from typing import Annotated

import msgspec

from ..common.kv_spec import KVCacheSpec
from .fields import U64, Count, Counts, Digests, Hashes, Labels, Logprobs, Message, Name


class StepSample(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One engine step and what it did: what step-time models are fitted to (router/state/predictor.py)."""

    step_s: float
    prefill_tokens: Count = 0  # prompt tokens computed, of all rows with more than one
    prefill_pairs: Count = (
        0  # sum over rows with several tokens: tokens x (context before the chunk + half of the chunk)
    )
    decode_rows: Count = 0  # rows that feed one token
    decode_context: Count = 0  # tokens that these attend to, summed over the rows


Samples = Annotated[tuple[StepSample, ...], msgspec.Meta(max_length=64)]


class ExpertCounts(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`ExpertCounts` tells how often the experts of a sparse layer were chosen since the worker's start."""

    layer: Count
    taken: Annotated[tuple[Count, ...], msgspec.Meta(max_length=4096)]  # by the expert's number
    # Of each rank's experts, where ranks have whole ones; what several hold is shared evenly.
    of_ranks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=256)] = ()


ExpertLoads = Annotated[tuple[ExpertCounts, ...], msgspec.Meta(max_length=512)]

MAX_EXPERT_COUNTS = 2**16  # of one message; a worker with more tells none. A count takes up to nine bytes of a frame


class WorkerHello(Message):
    """First message of a worker's session with a router."""

    worker_id: Name
    role: Name  # "prefill" | "decode"
    incarnation: U64
    version: Name
    model: Name  # the served model's name
    spec: KVCacheSpec
    tp_size: Count
    num_blocks: Count
    max_model_len: Count
    max_num_seqs: Count
    max_num_batched_tokens: Count
    kv_address: Name  # host:port of the handoff's control socket (decode workers; "" if none)
    pid: Count
    transport: Name
    can_change_role: bool = False  # SetRole is obeyed; `kv_address` is set whatever the role
    labels: Labels = ()  # where it is, from wide to narrow: ("zone", ...), ("rack", ...), ("host", ...)
    samples: Samples = ()  # of the self-calibration at start-up
    quantization: Name = ""  # of its weights: plain, int8, ...
    probe: Logprobs = ()  # what it thinks of fixed tokens, where workers of other weights take part


class WorkerStatus(Message):
    """Heartbeat, ten times a second while there is work, once a second when idle."""

    seq: Count
    state: Name  # "starting" | "ready" | "draining"
    num_running: Count
    num_waiting: Count
    waiting_tokens: Count  # prompt tokens not computed yet
    num_free_blocks: Count
    num_cached_blocks: Count
    num_granted_blocks: Count
    num_quarantined_blocks: Count
    num_blocks: Count
    steps: Count  # finished engine steps since start: stands still while work waits = hung
    busy_for_s: float  # how long the running step has taken so far; 0 when idle
    step_s: float = 0.0  # of the last step
    step_tokens: Count = 0
    num_preemptions: Count = 0
    num_swapped_blocks: Count = 0  # copied to host memory since start
    prefix_queries: Count = 0  # tokens looked up, since start
    prefix_hits: Count = 0  # tokens found
    transfer_bytes: Count = 0  # written (prefill) since start, by our own count
    wire_bytes: Count = 0  # written since start by the transport's count; 0 where it has none
    transfer_failures: Count = 0
    stale_messages: Count = 0  # messages about ended grants, opens or attempts, dropped
    num_fences: Count = 0  # times that this worker replaced its transfer agents, to be sure that nobody writes
    num_failed_fences: Count = 0  # tries of that which failed: an interface was down
    quarantine_s: float = 0.0  # age of the oldest quarantined block
    checksum_failures: Count = 0  # arrivals whose bytes were not those that were sent
    grant_rejects: Counts = ()  # KVOpens refused since start, by reason
    role: Name = ""  # the active one; "": the hello's. What was started in another one ends where it is
    decode_context: Count = 0  # tokens of all running sequences
    samples: Samples = ()  # steps since the last heartbeat to this router; where there were more, an even choice
    host_blocks: Count = 0  # cached in host memory
    disk_blocks: Count = 0  # cached on disk
    promoted_blocks: Count = 0  # copied from host memory to the device for a hit, since start
    demoted_blocks: Count = 0  # copied from the device to host memory before they were evicted, since start
    tier_failures: Count = 0  # reads and writes of the disk cache that failed, were spoilt or took too long
    share: float = 1.0  # of its credit and its free blocks that is this router's, beside what it holds
    num_fetches: Count = 0  # of prefixes from other workers, begun since start
    failed_fetches: Count = 0  # fetches that did not bring all that was asked for: the rest was computed
    fetched_bytes: Count = 0  # of blocks that were used
    fetch_s: float = 0.0  # how long these fetches took, from the first question to the last block
    nonfinite_rows: Count = 0  # of steps, whose logits were no distribution: their requests ended
    draft_tokens: Count = 0  # proposed and fed since start
    accepted_tokens: Count = 0  # proposed tokens that were the ones drawn
    adapters: Digests = ()  # in the engine's slots
    loading_adapters: Count = 0  # into slots, by loads that are not late
    draft_prompt_tokens: Count = 0  # computed by a draft model while this worker decodes: they came without its KV
    experts: ExpertLoads = ()  # in a heartbeat every few seconds, where choices were made since the last one


class Goodbye(Message):
    """Last message of a worker that ends by itself, whatever it still has. Who ends without it was lost."""


class LiveRequests(Message):
    """First message of a re-opened session: every other request of this router is aborted."""

    attempts: Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(max_length=65536)]  # (request id, attempt)


class SetRole(Message):
    """Make this role the active one. Work of the other kind is refused at once; what was started ends where it is."""

    role: Name  # "prefill" | "decode"


class Drain(Message):
    """No new work; end what was started, then exit."""

    deadline_s: float


class CacheChange(Message):
    """Blocks that other requests may find on this worker, by chained hash; published ones before evicted ones."""

    seq: Count  # from 0 in each session, without a gap; the first one carries all that is stored
    stored: Hashes = b""
    evicted: Hashes = b""
    tier: Name = "device"  # "device", "host" or "disk"


class TransferReport(Message):
    """A prefill worker's account of a shipment that ended: what crossed, and what of it came after the last layer."""

    request_id: Name
    attempt: Count
    decode_worker: Name
    num_bytes: Count
    num_blocks: Count
    transfer_s: float  # first post to last handle done
    exposed_s: float  # last layer computed to last handle done
    clean: bool
