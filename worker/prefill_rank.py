"""The prefill side of a worker's other tensor-parallel ranks: each ships its own heads, by rank 0's commands."""

from __future__ import annotations

from collections.abc import Callable

from ..common.clock import SystemClock
from ..common.config import TransferConfig
from ..engine.engine import Engine
from ..transfer.backends.choose import open_backend
from ..transfer.protocol.checksums import open_sums
from ..transfer.protocol.rank_calls import OwnCalls
from ..transfer.protocol.rank_messages import (
    FollowerSetup,
    PeerMessage,
    RankRead,
    ReadOutcome,
    SourceFree,
    TransferBroke,
    agent_name,
)
from ..transfer.receive.processes import own_mark
from ..transfer.send.ranks import SENDING, LayerShipper
from ..transfer.send.sender import KVSender
from ..transfer.thread import TransferThread
from ..wire.codec import encode
from ..wire.fields import Message
from ..wire.handoff import KVClosed


class PrefillFollower:
    """A `PrefillFollower` owns this rank's outgoing agent. `process`: its end is to be seen, where it copies itself."""

    def __init__(self, engine: Engine, setup: FollowerSetup, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._rank = engine.tp_rank
        config = TransferConfig.model_validate_json(setup.transfer)
        name = agent_name(setup.worker_id, setup.incarnation, 0, engine.tp_rank, is_outgoing=True)
        backend = open_backend(config.backend, name)
        backend.register(engine.kv_pages, rank=engine.tp_rank, tp_size=engine.tp_size, generation=0)
        self.process = own_mark() if backend.copies_itself else None
        self._sender = KVSender(
            rank=engine.tp_rank,
            tp_size=engine.tp_size,
            worker_id=setup.worker_id,
            incarnation=setup.incarnation,
            version=setup.version,
            backend=backend,
            spec=engine.spec,
            num_blocks=engine.kv_pages.shape[1],
            clock=SystemClock(),
            config=config,
            to_peer=self._to_peer,
            report=lambda open_id, report: None,  # rank 0 reports
            source_free=lambda open_id: send(encode(SourceFree(open_id=open_id))),
            on_read=self._on_read,
            sums=open_sums(config, engine.kv_pages),
            processes=() if self.process is None else (self.process,),
        )
        self._thread = TransferThread(
            backend, sender=self._sender, on_failure=self._on_failure, prepare=engine.use_device
        )
        self._layers = LayerShipper(self._thread, self._sender, engine.spec, engine.layer_event)
        self._calls = OwnCalls(SENDING, self._thread, self._sender, self._sender.reader, self._layers)
        self._thread.start()

    def _to_peer(self, kv_address: str, message: Message) -> None:
        assert isinstance(message, KVClosed), "only rank 0 opens and renews"
        self._send(encode(PeerMessage(kv_address=kv_address, message=message)))

    def _on_read(self, fetch_id: int, outcome: ReadOutcome, sums: bytes) -> None:
        self._send(encode(RankRead(rank=self._rank, fetch_id=fetch_id, outcome=outcome, sums=sums)))

    def _on_failure(self, error: BaseException) -> None:
        self._send(encode(TransferBroke(reason=f"{type(error).__name__}: {error}")))

    def on_user(self, payload: bytes) -> None:
        self._calls.run(payload)

    def on_layer(self, layer_id: int) -> None:
        self._layers.on_layer(layer_id)

    def close(self) -> None:
        self._thread.close()
