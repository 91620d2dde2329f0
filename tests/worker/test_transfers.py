"""A worker's transfers: what its other ranks say reaches its core, and what its core asks for reaches them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kvferry.common.config import TransferConfig
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.backends.local import LocalBackend, LocalNetwork
from kvferry.transfer.protocol.handoff import Verdict
from kvferry.transfer.protocol.rank_messages import (
    TO_DECODE,
    TO_PREFILL,
    PeerMessage,
    RankArrived,
    RankRead,
    RankSums,
    ReadOutcome,
    Rotated,
    SourceFree,
    TransferBroke,
)
from kvferry.transfer.send.ranks import SENDING
from kvferry.wire.codec import encode
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVArrived, KVClosed
from kvferry.worker.decode_rank import RECEIVING
from kvferry.worker.transfers import Transfers

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
GRANT_ID = GrantId("w", 1, 1)
ARRIVED = KVArrived(grant_id=GRANT_ID, open_id=7, source_rank=0, num_tokens=4)
CLOSED = KVClosed(grant_id=GRANT_ID, open_id=7, source_rank=1, clean=True)
WAIT_S = 120.0


class Bench:
    """Implements `Heard`, and is the group of the other ranks."""

    def __init__(self, *, tp_size: int = 2, checksum: str = "auto") -> None:
        self.heard: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self.sent: list[bytes] = []
        network = LocalNetwork()
        self.incoming, self.outgoing = LocalBackend("w.1.0.0", network), LocalBackend("w.1-out.0.0", network)
        pages = torch.zeros(SPEC.num_layers, 4, *SPEC.page_shape(tp_size))
        self.regions = [
            backend.register(pages, rank=0, tp_size=tp_size, generation=0) for backend in (self.incoming, self.outgoing)
        ]
        deps: Any = SimpleNamespace(
            config=SimpleNamespace(worker_id="w", transfer=TransferConfig(kv_checksum=checksum)),
            engine=SimpleNamespace(
                kv_pages=pages, spec=SPEC, tp_size=tp_size, layer_event=lambda: None, use_device=lambda: None
            ),
            incarnation=1,
            version="1",
            clock=FakeClock(),
            group=None if tp_size == 1 else SimpleNamespace(broadcast=self.sent.append),
            backend=self.incoming,
            outgoing=self.outgoing,
            on_failure=lambda error: self.heard.put(("on_failure", error)),
            processes=(),
        )
        heard: Any = self
        self.transfers = Transfers(deps, heard)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.heard.put((name, *args))


@pytest.mark.parametrize(("checksum", "is_summed"), [("auto", True), ("off", False)])
def test_the_setting_says_what_is_summed(checksum: str, is_summed: bool) -> None:
    transfers = Bench(checksum=checksum).transfers
    assert [transfers.checks_bytes, transfers.sums_writes, transfers.sums_loans] == [is_summed] * 3


@pytest.mark.parametrize(
    ("message", "heard"),
    [
        (PeerMessage(kv_address="d:1", message=CLOSED), ("to_target", "d:1", CLOSED)),
        (SourceFree(open_id=7), ("on_rank_free", 7)),
        (
            RankRead(rank=1, fetch_id=9, outcome=ReadOutcome.FAILED, sums=b"s"),
            ("on_read", 1, 9, ReadOutcome.FAILED, b"s"),
        ),
        (RankArrived(rank=1, message=ARRIVED, verdict=Verdict.CORRUPT), ("on_arrived", 1, ARRIVED, Verdict.CORRUPT)),
        (RankSums(rank=1, fetch_id=9, checksum=b"s"), ("on_sums", 1, 9, b"s")),
    ],
)
def test_another_ranks_word_is_heard(message: Message, heard: tuple[object, ...]) -> None:
    bench = Bench()
    bench.transfers.on_follower(1, message)
    assert bench.heard.get(timeout=WAIT_S) == heard and bench.heard.empty()


def test_a_word_that_no_rank_says_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="TransferBroke from rank 1"):
        Bench().transfers.on_follower(1, TransferBroke(reason="no"))


def test_calls_reach_the_side_of_the_other_ranks_that_they_are_for() -> None:
    bench = Bench()
    bench.transfers.watch(True)
    bench.transfers.sum_loan(9, (2, 0), 1)
    bench.transfers.rotate(3)
    bench.transfers.shipping.cancel(7, "aborted")
    bench.transfers.reading.give_up(9)
    told = [
        ({TO_DECODE: RECEIVING, TO_PREFILL: SENDING}[payload[:1]].decode(payload[1:]), payload[:1])
        for payload in bench.sent
    ]
    assert told == [
        (("watch", (True,)), TO_DECODE),
        (("sum_blocks", (9, (2, 0), 1)), TO_DECODE),
        (("rotate", (3,)), TO_DECODE),
        (("cancel", (7, "aborted")), TO_PREFILL),
        (("give_up", (9,)), TO_PREFILL),
    ]


def test_agents_are_replaced_when_every_rank_has_answered() -> None:
    bench = Bench()
    bench.transfers.rotate(3)
    bench.transfers.on_follower(1, Rotated(rank=1, generation=3, region=bench.regions[1]))
    assert bench.heard.empty()
    bench.transfers.incoming.start()
    try:
        name, regions = bench.heard.get(timeout=WAIT_S)
        assert name == "on_rotated" and [region.agent for region in regions] == ["w.1.3.0", "w.1-out.0.0"]
    finally:
        bench.transfers.incoming.close()


@pytest.mark.parametrize("has_checksum", [False, True])
def test_what_arrives_is_heard_with_a_verdict(has_checksum: bool) -> None:
    bench = Bench(tp_size=1)
    message = ARRIVED
    if has_checksum:  # of other bytes than the page's
        message = msgspec.structs.replace(ARRIVED, block_ids=(2,), checksum=bytes(8))
    bench.transfers.incoming.start()
    bench.outgoing.notify(bench.incoming.agent, encode(message))
    try:
        bench.transfers.watch(True)
        verdict = Verdict.CORRUPT if has_checksum else Verdict.UNCHECKED
        assert bench.heard.get(timeout=WAIT_S) == ("on_arrived", 0, message, verdict)
    finally:
        bench.transfers.incoming.close()
