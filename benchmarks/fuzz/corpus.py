"""What is thrown at the wire: mutations of sound messages' frames, and frames made to hurt.

Everything comes from a `random.Random`: a seed gives the same frames again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from kvferry.benchmarks.fuzz.messages import valid_messages
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
from kvferry.wire.fields import Message
from kvferry.wire.handoff import KVArrived
from kvferry.wire.hello import Challenge, Hello, Refused, Welcome
from kvferry.wire.results import StepTokens
from kvferry.wire.tasks import Abort

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
