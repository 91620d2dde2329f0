"""Checksums of shipped blocks: what arrives whole is found intact, whatever else is not."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from kvferry.common import failpoints
from kvferry.common.config import TransferConfig
from kvferry.common.errors import ConfigError
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.transfer.backends.base import page_rows
from kvferry.transfer.protocol.checksums import ArrivalCheck, PageSums, ShipmentSums, open_check, open_sums
from kvferry.transfer.protocol.handoff import Verdict, page_indices, pages_of
from kvferry.transfer.protocol.shards import pieces
from kvferry.wire.grants import GrantId
from kvferry.wire.handoff import KVArrived, KVRefused
from kvferry.wire.results import HandoffFailed

from ..receive.test_receiver import Decode, only

SPEC = KVCacheSpec(model="m", num_layers=3, num_kv_heads=4, head_dim=2, block_size=4, dtype="float32")
LATENT = msgspec.structs.replace(SPEC, num_kv_heads=1, layout="latent")
NUM_BLOCKS = 12
LOCAL, REMOTE = (6, 1, 3), (9, 0, 4)


def _pages(tp_size: int, seed: int | None = None, spec: KVCacheSpec = SPEC) -> torch.Tensor:
    shape = [spec.num_layers, NUM_BLOCKS, *spec.page_shape(tp_size)]
    if seed is None:
        return torch.zeros(shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Shipped:
    """Blocks of a rank that were copied to another, and the message that says so."""

    def __init__(
        self, source_tp: int = 1, decode_tp: int = 1, *, rank: int = 0, target: int = 0, spec: KVCacheSpec = SPEC
    ) -> None:
        self.here, self.there = _pages(source_tp, 5, spec), _pages(decode_tp, spec=spec)
        runs = pieces(spec.shard(rank, source_tp), spec.shard(target, decode_tp), spec)
        assert runs is not None
        sums, made = PageSums(self.here), ShipmentSums(spec, REMOTE, NUM_BLOCKS)
        for layer in reversed(range(SPEC.num_layers)):  # in whatever order
            ours, theirs = page_indices(spec, layer, LOCAL, NUM_BLOCKS), page_indices(spec, layer, REMOTE, NUM_BLOCKS)
            for run in runs:
                theirs_view = page_rows(self.there)[theirs, run.remote_offset : run.remote_offset + run.num_bytes]
                assert not theirs_view.any()
                page_rows(self.there)[theirs, run.remote_offset : run.remote_offset + run.num_bytes] = page_rows(
                    self.here
                )[ours, run.local_offset : run.local_offset + run.num_bytes]
            made.add(sums, ours[:1], theirs[:1], runs)
            made.add(sums, ours[1:], theirs[1:], runs)
        self.message = KVArrived(
            grant_id=GrantId("d-0", 1, 1),
            open_id=1,
            source_rank=rank,
            num_tokens=12,
            tp_size=source_tp,
            block_ids=REMOTE,
            checksum=made.to_bytes(),
        )
        self.check = ArrivalCheck(PageSums(self.there), spec, rank=target, tp_size=decode_tp, num_blocks=NUM_BLOCKS)

    def verdict(self, **change: object) -> Verdict:
        return self.check.verdict(msgspec.structs.replace(self.message, **change))


@pytest.mark.parametrize(
    ("source_tp", "decode_tp", "rank", "target"), [(1, 1, 0, 0), (2, 2, 1, 1), (1, 2, 0, 1), (4, 2, 3, 1), (2, 1, 1, 0)]
)
def test_what_was_shipped_is_found_intact_head_slices_too(
    source_tp: int, decode_tp: int, rank: int, target: int
) -> None:
    shipped = Shipped(source_tp, decode_tp, rank=rank, target=target)
    assert len(shipped.message.checksum) == 8 * len(REMOTE)
    assert shipped.verdict() is Verdict.INTACT


@pytest.mark.parametrize(("source_tp", "decode_tp", "rank", "target"), [(1, 2, 0, 1), (2, 3, 0, 2), (3, 2, 1, 1)])
def test_latents_are_found_intact_where_their_one_source_says_so(
    source_tp: int, decode_tp: int, rank: int, target: int
) -> None:
    shipped = Shipped(source_tp, decode_tp, rank=rank, target=target, spec=LATENT)
    assert shipped.verdict() is Verdict.INTACT
    for other in range(source_tp + 1):
        if other != rank:
            assert shipped.verdict(source_rank=other) is Verdict.CORRUPT
    assert shipped.verdict(tp_size=2**40) is Verdict.CORRUPT


def _flip_a_bit(pages: torch.Tensor) -> None:
    pages.view(torch.int32)[2, 4, 1, 3, 3, 1] ^= 1


def _lose_a_page(pages: torch.Tensor) -> None:
    pages[1, 0] = 0.0


def _swap_two_blocks(pages: torch.Tensor) -> None:
    pages[:, [0, 9]] = pages[:, [9, 0]]


def _swap_two_layers_of_a_block(pages: torch.Tensor) -> None:
    pages[[0, 1], 4] = pages[[1, 0], 4]


@pytest.mark.parametrize("change", [_flip_a_bit, _lose_a_page, _swap_two_blocks, _swap_two_layers_of_a_block])
def test_bytes_that_are_missing_wrong_or_elsewhere_are_found(change: Callable[[torch.Tensor], None]) -> None:
    shipped = Shipped()
    change(shipped.there)
    assert shipped.verdict() is Verdict.CORRUPT


def test_keys_of_some_heads_in_the_place_of_their_values_are_found() -> None:
    shipped = Shipped(2, 1, rank=1)
    shipped.there[0, 9, [0, 1], 2:] = shipped.there[0, 9, [1, 0], 2:]
    assert shipped.verdict() is Verdict.CORRUPT


@pytest.mark.parametrize("page", [-1, 3 * NUM_BLOCKS])
def test_pages_outside_of_the_pool_are_not_summed(page: int) -> None:
    pages, slots = np.array([page], dtype=np.int32), np.zeros(1, dtype=np.int32)
    with pytest.raises(AssertionError, match="outside of the pool"):
        PageSums(_pages(1)).add(np.zeros(1, dtype=np.uint64), slots, pages, pages, ((0, 8),))


def test_what_another_rank_wrote_into_the_same_page_does_not_matter() -> None:
    shipped = Shipped(2, 1, rank=1)
    shipped.there[:, :, :, :2] = 3.0  # the other half of the heads
    assert shipped.verdict() is Verdict.INTACT
    shipped.there[0, 9, 0, 2] = 3.0
    assert shipped.verdict() is Verdict.CORRUPT


@pytest.mark.parametrize(
    "change",
    [
        {"block_ids": (9, 0)},
        {"block_ids": (9, 0, 0)},
        {"block_ids": (9, 0, NUM_BLOCKS)},
        {"block_ids": (9, 0, 2**40)},
        {"block_ids": ()},
        {"checksum": b"\x00" * 24},
        {"checksum": b"\x00"},
        {"tp_size": 0},
        {"tp_size": 3},
        {"source_rank": 1},
        {"source_rank": 2**40},
    ],
)
def test_a_message_that_no_correct_peer_sends_reads_nothing_outside(change: dict[str, object]) -> None:
    assert Shipped().verdict(**change) is Verdict.CORRUPT


def test_an_arrival_without_checksums_is_not_looked_at() -> None:
    assert Shipped().verdict(checksum=b"", block_ids=()) is Verdict.UNCHECKED


def test_a_drill_spoils_what_has_arrived() -> None:
    failpoints.arm("kv.corrupt=flip", "d-0")
    try:
        shipped = Shipped()
        assert shipped.verdict() is Verdict.CORRUPT
    finally:
        failpoints.arm("", "")


class _CudaPages(torch.Tensor):
    is_cuda = True


def test_the_setting_says_where_checksums_are_made() -> None:
    here, gpu = _pages(1), _pages(1).as_subclass(_CudaPages)
    assert open_sums(TransferConfig(), here) is not None
    assert open_sums(TransferConfig(kv_checksum="on"), here) is not None
    assert open_sums(TransferConfig(kv_checksum="off"), here) is None
    assert open_check(TransferConfig(kv_checksum="off"), here, SPEC, rank=0, tp_size=1) is None
    assert open_sums(TransferConfig(), gpu) is None
    with pytest.raises(ConfigError, match="kv_checksum: on needs KV pages in host memory"):
        open_sums(TransferConfig(kv_checksum="on"), gpu)


def test_one_pass_over_a_block_costs_no_copy() -> None:
    """The sums read the registered memory itself."""
    pages = _pages(1, seed=1)
    before = np.frombuffer(PageSums(pages).view, dtype=np.uint8)
    pages[0, 0, 0, 0, 0, 0] = 42.0
    assert before[:4].tobytes() == np.float32(42.0).tobytes()


# --- what becomes of a handoff --------------------------------------------------------------------------------------


def test_a_corrupt_arrival_is_blamed_counted_and_free_at_once() -> None:
    decode = Decode(checks_bytes=True)
    grant = decode.grant()
    open_id = decode.open(grant, change={"has_checksums": True})
    decode.arrive(grant, open_id, verdict=Verdict.CORRUPT, block_ids=grant.block_ids)
    assert only(decode.said_to_router(), HandoffFailed).blame == "checksum"
    assert decode.holds_nothing() and not decode.receiver.arrived
    assert decode.receiver.counters.checksum_failures == 1


def test_a_corrupt_rank_is_free_only_with_the_last_of_its_worker() -> None:
    decode = Decode(checks_bytes=True)
    grant = decode.grant()
    open_id = decode.open(grant, tp_size=2, change={"has_checksums": True})
    decode.arrive(grant, open_id, verdict=Verdict.CORRUPT, block_ids=grant.block_ids)
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.arrive(grant, open_id, source_rank=1, verdict=Verdict.INTACT, block_ids=grant.block_ids)
    assert decode.holds_nothing() and not decode.receiver.arrived


@pytest.mark.parametrize(
    ("verdict", "num_named", "is_adopted"),
    [
        (Verdict.INTACT, 3, True),
        (Verdict.INTACT, 2, False),  # others than were granted
        (Verdict.UNCHECKED, 0, False),  # promised and not sent
    ],
)
def test_only_all_of_the_grants_blocks_found_intact_are_adopted(
    verdict: Verdict, num_named: int, is_adopted: bool
) -> None:
    decode = Decode(checks_bytes=True)
    grant = decode.grant()
    open_id = decode.open(grant, change={"has_checksums": True})
    decode.arrive(grant, open_id, verdict=verdict, block_ids=grant.block_ids[:num_named])
    assert bool(decode.receiver.arrived) is is_adopted


def test_a_peer_that_makes_none_is_accepted_unless_they_are_required() -> None:
    decode = Decode(checks_bytes=True)
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id)
    assert decode.receiver.arrived
    strict = Decode(checks_bytes=True, config=TransferConfig(kv_checksum="on"))
    strict.open(strict.grant())
    assert "kv_checksum: on" in only(strict.said_to_peer(), KVRefused).reason
    assert strict.receiver.counters.grant_rejects == {"checksum": 1}


def test_what_no_window_reaches_is_not_looked_at() -> None:
    spec = msgspec.structs.replace(SPEC, windows=(0, 3))  # twelve tokens: it reaches two blocks, one of them needlessly
    shipped, made = Shipped(spec=spec), ShipmentSums(spec, REMOTE, NUM_BLOCKS, 1)
    [run] = pieces(spec.shard(0, 1), spec.shard(0, 1), spec) or ()
    for layer in range(3):
        first = 1 if layer == 1 else 0
        ours, theirs = (
            page_indices(spec, layer, LOCAL[first:], NUM_BLOCKS),
            page_indices(spec, layer, REMOTE[first:], NUM_BLOCKS),
        )
        made.add(PageSums(shipped.here), ours, theirs, (run,))
    shipped.there[1, REMOTE[0]] = 5.0
    assert shipped.verdict(checksum=made.to_bytes()) is Verdict.INTACT
    shipped.there[1, REMOTE[1]] = 5.0
    assert shipped.verdict(checksum=made.to_bytes()) is Verdict.CORRUPT
    assert shipped.verdict(checksum=made.to_bytes(), num_tokens=2**40) is Verdict.CORRUPT


def test_thin_blocks_in_one_frame_have_sums_of_their_own() -> None:
    spec = msgspec.structs.replace(SPEC, windows=(3, 0, 3))
    here, there, blocks = _pages(1, 5, spec), _pages(1, spec=spec), (2, NUM_BLOCKS + 2, 4, 5)
    assert spec.num_left_out(16) == 2
    pages, _ = pages_of(spec, blocks, NUM_BLOCKS, 2)
    page_rows(there)[pages] = page_rows(here)[pages]
    runs = pieces(spec.shard(0, 1), spec.shard(0, 1), spec)
    assert runs is not None
    made = ShipmentSums(spec, blocks, NUM_BLOCKS, 2)
    made.add(PageSums(here), pages, pages, runs)
    check = ArrivalCheck(PageSums(there), spec, rank=0, tp_size=1, num_blocks=NUM_BLOCKS)
    message = KVArrived(
        grant_id=GrantId("d-0", 1, 1),
        open_id=1,
        source_rank=0,
        num_tokens=16,
        tp_size=1,
        block_ids=blocks,
        checksum=made.to_bytes(),
    )
    assert check.verdict(message) is Verdict.INTACT
    assert check.verdict(msgspec.structs.replace(message, block_ids=(NUM_BLOCKS + 2, 2, 4, 5))) is Verdict.CORRUPT
    assert check.verdict(msgspec.structs.replace(message, block_ids=(2, 4, NUM_BLOCKS + 2, 5))) is Verdict.CORRUPT
    there[1, 4] = 5.0  # the second thin block's place is where a whole one would have its window's page
    assert check.verdict(message) is Verdict.CORRUPT
