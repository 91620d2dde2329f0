"""Frames that no peer of ours sends: refused with one kind of error, and without growing."""

from __future__ import annotations

import tracemalloc
import zlib
from contextlib import nullcontext

import msgspec
import pytest

from kvferry.benchmarks.fuzz.corpus import DECODERS, attack_frames
from kvferry.benchmarks.fuzz.messages import valid_messages
from kvferry.common.errors import ProtocolError
from kvferry.common.grammar import MAX_MASK_BYTES, pack_mask
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.wire.codec import encode
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVArrived
from kvferry.wire.results import Embedding
from kvferry.wire.tasks import EmbedTask, LocalTask, PrefillTask

MAX_GROWTH = 32  # bytes in memory for each byte of a frame


def test_there_is_a_sample_of_every_message() -> None:
    known = {type(message) for message in valid_messages()}
    wanted = {kind for kind in _subclasses(Message) if kind.__module__.startswith("kvferry.wire.")}
    assert known == wanted


def _subclasses(kind: type) -> set[type]:
    direct: set[type] = set(kind.__subclasses__())
    return direct.union(*(_subclasses(each) for each in direct))


def test_every_sample_is_taken_by_one_decoder_at_least() -> None:
    for message in valid_messages():
        taken = 0
        for decoder in DECODERS:
            try:
                assert decoder.decode(encode(message)) == message
                taken += 1
            except ProtocolError:
                pass
        assert taken, message


@pytest.mark.parametrize("name", sorted(attack_frames()))
def test_an_attack_is_refused_and_costs_little(name: str) -> None:
    frame = attack_frames()[name]
    tracemalloc.start()
    try:
        for decoder in DECODERS:
            with pytest.raises(ProtocolError):
                decoder.decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_GROWTH * len(frame) + 2**20, f"{peak} bytes for a frame of {len(frame)}"


def test_no_list_of_a_message_is_unbounded() -> None:
    """A number of elements over every bound, in each place where a list may stand."""
    for message in valid_messages():
        plain = msgspec.msgpack.decode(encode(message))
        for path in _lists(plain):
            longer = msgspec.msgpack.decode(encode(message))
            found = longer
            for key in path:
                found = found[key]
            if not found or isinstance(found, bytes):
                continue
            found.extend(found[:1] * 600_000)
            frame = msgspec.msgpack.encode(longer)
            for decoder in DECODERS:
                with pytest.raises(ProtocolError):
                    decoder.decode(frame)


def _lists(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [path] if isinstance(value, list) else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += _lists(child, (*path, key))
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": b"123"},
        {"outputs": (b"12345",)},
        {"choices": (0, 1), "outputs": (b"",)},
        {"choices": ()},
        {"choices": (16,)},
        {"choices": (-1,)},
        {"choices": tuple(range(17))},
        {"request_id": "r" * 257},
        {"cache_salt": b"s" * 3000},
        {"model": "m" * 257},
        {"adapter": "0" * 129},
        {"adapter": "0A"},
        {"adapter": "0a\n"},
        {"adapter": "../a"},
        {"adapter_path": "/" * 4097},
        {"grammar": ("regex", b"a" * (2**16 + 1))},
        {"grammar": ("k" * 65, b"a")},
        {"grammar": ("regex", b"a", 1)},
        {"attempt": -1},
    ],
)
def test_a_request_that_contradicts_itself_does_not_become_one(fields: dict[str, object]) -> None:
    sound: dict[str, object] = {"request_id": "r", "attempt": 0, "prompt": b"1234", "sampling": SamplingParams()}
    frame = msgspec.msgpack.encode({"type": "LocalTask", "spec": sound | fields})
    assert DECODERS[1].decode(msgspec.msgpack.encode({"type": "LocalTask", "spec": sound}))
    with pytest.raises(ProtocolError):
        DECODERS[1].decode(frame)


@pytest.mark.parametrize(
    "mask",
    [
        b"",  # though the first token is to follow a grammar
        b"no mask",
        pack_mask(b"\1" * 64)[:-1],
        pack_mask(b"\1" * 63),
        pack_mask(b"\0" * (MAX_MASK_BYTES + 4)),
        zlib.compress(b"\0" * 2**26),
        b"m" * (MAX_MASK_BYTES + 1),
    ],
)
def test_a_mask_of_first_tokens_is_whole_and_bounded(mask: bytes) -> None:
    sound = next(message for message in valid_messages() if isinstance(message, PrefillTask))
    fields = msgspec.msgpack.decode(encode(sound))
    assert DECODERS[1].decode(msgspec.msgpack.encode(fields | {"first_mask": pack_mask(b"\1" * MAX_MASK_BYTES)}))
    for other in ({"first_mask": mask}, {"sample": False}):
        with pytest.raises(ProtocolError):
            DECODERS[1].decode(msgspec.msgpack.encode(fields | other))


def test_a_mask_of_first_tokens_comes_with_a_local_prompt_that_follows_a_grammar() -> None:
    sound = next(message for message in valid_messages() if isinstance(message, LocalTask))
    fields = msgspec.msgpack.decode(encode(sound))
    assert DECODERS[1].decode(msgspec.msgpack.encode(fields | {"first_mask": b""}))
    spec, outputs = fields["spec"], {"outputs": [pack_ids([5]) for _ in fields["spec"]["choices"]]}
    for other in ({"first_mask": b"no mask"}, {"spec": spec | {"grammar": None}}, {"spec": spec | outputs}):
        with pytest.raises(ProtocolError):
            DECODERS[1].decode(msgspec.msgpack.encode(fields | other))


def test_a_drafts_state_is_bounded() -> None:
    sound = next(message for message in valid_messages() if isinstance(message, KVArrived))
    for size, is_sound in ((2**16, True), (2**16 + 1, False)):
        frame = encode(msgspec.structs.replace(sound, draft=b"d" * size))
        with nullcontext() if is_sound else pytest.raises(ProtocolError):
            DECODERS[-1].decode(frame)


def test_a_vector_is_bounded_and_whole() -> None:
    sound = next(message for message in valid_messages() if isinstance(message, Embedding))
    for size, is_sound in ((4, True), (2**18, True), (0, False), (6, False), (2**18 + 4, False)):
        frame = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(sound)) | {"vector": b"v" * size})
        with nullcontext() if is_sound else pytest.raises(ProtocolError):
            DECODERS[0].decode(frame)


@pytest.mark.parametrize("pooling", ["max", "", 1, None])
def test_a_pooling_is_one_of_those_that_are_known(pooling: object) -> None:
    sound = next(message for message in valid_messages() if isinstance(message, EmbedTask))
    with pytest.raises(ProtocolError):
        DECODERS[1].decode(msgspec.msgpack.encode(msgspec.msgpack.decode(encode(sound)) | {"pooling": pooling}))


def test_what_we_make_ourselves_is_checked_too() -> None:
    with pytest.raises(ValueError, match="4 bytes each"):
        RequestSpec(request_id="r", attempt=0, prompt=b"123", sampling=SamplingParams())
