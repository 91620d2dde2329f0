"""Sender and receiver together: heads for unequal ranks, byte by byte and checked by their sums."""

from __future__ import annotations

import pytest
import torch

from kvferry.common.config import TransferConfig
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.messages import (
    CancelKV,
    Decoder,
    Grant,
    KVArrived,
    KVClosed,
    KVDone,
    KVOpen,
    KVOpened,
    KVRefused,
    KVRenew,
    KVRenewed,
    Message,
)
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.send.sender import KVSender

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=2, block_size=4, dtype="float32")
R, KV = "r-0", "127.0.0.1:1"
_arrived: Decoder[KVArrived] = Decoder(KVArrived)


def _pages(num_blocks: int, tp_size: int) -> torch.Tensor:
    return torch.zeros(SPEC.num_layers, num_blocks, 2, SPEC.num_kv_heads // tp_size, SPEC.block_size, SPEC.head_dim)


def _prompt(request_id: str, attempt: int, num_tokens: int, first: int, choices: tuple[int, ...] = (0,)) -> RequestSpec:
    return RequestSpec(
        request_id=request_id,
        attempt=attempt,
        prompt=pack_ids(list(range(first, first + num_tokens))),
        sampling=SamplingParams(),
        choices=choices,
    )


class DecodeSide:
    """A decode worker of `tp_size` ranks."""

    def __init__(self, clock: FakeClock, network: LocalNetwork, num_blocks: int, tp_size: int = 1) -> None:
        self.pool = BlockPool(num_blocks, SPEC.block_size)
        self.pages = [_pages(num_blocks, tp_size) for _ in range(tp_size)]
        self.backends = [LocalBackend(f"d-0.1.0.{rank}", network) for rank in range(tp_size)]
        regions = [
            backend.register(pages, rank=rank, tp_size=tp_size, generation=0)
            for rank, (backend, pages) in enumerate(zip(self.backends, self.pages, strict=True))
        ]
        self.to_router: list[Message] = []
        self.to_peer: list[tuple[str, Message]] = []
        self.receiver = KVReceiver(
            worker_id="d-0",
            incarnation=1,
            spec=SPEC,
            tp_size=tp_size,
            pool=self.pool,
            regions=tuple(regions),
            kv_address=KV,
            config=TransferConfig(),
            clock=clock,
            version="0.1.0",
            transport="local",
            to_router=lambda router, message: self.to_router.append(message),
            to_peer=lambda session, message: self.to_peer.append((session, message)),
        )

    def notifications(self) -> list[tuple[int, KVArrived]]:
        return [
            (rank, _arrived.decode(payload))
            for rank, backend in enumerate(self.backends)
            for _, payload in backend.notifications()
        ]


class PrefillSide:
    """One rank of a prefill worker."""

    def __init__(
        self, clock: FakeClock, network: LocalNetwork, number: int, num_blocks: int, rank: int = 0, tp_size: int = 1
    ) -> None:
        self.incarnation = 100 + number
        self.agent = f"p-{number}.{self.incarnation}.0.{rank}"
        self.backend = LocalBackend(self.agent, network)
        self.pages = _pages(num_blocks, tp_size)
        self.backend.register(self.pages, rank=rank, tp_size=tp_size, generation=0)
        self.outbox: list[Message] = []
        self.freed: list[int] = []
        self.sender = KVSender(
            rank=rank,
            tp_size=tp_size,
            worker_id=f"p-{number}",
            incarnation=self.incarnation,
            version="0.1.0",
            backend=self.backend,
            spec=SPEC,
            num_blocks=num_blocks,
            clock=clock,
            config=TransferConfig(),
            to_peer=lambda address, message: self.outbox.append(message),
            report=lambda report: None,
            source_free=self.freed.append,
        )


def _to_receiver(receiver: KVReceiver, session: str, message: Message) -> None:
    assert isinstance(message, KVOpen | KVRenew | KVClosed)
    receiver.on_message(session, message)


def _to_sender(sender: KVSender, message: Message) -> None:
    assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
    sender.on_message(message)


@pytest.mark.parametrize(("source", "decode"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_head_arrives_where_it_belongs_whatever_the_rank_counts(source: int, decode: int) -> None:
    clock, network = FakeClock(), LocalNetwork()
    there = DecodeSide(clock, network, 16, decode)
    here = [PrefillSide(clock, network, 0, 8, rank, source) for rank in range(source)]
    whole = torch.rand(
        SPEC.num_layers, 8, 2, SPEC.num_kv_heads, SPEC.block_size, SPEC.head_dim, generator=torch.manual_seed(3)
    )
    for rank, side in enumerate(here):
        side.pages.copy_(whole.chunk(source, dim=3)[rank])
    answer = there.receiver.reserve(_prompt("a", 0, 11, 0), R)
    assert isinstance(answer, Grant)
    local = (6, 1, 3)
    for side in here:
        side.sender.open(1, "a", 0, answer.grant)
    _to_receiver(there.receiver, "p-0#1", here[0].outbox.pop())
    for side in here:
        _to_sender(side.sender, there.to_peer[-1][1])
        for layer in range(SPEC.num_layers):
            side.sender.pages_ready(1, layer, local, answer.grant.block_ids)
        side.sender.finish(1, ())
    for side in here:
        assert not there.receiver.arrived
        side.sender.step()
        for rank, message in there.notifications():
            there.receiver.on_arrived(rank, message)
    blocks, _ = there.receiver.adopt(there.receiver.arrived[0])
    got = torch.cat([pages[:, blocks] for pages in there.pages], dim=3)
    assert torch.equal(got, whole[:, list(local)])
    assert sum(side.backend.telemetry_bytes for side in here) == 3 * SPEC.block_bytes()
