"""Another tensor-parallel rank of a worker: both roles' followers beside one engine."""

from __future__ import annotations

from collections.abc import Callable

from ..engine.engine import Engine
from ..transfer.protocol.rank_messages import TO_PREFILL, FollowerRegion, FollowerSetup
from ..wire.codec import encode
from .decode_rank import DecodeFollower
from .prefill_rank import PrefillFollower


class FollowerPair:
    """Implements `common.follower.FollowerHandler`."""

    def __init__(self, engine: Engine, setup: FollowerSetup, send: Callable[[bytes], None]) -> None:
        self._decode = DecodeFollower(engine, setup, send)
        self._prefill = PrefillFollower(engine, setup, send)
        send(encode(FollowerRegion(region=self._decode.region, process=self._prefill.process)))

    def on_user(self, payload: bytes) -> None:
        follower = self._prefill if payload[:1] == TO_PREFILL else self._decode
        follower.on_user(payload[1:])

    def on_layer(self, layer_id: int) -> None:
        self._prefill.on_layer(layer_id)

    def close(self) -> None:
        self._prefill.close()
        self._decode.close()
