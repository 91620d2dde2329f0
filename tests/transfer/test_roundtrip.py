"""Sender and receiver together: heads, and copies of latents, for unequal ranks, byte by byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.common.config import TransferConfig
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.receive.invariants import check_all, check_complete
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.send.sender import KVSender
from kvferry.wire.codec import Decoder
from kvferry.wire.fields import Message
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.results import Grant, HandoffDone

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=2, block_size=4, dtype="float32")
LATENT = KVCacheSpec(
    model="m", num_layers=2, num_kv_heads=1, head_dim=6, block_size=4, dtype="float32", layout="latent"
)
R, KV = "r-0", "127.0.0.1:1"
_arrived: Decoder[KVArrived] = Decoder(KVArrived)


def _pages(spec: KVCacheSpec, num_blocks: int, tp_size: int) -> torch.Tensor:
    return torch.zeros(spec.num_layers, num_blocks, *spec.page_shape(tp_size))


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

    def __init__(
        self, clock: FakeClock, network: LocalNetwork, num_blocks: int, tp_size: int = 1, spec: KVCacheSpec = SPEC
    ) -> None:
        self.pool = BlockPool(num_blocks, spec.block_size)
        self.pages = [_pages(spec, num_blocks, tp_size) for _ in range(tp_size)]
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
            spec=spec,
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
        self,
        clock: FakeClock,
        network: LocalNetwork,
        number: int,
        num_blocks: int,
        rank: int = 0,
        tp_size: int = 1,
        spec: KVCacheSpec = SPEC,
    ) -> None:
        self.incarnation = 100 + number
        self.agent = f"p-{number}.{self.incarnation}.0.{rank}"
        self.backend = LocalBackend(self.agent, network)
        self.pages = _pages(spec, num_blocks, tp_size)
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
            spec=spec,
            num_blocks=num_blocks,
            clock=clock,
            config=TransferConfig(),
            to_peer=lambda address, message: self.outbox.append(message),
            report=lambda open_id, report: None,
            source_free=self.freed.append,
        )


def _to_receiver(receiver: KVReceiver, session: str, message: Message) -> None:
    assert isinstance(message, KVOpen | KVRenew | KVClosed)
    receiver.on_message(session, message)


def _to_sender(sender: KVSender, message: Message) -> None:
    assert isinstance(message, KVOpened | KVRefused | KVRenewed | CancelKV | KVDone)
    sender.on_message(message)


class Handoff:
    """One prompt of 11 tokens, from the ranks of a prefill worker to those of a decode worker."""

    LOCAL = (6, 1, 3)  # blocks

    def __init__(self, source: int, decode: int, spec: KVCacheSpec) -> None:
        self.clock, network = FakeClock(), LocalNetwork()
        self.there = DecodeSide(self.clock, network, 16, decode, spec)
        self.here = [PrefillSide(self.clock, network, 0, 8, rank, source, spec) for rank in range(source)]
        self.spec = spec
        answer = self.there.receiver.reserve(_prompt("a", 0, 11, 0), R)
        assert isinstance(answer, Grant)
        self.grant = answer.grant
        for side in self.here:
            side.sender.open(1, "a", 0, self.grant)
        _to_receiver(self.there.receiver, "p-0#1", self.here[0].outbox.pop())
        opened = self.there.to_peer.pop()[1]
        for side in self.here:
            _to_sender(side.sender, opened)

    def compute(self, rank: int) -> None:
        """Let one rank complete all pages and post them."""
        sender = self.here[rank].sender
        for layer in range(self.spec.num_layers):
            sender.pages_ready(1, layer, self.LOCAL, self.grant.block_ids)
        sender.finish(1, ())
        sender.step()

    def deliver(self) -> None:
        """Let everything that was said be heard on the other side, until nobody says anything."""
        while self._deliver_once():
            pass

    def _deliver_once(self) -> bool:
        receiver, answers = self.there.receiver, self.there.to_peer
        arrived = self.there.notifications()
        for rank, message in arrived:
            receiver.on_arrived(rank, message)
        told = [side.outbox.pop(0) for side in self.here if side.outbox]
        for word in told:
            _to_receiver(receiver, "p-0#1", word)
        said = list(answers)
        answers.clear()
        for _, answer in said:
            for side in self.here:
                _to_sender(side.sender, answer)
        return bool(arrived or told or said)

    @property
    def num_bytes(self) -> int:
        return sum(side.backend.telemetry_bytes for side in self.here)


@pytest.mark.parametrize(("source", "decode"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_head_arrives_where_it_belongs_whatever_the_rank_counts(source: int, decode: int) -> None:
    handoff = Handoff(source, decode, SPEC)
    there = handoff.there
    whole = torch.rand(SPEC.num_layers, 8, *SPEC.page_shape(), generator=torch.manual_seed(3))
    for rank, side in enumerate(handoff.here):
        side.pages.copy_(whole.chunk(source, dim=3)[rank])
    for rank in range(source):
        assert not there.receiver.arrived
        handoff.compute(rank)
        handoff.deliver()
    blocks, _ = there.receiver.adopt(there.receiver.arrived[0])
    got = torch.cat([pages[:, blocks] for pages in there.pages], dim=3)
    assert torch.equal(got, whole[:, list(Handoff.LOCAL)])
    assert handoff.num_bytes == 3 * SPEC.block_bytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_each_decode_rank_gets_one_copy_of_latents_and_waits_for_nobody_else(
    source: int, decode: int, data: st.DataObject
) -> None:
    """Each source rank holds pages of its own making, so that bytes say who wrote them."""
    handoff = Handoff(source, decode, LATENT)
    there, receiver = handoff.there, handoff.there.receiver
    for rank, side in enumerate(handoff.here):
        side.pages.fill_(rank + 1.0)
    missing = {rank % source for rank in range(decode)}  # that write to somebody
    for rank in data.draw(st.permutations(range(source))):
        assert bool(receiver.arrived) == (not missing)
        handoff.compute(rank)
        handoff.deliver()
        missing.discard(rank)
        check_all(receiver, there.pool)
    check_complete(receiver.arrived[0])
    blocks, _ = receiver.adopt(receiver.arrived[0])
    for rank, pages in enumerate(there.pages):
        assert bool((pages[:, blocks] == rank % source + 1.0).all())
        assert float(pages.count_nonzero()) == len(blocks) * LATENT.block_bytes() / 4
    assert handoff.num_bytes == decode * 3 * LATENT.num_layers * LATENT.head_dim * LATENT.block_size * 4
    done = [message for message in there.to_router if isinstance(message, HandoffDone)]
    assert [message.num_bytes for message in done] == [handoff.num_bytes]
    assert not any(side.sender.num_unfinished for side in handoff.here)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_what_is_given_up_is_free_when_every_source_rank_has_ended(
    source: int, decode: int, data: st.DataObject
) -> None:
    """Ranks that write to nobody have to say so, too: their right ends by the same words."""
    handoff = Handoff(source, decode, LATENT)
    receiver = handoff.there.receiver
    computed = set(data.draw(st.lists(st.integers(0, source - 1), unique=True)))
    if computed >= {rank % source for rank in range(decode)}:
        computed.remove(0)
    for rank in computed:
        handoff.compute(rank)
    receiver.abort("a", 0)
    assert handoff.there.pool.num_quarantined_blocks == 3
    for rank in range(source):
        for _ in range(3):
            handoff.here[rank].sender.step()
    handoff.deliver()
    for side in handoff.here:
        side.sender.step()
    handoff.deliver()
    check_all(receiver, handoff.there.pool)
    assert not handoff.there.pool.num_quarantined_blocks
    assert not any(side.sender.num_unfinished for side in handoff.here)
