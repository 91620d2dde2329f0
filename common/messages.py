"""Every message that crosses a process border, typed and bounded. MessagePack by msgspec; no pickle anywhere.

    router <-> worker          WorkerHello, WorkerStatus, ReserveKV ... StepTokens
    prefill <-> decode         KVOpen, KVRenew, KVClosed; answers KVOpened ... KVDone
    prefill -> decode          KVArrived: a notification of the transfer agent, with the data

Durations only, never points in time. A message is about one (request, attempt), one grant or one open; the
receiver drops what names another. The life of a handoff is told in `transfer/send/sender.py` and `receiver.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Generic, TypeVar

import msgspec

from .adapter import MAX_ADAPTERS
from .errors import ProtocolError
from .kv_spec import KVCacheSpec, Shard
from .request import MAX_CHOICES, Pooling, RequestSpec, SampledToken, Sequence

# Goes up when a message changes: processes of different versions refuse one another, naming both. Version 4 says whom
# a request is for (`RequestSpec.model`, `.adapter`, `.grammar`), names ranks' shards (`RegionInfo.shard`) and has room
# for a draft's state (`KVArrived.draft`). What a worker cannot serve of them, it refuses with a reason. Version 5 has
# prompts embedded (`EmbedTask`, `Embedding`). Version 6 tells how weights are quantized
# (`WorkerHello.quantization`). Version 7 says where an adapter's bytes are (`RequestSpec.adapter_path`) and which
# adapters a worker has (`WorkerStatus.adapters`).
PROTOCOL_VERSION = 7

Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Nonce = Annotated[bytes, msgspec.Meta(max_length=64)]
Choice = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHOICES)]
Choices = Annotated[tuple[Choice, ...], msgspec.Meta(max_length=MAX_CHOICES)]
# No length of a list is left open: a frame of a few bytes for each element would become many times its size.
Tokens = Annotated[tuple[SampledToken, ...], msgspec.Meta(max_length=4096)]
Counts = Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(max_length=64)]
Checksums = Annotated[bytes, msgspec.Meta(max_length=2**22)]
DraftState = Annotated[bytes, msgspec.Meta(max_length=2**16)]  # a hidden state or two
Vector = Annotated[bytes, msgspec.Meta(min_length=4, max_length=2**18)]  # float32, little endian
BlockIds = Annotated[tuple[Count, ...], msgspec.Meta(max_length=2**19)]
Labels = Annotated[tuple[tuple[Name, Name], ...], msgspec.Meta(max_length=64)]
Hashes = Annotated[bytes, msgspec.Meta(max_length=2**22)]  # 16 bytes each
Digests = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_ADAPTERS)]
Logprobs = Annotated[tuple[float, ...], msgspec.Meta(max_length=64)]
U64 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # random or an address; msgspec bounds are signed


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Base of the wire messages; the type's name is the tag."""


# --- hello: both sides prove that they know the shared secret before anything else is decoded -----------


class Challenge(Message):
    """Accepting side, first frame of a connection."""

    protocol: int
    nonce: Nonce


class Hello(Message):
    """Connecting side. `mac` = HMAC-SHA256(secret, "hello" + the challenge's nonce + this nonce + id).

    Empty without a secret.
    """

    protocol: int
    id: Name  # worker id, or a router's id
    nonce: Nonce
    mac: Nonce


class Welcome(Message):
    """Accepting side: `mac` = HMAC-SHA256(secret, "welcome" + the hello's nonce + the challenge's nonce + id)."""

    id: Name
    mac: Nonce


class Refused(Message):
    """Accepting side: no. The text says both values that do not fit."""

    reason: Text


# --- worker -> router: who I am, how I am -----------------------------------------------------------------


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
    draft_prompt_tokens: Count = 0  # computed by a draft model while this worker decodes: they came without its KV


class Goodbye(Message):
    """Last message of a worker that ends by itself, whatever it still has. Who ends without it was lost."""


# --- router -> worker -------------------------------------------------------------------------------------


class RegionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One rank's registered KV allocation, as another process must know it to write into it."""

    rank: Count
    tp_size: Count
    agent: Name  # worker_id.incarnation.generation.rank: never reused
    generation: Count
    agent_metadata: Annotated[bytes, msgspec.Meta(max_length=65536)]
    base_addr: U64
    num_blocks: Count
    page_bytes: Count
    device: Name  # "DRAM" | "VRAM"
    device_id: Count
    transport: Name  # backend's name: both sides use the same
    shard: Shard | None = None  # what of the model it holds; None: the heads' even share of `rank`, in all layers


Regions = Annotated[tuple[RegionInfo, ...], msgspec.Meta(max_length=1024)]


class ProcessMark(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A process and its host: enough for another one there to be sure of it, and to see it end."""

    host: Name  # boot, network and process namespace; "" where processes cannot be told apart
    pid: Count
    started: Count  # clock ticks since boot: a number is given to another process later


ProcessMarks = Annotated[tuple[ProcessMark, ...], msgspec.Meta(max_length=1024)]


class GrantId(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    worker_id: Name
    incarnation: U64
    epoch: Count  # from 1, never reused within an incarnation


class GrantInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The decode worker's promise of blocks. It lets a prefill worker *ask* (KVOpen); only the open lets it write."""

    grant_id: GrantId
    spec: KVCacheSpec
    kv_address: Name
    block_ids: BlockIds  # destinations, in token order from num_computed_tokens on; rank-independent
    num_tokens: Count  # prompt tokens that the decode worker will have when all has arrived
    num_computed_tokens: Count  # whole blocks that it holds already: not to be shipped
    ranks: Regions
    open_within_s: float
    mac: Nonce  # minted by the decode worker, checked at KVOpen


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


class PrefillTask(Message):
    """Has a prefill worker compute the prompt, ship it under the grant and sample the first tokens."""

    spec: RequestSpec
    grant: GrantInfo
    sample: bool = True  # False when resuming: ship the prompt's KV alone
    fetch: FetchFrom | None = None
    retains_prefix: bool = True  # False: the decode worker caches the prompt's KV, a copy here is evicted first


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


class LiveRequests(Message):
    """First message of a re-opened session: every other request of this router is aborted."""

    attempts: Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(max_length=65536)]  # (request id, attempt)


class SetRole(Message):
    """Make this role the active one. Work of the other kind is refused at once; what was started ends where it is."""

    role: Name  # "prefill" | "decode"


class Drain(Message):
    """No new work; end what was started, then exit."""

    deadline_s: float


# --- worker -> router -------------------------------------------------------------------------------------


class Grant(Message):
    request_id: Name
    attempt: Count
    grant: GrantInfo


class NoCapacity(Message):
    """`reason`: blocks, growth, never_fits, draining, stale, expired, held, wrong_role, no_agent (nobody can write here
    now), or one of request.UNSERVED."""

    request_id: Name
    attempt: Count
    reason: Name
    num_free_blocks: Count = 0
    num_cached_tokens: Count = 0
    retry_after_s: float = 0.05
    detail: Text = ""


class TaskRefused(Message):
    """A task was not begun. `reason`: blocks, never_fits, draining, incompatible, stale, expired, wrong_role, or one of
    request.UNSERVED."""

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
    """`blame`: peer, link, self, fenced, expired, checksum, abort, ended, unknown. `worker_id`: the peer that failed.

    fenced: of a healthy peer, whose handoff ended because the agent that it wrote to was replaced.
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


# --- prefill <-> decode, control socket ---------------------------------------------------------------------


class KVOpen(Message):
    grant_id: GrantId
    open_id: U64
    mac: Nonce  # handoff.open_mac: of the grant as it reached the prefill worker, and of whose prompt is shipped
    worker_id: Name
    incarnation: U64
    spec: KVCacheSpec
    version: Name
    transport: Name
    tp_size: Count  # source ranks 0 .. tp_size - 1
    processes: ProcessMarks = ()  # of each source rank; none: their ends cannot be seen from elsewhere
    has_checksums: bool = False  # KVArrived will carry them


class KVOpened(Message):
    grant_id: GrantId
    open_id: U64
    lease_s: float
    generation: Count
    ranks: Regions = ()  # to be written to instead of the grant's, whose agents are gone; else empty


class KVRefused(Message):
    """`reason`: one of handoff.REJECTS, or what does not fit, in words."""

    grant_id: GrantId
    open_id: U64
    reason: Text


class KVRenew(Message):
    opens: Annotated[tuple[tuple[GrantId, U64], ...], msgspec.Meta(max_length=16384)]


class KVRenewed(Message):
    """Answers KVRenew: for each open its lease in seconds, or 0 where it is gone."""

    opens: Annotated[tuple[tuple[GrantId, U64, float], ...], msgspec.Meta(max_length=16384)]


class KVClosed(Message):
    grant_id: GrantId
    open_id: U64
    source_rank: Count
    clean: bool  # False: what was posted may still land
    reason: Text = ""
    detached: bool = False  # the agent that posted is destroyed: only a network may still carry some of it


class CancelKV(Message):
    grant_id: GrantId
    open_id: U64


class KVDone(Message):
    grant_id: GrantId
    open_id: U64


# --- fetcher <-> the worker that holds a prefix, control socket: told in transfer/fetch/ ----------------------------


class KVFetch(Message):
    """May I read these blocks? Whoever knows a block's hash has, or had, its tokens and its tenant's salt."""

    fetch_id: U64  # random, new for each question
    hashes: Hashes  # of neighbouring blocks of one prompt, in token order
    spec: KVCacheSpec
    version: Name
    transport: Name
    tp_size: Count  # equal on both sides: each rank reads from the one that has its heads
    wants_checksums: bool = False


class KVFetchable(Message):
    """Lent blocks, which stay what they are for `lease_s` from the receipt of the question on; longer for nobody."""

    fetch_id: U64
    lease_s: float
    block_ids: BlockIds  # of the leading ones of those that were asked for
    ranks: Regions
    has_checksums: bool = False  # a KVFetchSums from each rank follows


class KVFetchSums(Message):
    """Checksums of one rank's pages of the lent blocks."""

    fetch_id: U64
    rank: Count
    checksum: Checksums  # 8 bytes for each block


class KVFetchRefused(Message):
    """`reason`: gone, full, draining, checksum, or what does not fit, in words."""

    fetch_id: U64
    reason: Text


class KVFetchDone(Message):
    """Ends the lease: what is read from the blocks from now on will not be used."""

    fetch_id: U64


class KVArrived(Message):
    """Notification of the transfer agent, one from each source rank to each decode rank that it writes to."""

    grant_id: GrantId
    open_id: U64
    source_rank: Count
    num_tokens: Count
    first_tokens: ChoiceList = ()  # from source rank 0
    num_cached_tokens: Count = 0  # of the prompt: that it had not to compute
    tp_size: Count = 1  # of the source
    block_ids: BlockIds = ()  # that were written, where there are checksums
    checksum: Checksums = b""  # 8 bytes for each of them (transfer/protocol/checksums.py); empty: none
    draft: DraftState = b""  # what a draft of the decode worker goes on from; empty: nothing


RouterToWorker = Refused | ReserveKV | LocalTask | PrefillTask | EmbedTask | Abort | LiveRequests | SetRole | Drain
# About one request of the router's.
RequestMessage = (
    Grant
    | NoCapacity
    | TaskRefused
    | HandoffDone
    | HandoffFailed
    | FirstToken
    | Embedding
    | PromptLogprobs
    | WorkerFailure
)
WorkerToRouter = WorkerHello | WorkerStatus | CacheChange | RequestMessage | StepTokens | TransferReport | Goodbye
PrefillToDecode = KVOpen | KVRenew | KVClosed
DecodeToPrefill = KVOpened | KVRefused | KVRenewed | CancelKV | KVDone
FetcherToLender = KVFetch | KVFetchDone
LenderToFetcher = KVFetchable | KVFetchSums | KVFetchRefused

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


T = TypeVar("T", bound=Message)


class Decoder(Generic[T]):
    """Decodes frames into one closed union of messages; anything else is a ProtocolError."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes) -> T:
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"frame of {len(frame)} bytes refused: {error}") from error
