"""What is not one of our messages is refused before it becomes an object."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.errors import ProtocolError
from kvferry.common.grammar import Grammar
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids, unpack_ids
from kvferry.tests.decode.bench import REGION
from kvferry.wire.codec import Decoder, DecodeToPrefill, encode
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVClosed, KVOpen, KVOpened, KVRenew
from kvferry.wire.tasks import Abort, ReserveKV

decoder: Decoder[ReserveKV | Abort] = Decoder(ReserveKV | Abort)


def test_a_request_crosses_with_every_field() -> None:
    spec = RequestSpec(
        request_id="r",
        attempt=2,
        prompt=pack_ids([1, 2, 70000]),
        sampling=SamplingParams(temperature=0.5, logit_bias={3: -1.0}, stop_token_ids=(4,), seed=9, logprobs=2),
        choices=(0, 2),
        outputs=(pack_ids([5]), pack_ids([])),
        cache_salt=b"t",
        model="served",
        adapter="00ff",
        grammar=Grammar("regex", b"a*"),
    )
    crossed = decoder.decode(encode(ReserveKV(spec=spec)))
    assert isinstance(crossed, ReserveKV) and crossed.spec == spec
    assert crossed.spec.prompt_token_ids() == [1, 2, 70000]
    assert crossed.spec.is_resume and crossed.spec.output_token_ids(0) == [5]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x81",
        msgspec.msgpack.encode({"type": "Abort"}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": "r", "attempt": -1}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": "r", "attempt": 0, "more": 1}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": "r" * 300, "attempt": 0}),
        msgspec.msgpack.encode({"type": "KVOpen"}),
        msgspec.msgpack.encode([{}] * 100_000),
        b"\x91" * 100_000,
        encode(Abort(request_id="r", attempt=0)) + b"\x00",
    ],
)
def test_hostile_frames_are_protocol_errors(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decoder.decode(frame)


@pytest.mark.parametrize("device", ["DRAM", "VRAM", "HBM", ""])
def test_a_regions_memory_is_of_a_kind_that_transports_know(device: str) -> None:
    """NIXL raises a KeyError for any other, which would end the worker that was told of it."""
    region = msgspec.structs.replace(REGION, device=device)
    opened = encode(KVOpened(grant_id=GrantId("d", 1, 1), open_id=1, lease_s=1.0, generation=0, ranks=(region,)))
    answers: Decoder[DecodeToPrefill] = Decoder(DecodeToPrefill)
    if device in ("DRAM", "VRAM"):
        assert isinstance(answers.decode(opened), KVOpened)
    else:
        with pytest.raises(ProtocolError, match="device"):
            answers.decode(opened)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(frame: bytes) -> None:
    kv: Decoder[KVOpen | KVRenew | KVClosed] = Decoder(KVOpen | KVRenew | KVClosed)
    for one in (decoder, kv):
        with pytest.raises(ProtocolError):
            one.decode(frame)


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_token_ids_are_packed_without_loss(ids: list[int]) -> None:
    assert unpack_ids(pack_ids(ids)) == ids
