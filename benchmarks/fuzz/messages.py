"""A sound message of every type that the wire carries, with something in every field."""

from __future__ import annotations

from typing import Any

import msgspec

from kvferry.common.grammar import Grammar, pack_mask
from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.common.request import Pooling, RequestSpec, SampledToken, SamplingParams, pack_ids
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
    token = SampledToken(5, -0.25, ((5, -0.25), (6, -1.5)), 1)
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
        LocalTask(spec=msgspec.structs.replace(spec, outputs=()), first_mask=pack_mask(b"\1" * 64)),
        PrefillTask(
            spec=spec,
            grant=grant,
            fetch=FetchFrom(worker_id="d-1", kv_address="127.0.0.1:2", num_tokens=32),
            first_mask=pack_mask(b"\1" * 64),
        ),
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
