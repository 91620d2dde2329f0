"""A decode worker's other tensor-parallel ranks: a registered region each, and the arrivals in it.

Block ids are rank 0's decision; a follower only tells it what has arrived.
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.config import TransferConfig
from ..common.engine import Engine
from ..common.messages import Decoder, KVArrived, encode
from ..transfer.choose import open_backend
from ..transfer.followers import FollowerRegion, FollowerSetup, RankArrived, TransferBroke, Watch, agent_name
from ..transfer.thread import TransferThread

_watch: Decoder[Watch] = Decoder(Watch)


class DecodeFollower:
    """Implements `common.follower.FollowerHandler`."""

    def __init__(self, engine: Engine, setup: FollowerSetup, send: Callable[[bytes], None]) -> None:
        self._rank = engine.tp_rank
        self._send = send
        config = TransferConfig.model_validate_json(setup.transfer)
        backend = open_backend(config.backend, agent_name(setup.worker_id, setup.incarnation, 0, self._rank))
        region = backend.register(engine.kv_pages, rank=self._rank, tp_size=engine.tp_size, generation=0)
        self._thread = TransferThread(backend, on_arrived=self._on_arrived, on_failure=self._on_failure)
        self._thread.start()
        send(encode(FollowerRegion(region=region)))

    def _on_arrived(self, agent: str, message: KVArrived) -> None:
        self._send(encode(RankArrived(rank=self._rank, message=message)))

    def _on_failure(self, error: BaseException) -> None:
        self._send(encode(TransferBroke(reason=f"{type(error).__name__}: {error}")))

    def on_user(self, payload: bytes) -> None:
        self._thread.watch(_watch.decode(payload).on)

    def on_layer(self, layer_id: int) -> None:
        """Nothing is shipped from here."""

    def close(self) -> None:
        self._thread.close()
