"""Frames of bytes from messages and back. MessagePack by msgspec; no pickle anywhere."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from ..common.errors import ProtocolError
from .fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchRefused, KVFetchSums
from .fields import Message
from .handoff import CancelKV, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from .hello import Refused
from .results import (
    Embedding,
    FirstToken,
    Grant,
    HandoffDone,
    HandoffFailed,
    NoCapacity,
    PromptLogprobs,
    StepTokens,
    TaskRefused,
    WorkerFailure,
)
from .tasks import Abort, EmbedTask, LocalTask, PrefillTask, ReserveKV
from .workers import CacheChange, Drain, Goodbye, LiveRequests, SetRole, TransferReport, WorkerHello, WorkerStatus

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
