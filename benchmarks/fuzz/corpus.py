"""What is thrown at the wire: a sound message of every type, mutations of their frames, and frames made to hurt.

Everything comes from a `random.Random`: a seed gives the same frames again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvferry.common.grammar import Grammar
from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.common.request import Pooling, RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.wire.codec import (
    Decoder,
    DecodeToPrefill,
    FetcherToLender,
    LenderToFetcher,
    PrefillToDecode,
    RouterToWorker,
    WorkerToRouter,
    encode,
)
from kvferry.wire.fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchRefused, KVFetchSums
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo, ProcessMark, RegionInfo
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.hello import PROTOCOL_VERSION, Challenge, Hello, Refused, Welcome
from kvferry.wire.results import (
    ChoiceTokens,
    Embedding,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    PromptLogprobs,
    RequestTokens,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from kvferry.wire.tasks import Abort, EmbedTask, FetchFrom, LocalTask, PrefillTask, ReserveKV
from kvferry.wire.workers import (
    CacheChange,
    Drain,
    ExpertCounts,
    Goodbye,
    LiveRequests,
    SetRole,
    StepSample,
    TransferReport,
    WorkerHello,
    WorkerStatus,
)

SPEC = KVCacheSpec(
    model="fuzz", draft="small", num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32"
)
DECODERS: tuple[Decoder[Message], ...] = (
    Decoder(WorkerToRouter),
    Decoder(RouterToWorker),
    Decoder(PrefillToDecode),
    Decoder(DecodeToPrefill),
    Decoder(FetcherToLender),
    Decoder(LenderToFetcher),
    Decoder(Challenge | Hello | Welcome | Refused),
    Decoder(KVArrived),
)
_MAX_CUTS = 4
_ODD_NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, -0.0)


def hello(worker_id: str = "d-0", role: str = "decode") -> WorkerHello:
    return WorkerHello(
        worker_id=worker_id,
        role=role,
        incarnation=2**62 + 1,
        version="0",
        model="fuzz",
        spec=SPEC,
        tp_size=1,
        num_blocks=1 << 16,
        max_model_len=1 << 17,
        max_num_seqs=1 << 14,
        max_num_batched_tokens=1 << 14,
        kv_address="127.0.0.1:1",
        pid=1,
        transport="nixl",
        quantization="int4",
        probe=(-1.5, -2.5),
    )


def status(**fields: int | float | str) -> WorkerStatus:
    known: dict[str, Any] = {
        "seq": 1,
        "state": "ready",
        "num_running": 0,
        "num_waiting": 0,
        "waiting_tokens": 0,
        "num_free_blocks": 1 << 16,
        "num_cached_blocks": 0,
        "num_granted_blocks": 0,
        "num_quarantined_blocks": 0,
        "num_blocks": 1 << 16,
        "steps": 1,
        "busy_for_s": 0.0,
    }
    return WorkerStatus(**(known | fields))


def valid_messages() -> list[Message]:
    """One of every type, with something in every field."""
    token = SampledToken(5, -0.25, ((5, -0.25), (6, -1.5)))
    choices = (ChoiceTokens(0, 0, (token,)), ChoiceTokens(1, 3, (token, token), "length"))
    sampling = SamplingParams(temperature=0.5, logit_bias={7: -1.0}, stop_token_ids=(2,), logprobs=2, prompt_logprobs=1)
    spec = RequestSpec(
        request_id="r-1",
        attempt=1,
        prompt=pack_ids([1, 2, 3]),
        sampling=sampling,
        choices=(0, 1),
        outputs=(pack_ids([4]), b""),
        cache_salt=b"salt",
        remaining_s=3.5,
        model="fuzz",
        adapter="0123abcd" * 4,
        adapter_path="/adapters/a",
        grammar=Grammar("json_schema", b'{"type": "object"}'),
    )
    grant_id = GrantId("d-0", 7, 1)
    region = RegionInfo(
        rank=0,
        tp_size=1,
        agent="d-0.7.1.0",
        generation=1,
        agent_metadata=b"metadata",
        base_addr=1 << 40,
        num_blocks=64,
        page_bytes=4096,
        device="DRAM",
        device_id=0,
        transport="nixl",
        shard=Shard(0, 2, 0, 2),
    )
    grant = GrantInfo(
        grant_id=grant_id,
        spec=SPEC,
        kv_address="127.0.0.1:1",
        block_ids=(1, 2, 3),
        num_tokens=40,
        num_computed_tokens=16,
        ranks=(region,),
        open_within_s=2.0,
        mac=b"m" * 32,
    )
    about: dict[str, Any] = {"request_id": "r-1", "attempt": 1}
    opened: dict[str, Any] = {"grant_id": grant_id, "open_id": 99}
    return [
        Challenge(protocol=PROTOCOL_VERSION, nonce=b"n" * 16),
        Hello(protocol=PROTOCOL_VERSION, id="d-0", nonce=b"n" * 16, mac=b"m" * 32),
        Welcome(id="router", mac=b"m" * 32),
        Refused(reason="no"),
        hello(),
        msgspec.structs.replace(
            status(),
            grant_rejects=(("stale", 1),),
            experts=(ExpertCounts(1, (3, 0), (2, 1)),),
            role="decode",
            samples=(StepSample(0.1, 16, 128, 2, 40),),
        ),
        CacheChange(seq=1, stored=b"h" * 32, evicted=b"e" * 16, tier="host"),
        ReserveKV(spec=spec, max_local_tokens=8),
        LocalTask(spec=spec),
        PrefillTask(spec=spec, grant=grant, fetch=FetchFrom(worker_id="d-1", kv_address="127.0.0.1:2", num_tokens=32)),
        EmbedTask(spec=spec, pooling=Pooling.MEAN),
        Abort(**about, unless_arrived=True, choices=(0, 2)),
        LiveRequests(attempts=(("r-1", 1),)),
        SetRole(role="prefill"),
        Drain(deadline_s=3.0),
        Grant(**about, grant=grant),
        NoCapacity(**about, reason="model", detail="'a' is asked for"),
        TaskRefused(**about, reason="blocks", detail="none left"),
        HandoffDone(**about, num_bytes=4096),
        HandoffFailed(**about, reason="lost", blame="peer", worker_id="p-0"),
        FirstToken(**about, choices=choices, num_cached_tokens=16, prefill_s=0.1, queue_s=0.0),
        Embedding(**about, vector=b"v" * 64, num_cached_tokens=16, prefill_s=0.1, queue_s=0.0),
        PromptLogprobs(**about, start=1, tokens=(token, token)),
        StepTokens(updates=(RequestTokens("r-1", 1, choices, 16),)),
        TransferReport(
            **about, decode_worker="d-0", num_bytes=1, num_blocks=1, transfer_s=0.1, exposed_s=0.1, clean=True
        ),
        WorkerFailure(**about, reason="out of memory"),
        Goodbye(),
        KVOpen(
            **opened,
            mac=b"m",
            worker_id="p-0",
            incarnation=1,
            spec=SPEC,
            version="0",
            transport="nixl",
            tp_size=1,
            processes=(ProcessMark("host", 1, 2),),
        ),
        KVOpened(**opened, lease_s=3.0, generation=1, ranks=(region,)),
        KVRefused(**opened, reason="gone"),
        KVRenew(opens=((grant_id, 99),)),
        KVRenewed(opens=((grant_id, 99, 3.0),)),
        KVClosed(**opened, source_rank=0, clean=False, reason="lost"),
        CancelKV(**opened),
        KVDone(**opened),
        KVFetch(fetch_id=5, hashes=b"h" * 32, spec=SPEC, version="0", transport="nixl", tp_size=1),
        KVFetchable(fetch_id=5, lease_s=1.0, block_ids=(1, 2), ranks=(region,), has_checksums=True),
        KVFetchSums(fetch_id=5, rank=0, checksum=b"c" * 16),
        KVFetchRefused(fetch_id=5, reason="gone"),
        KVFetchDone(fetch_id=5),
        KVArrived(
            **opened,
            source_rank=0,
            num_tokens=40,
            first_tokens=choices,
            block_ids=(1, 2, 3),
            checksum=b"c" * 24,
            draft=b"d" * 64,
        ),
    ]


def attack_frames() -> dict[str, bytes]:
    """Frames that are small and ask for much, or that parsers are known to stumble over."""
    step = encode(StepTokens(updates=()))
    spec = msgspec.msgpack.encode({"type": "StepTokens", "updates": [["r", 1, [[0, 0, [[1]] * 300_000]], 0]]})
    abort = encode(Abort(request_id="r", attempt=0))
    return {
        "nothing": b"",
        "never used": b"\xc1",
        "trailing bytes": abort + b"\x00",
        "two messages": abort + abort,
        "empty maps": msgspec.msgpack.encode([{}] * 300_000),
        "empty maps in a message": b"\x82\xa4type\xaaStepTokens\xa7updates\xdd\x00\x04\x93\xe0" + b"\x80" * 300_000,
        "tokens without end": spec,
        "deep arrays": b"\x91" * 100_000,
        "deep maps": b"\x81\xa1a" * 100_000,
        "deep in a field": b"\x82\xa4type\xaaStepTokens\xa7updates" + b"\x91" * 100_000,
        "array of 2^32-1": b"\xdd\xff\xff\xff\xff",
        "map of 2^32-1": b"\xdf\xff\xff\xff\xff",
        "text of 2^32-1": b"\xdb\xff\xff\xff\xff",
        "bytes of 2^32-1": b"\xc6\xff\xff\xff\xff",
        "updates of 2^32-1": b"\x82\xa4type\xaaStepTokens\xa7updates\xdd\xff\xff\xff\xff",
        "extension": b"\xc7\x04\x05abcd",
        "timestamp": b"\xd6\xff\x00\x00\x00\x00",
        "extension in a field": b"\x82\xa4type\xaaStepTokens\xa7updates\xc7\x04\x05abcd",
        "no type": msgspec.msgpack.encode({"updates": []}),
        "another type": msgspec.msgpack.encode({"type": "os.system", "updates": []}),
        "the type a number": msgspec.msgpack.encode({"type": 7, "updates": []}),
        "a field more": b"\x83" + step[1:] + b"\xa4more\x01",
        "not UTF-8": b"\x83\xa4type\xa5Abort\xaarequest_id\xa2\xff\xfe\xa7attempt\x00",
        "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "http": b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        "a name too long": msgspec.msgpack.encode({"type": "Abort", "request_id": "r" * 100_000, "attempt": 0}),
        "a number too large": msgspec.msgpack.encode({"type": "Abort", "request_id": "r", "attempt": 2**63}),
        "not a number": msgspec.msgpack.encode({"type": "Abort", "request_id": "r", "attempt": float("nan")}),
    }


class FrameSource:
    """Frames without end: mutated ones mostly, then random values, random bytes and the attacks."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._messages = valid_messages()
        self._frames = [encode(message) for message in self._messages]
        self._attacks = [frame for frame in attack_frames().values() if len(frame) < 4096]
        self._ways: list[Callable[[], bytes]] = [self._bent] * 5 + [self._changed] * 4 + [self._made, self._noise]

    def __iter__(self) -> Iterator[bytes]:
        while True:
            yield self._random.choice(self._ways)()

    def _bent(self) -> bytes:
        """A sound frame with some bytes changed, cut out, doubled or put in."""
        frame = bytearray(self._random.choice(self._frames))
        for _ in range(self._random.randint(1, _MAX_CUTS)):
            at = self._random.randrange(len(frame) + 1)
            match self._random.randrange(4):
                case 0 if at < len(frame):
                    frame[at] = self._random.randrange(256)
                case 1:
                    del frame[at : at + self._random.randint(1, 8)]
                case 2:
                    frame[at:at] = frame[at : at + self._random.randint(1, 16)]
                case _:
                    frame[at:at] = self._random.randbytes(self._random.randint(1, 4))
        return bytes(frame)

    def _changed(self) -> bytes:
        """A sound frame in which some values are others: msgpack that is in order, and a message that is not."""
        value = msgspec.msgpack.decode(self._random.choice(self._frames))
        for _ in range(self._random.randint(1, 2)):
            parent, key = self._place(value)
            parent[key] = self._value(0)
        return msgspec.msgpack.encode(value)

    def plausible(self, message: Message) -> bytes:
        """The message with other values of the same kinds: mostly one that decodes, and says what nobody would say."""
        value = msgspec.msgpack.decode(encode(message))
        for _ in range(self._random.randint(1, 3)):
            parent, key = self._place(value)
            if key != "type":
                parent[key] = self._like(parent[key])
        return msgspec.msgpack.encode(value)

    def _like(self, value: object) -> object:
        match value:
            case bool():
                return not value
            case int():
                return self._random.choice((0, 1, 7, 2**20, 2**53, self._random.randrange(2**16)))
            case float():
                return self._random.choice((0.0, -1.0, 1e300, float("nan"), float("inf"), self._random.random()))
            case str():
                return self._random.choice(("", "prefill", "decode", "ready", "x" * 256, "\x1b[31m\r\n", "d-0", "r-1"))
            case bytes():
                return self._random.randbytes(self._random.randrange(16) * 4)
            case list():
                return value * self._random.randint(0, 5)
        return value

    def _place(self, value: Any) -> tuple[Any, Any]:
        while True:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            key = self._random.choice(keys)
            child = value[key]
            if not isinstance(child, (dict, list)) or not child or self._random.random() < 0.3:
                return value, key
            value = child

    def _made(self) -> bytes:
        return msgspec.msgpack.encode(self._value(0))

    def _noise(self) -> bytes:
        if self._random.random() < 0.2:
            return self._random.choice(self._attacks)
        return self._random.randbytes(self._random.randint(0, 64))

    def _value(self, depth: int) -> object:
        kinds: Sequence[Callable[[], object]] = (
            lambda: None,
            lambda: self._random.random() < 0.5,
            lambda: self._random.choice(_ODD_NUMBERS),
            lambda: self._random.randint(-(2**40), 2**40),
            lambda: self._random.choice((float("nan"), float("inf"), 1.5)),
            lambda: self._random.choice(("", "decode", "r-1", "x" * 300, "\x00\x1b[31m\r\n", "é\U0001f600")),
            lambda: self._random.randbytes(self._random.randint(0, 70)),
            lambda: [self._value(depth + 1) for _ in range(self._random.randint(0, 4))],
            lambda: {f"k{number}": self._value(depth + 1) for number in range(self._random.randint(0, 3))},
        )
        return self._random.choice(kinds[:7] if depth > 3 else kinds)()
