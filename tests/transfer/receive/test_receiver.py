"""Every row of the decode side's table, and the messages that must change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TypeVar

import msgspec
import pytest

from kvferry.common.config import TransferConfig
from kvferry.common.errors import InvalidTransition
from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.kvcache.blocks import hash_blocks, prefix_salt
from kvferry.kvcache.frame_pool import block_pool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.protocol.handoff import Endpoint, Verdict, are_ids, check_grant, open_mac
from kvferry.transfer.receive import reservations
from kvferry.transfer.receive.opens import WatchProcesses
from kvferry.transfer.receive.processes import watch as watch_processes
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import Reservation, ReservationState
from kvferry.transfer.receive.reservations import Kept
from kvferry.wire.codec import Decoder, encode
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo
from kvferry.wire.handoff import CancelKV, KVArrived, KVClosed, KVDone, KVOpen, KVOpened, KVRefused, KVRenew, KVRenewed
from kvferry.wire.results import ChoiceTokens, Grant, HandoffDone, HandoffFailed, NoCapacity

SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32")
P, D, R = "p-0#1", "d-0", "r-0"
FIRST = (ChoiceTokens(0, 0, (SampledToken(7),)),)
M = TypeVar("M", bound=Message)


def _regions(tp_size: int) -> tuple[RegionInfo, ...]:
    return tuple(
        RegionInfo(
            rank=rank,
            tp_size=tp_size,
            agent=f"d-0.1.0.{rank}",
            generation=0,
            agent_metadata=b"tcp, rdma",
            base_addr=0,
            num_blocks=64,
            page_bytes=SPEC.page_bytes(tp_size),
            device="DRAM",
            device_id=0,
            transport="local",
        )
        for rank in range(tp_size)
    )


class Decode:
    """A receiver, its pool, and everything that it said."""

    def __init__(
        self,
        num_blocks: int = 64,
        tp_size: int = 1,
        *,
        config: TransferConfig | None = None,
        checks_bytes: bool = False,
        rotate: Callable[[int], None] | None = None,
        watch: WatchProcesses = watch_processes,
        spec: KVCacheSpec = SPEC,
    ) -> None:
        self.first_regions = _regions(tp_size)
        self.clock = FakeClock(100.0)
        self.pool = block_pool(spec, num_blocks)
        self.to_router: list[Message] = []
        self.to_peer: list[tuple[str, Message]] = []
        self.open_ids = itertools.count(1000)
        self.granted_to: dict[int, tuple[str, int]] = {}  # by epoch
        self.receiver = KVReceiver(
            worker_id=D,
            incarnation=1,
            spec=spec,
            tp_size=tp_size,
            pool=self.pool,
            regions=self.first_regions,
            kv_address="127.0.0.1:1",
            config=config or TransferConfig(),
            clock=self.clock,
            version="0.1.0",
            transport="local",
            to_router=lambda router, message: self.to_router.append(message),
            to_peer=lambda session, message: self.to_peer.append((session, message)),
            rotate=rotate,
            watch=watch,
            checks_bytes=checks_bytes,
        )

    def reserve(
        self,
        request_id: str = "a",
        attempt: int = 0,
        *,
        num_tokens: int = 10,
        choices: tuple[int, ...] = (0,),
        first: int = 0,
        max_local_tokens: int = 0,
        growth_reserve: int = 0,
    ) -> Grant | NoCapacity:
        spec = RequestSpec(
            request_id=request_id,
            attempt=attempt,
            prompt=pack_ids(list(range(first, first + num_tokens))),
            sampling=SamplingParams(),
            choices=choices,
        )
        answer = self.receiver.reserve(spec, R, max_local_tokens=max_local_tokens, growth_reserve=growth_reserve)
        self.receiver.check()
        if isinstance(answer, Grant):
            self.granted_to[answer.grant.grant_id.epoch] = (request_id, attempt)
        return answer

    def grant(self, request_id: str = "a", attempt: int = 0, *, num_tokens: int = 10, first: int = 0) -> GrantInfo:
        answer = self.reserve(request_id, attempt, num_tokens=num_tokens, first=first)
        assert isinstance(answer, Grant), answer
        return answer.grant

    def open(
        self, grant: GrantInfo, *, session: str = P, tp_size: int = 1, change: dict[str, object] | None = None
    ) -> int:
        """Deliver a KVOpen, with its fields changed as asked; the open id of the unchanged one."""
        request_id, attempt = self.granted_to.get(grant.grant_id.epoch, ("a", 0))
        message = KVOpen(
            grant_id=grant.grant_id,
            open_id=next(self.open_ids),
            mac=open_mac(grant, request_id, attempt),
            worker_id="p-0",
            incarnation=7,
            spec=SPEC,
            version="0.1.0",
            transport="local",
            tp_size=tp_size,
        )
        self.receiver.on_message(session, msgspec.structs.replace(message, **(change or {})))
        return message.open_id

    def opened(self, request_id: str = "a", *, num_tokens: int = 10, tp_size: int = 1) -> tuple[GrantInfo, int]:
        grant = self.grant(request_id, num_tokens=num_tokens)
        open_id = self.open(grant, tp_size=tp_size)
        assert isinstance(self.said_to_peer()[-1], KVOpened)
        return grant, open_id

    def arrive(
        self,
        grant: GrantInfo,
        open_id: int,
        *,
        source_rank: int = 0,
        decode_rank: int = 0,
        num_tokens: int | None = None,
        first_tokens: tuple[ChoiceTokens, ...] = FIRST,
        verdict: Verdict = Verdict.UNCHECKED,
        block_ids: tuple[int, ...] = (),
        draft: bytes = b"",
        num_cached_tokens: int = 0,
    ) -> None:
        self.receiver.on_arrived(
            decode_rank,
            KVArrived(
                grant_id=grant.grant_id,
                open_id=open_id,
                source_rank=source_rank,
                num_tokens=grant.num_tokens if num_tokens is None else num_tokens,
                first_tokens=first_tokens if source_rank == 0 else (),
                block_ids=block_ids,
                draft=draft,
                num_cached_tokens=num_cached_tokens,
            ),
            verdict,
        )
        self.receiver.check()

    def close(self, grant: GrantInfo, open_id: int, *, clean: bool = True, source_rank: int = 0) -> None:
        self.receiver.on_message(
            P, KVClosed(grant_id=grant.grant_id, open_id=open_id, source_rank=source_rank, clean=clean)
        )
        self.receiver.check()

    def said_to_peer(self) -> list[Message]:
        said, self.to_peer = [message for _, message in self.to_peer], []
        return said

    def said_to_router(self) -> list[Message]:
        said, self.to_router = self.to_router, []
        return said

    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.receiver.tick()
        self.receiver.check()

    def holds_nothing(self) -> bool:
        return self.receiver.num_live == 0 and self.pool.num_owned_blocks == self.pool.num_quarantined_blocks == 0


def only(messages: list[Message], kind: type[M]) -> M:
    found = [message for message in messages if isinstance(message, kind)]
    assert len(found) == 1, messages
    return found[0]


@pytest.fixture
def decode() -> Decode:
    return Decode()


# --- reserving -------------------------------------------------------------------------------------------------


def test_a_grant_names_blocks_for_the_prompt_and_holds_copies_back(decode: Decode) -> None:
    answer = decode.reserve(num_tokens=10, choices=(0, 1, 2))
    assert isinstance(answer, Grant)
    assert len(answer.grant.block_ids) == 3
    assert answer.grant.num_tokens == 10 and answer.grant.num_computed_tokens == 0
    assert decode.pool.num_owned_blocks == decode.receiver.reservations.num_granted_blocks == 5
    assert not decode.receiver.has_open


def test_full_last_blocks_need_no_copies(decode: Decode) -> None:
    assert isinstance(decode.reserve(num_tokens=12, choices=(0, 1)), Grant)
    assert decode.receiver.reservations.num_granted_blocks == 3


def _adopted(decode: Decode, request_id: str, num_tokens: int) -> list[int]:
    """Take a prompt all the way and end its sequence: its blocks are cached."""
    grant, open_id = decode.opened(request_id, num_tokens=num_tokens)
    decode.arrive(grant, open_id)
    blocks, copies = decode.receiver.adopt(decode.receiver.arrived[0])
    decode.pool.free(blocks + copies)
    return blocks


def test_whole_blocks_that_are_held_are_pinned_and_not_shipped(decode: Decode) -> None:
    blocks = _adopted(decode, "a", 10)
    grant = decode.grant("b", num_tokens=11)
    assert grant.num_computed_tokens == 8
    assert len(grant.block_ids) == 1 and not set(grant.block_ids) & set(blocks[:2])
    assert [decode.pool.ref_count(block) for block in blocks[:2]] == [1, 1]
    decode.receiver.abort("b", 0)
    assert [decode.pool.ref_count(block) for block in blocks[:2]] == [0, 0]
    counters = decode.receiver.counters
    assert (counters.prefix_queries, counters.prefix_hits) == (10 + 11, 8)


def test_a_pool_that_caches_nothing_is_asked_for_no_prefix(decode: Decode) -> None:
    decode.pool.enable_prefix_caching = False
    decode.grant()
    assert decode.receiver.counters.prefix_queries == 0


def test_a_refusal_says_what_is_free_and_what_is_cached(decode: Decode) -> None:
    _adopted(decode, "a", 10)
    answer = decode.reserve("b", num_tokens=11, growth_reserve=64)
    assert isinstance(answer, NoCapacity) and answer.reason == "growth"
    assert (answer.num_free_blocks, answer.num_cached_tokens) == (64, 8)


def test_what_is_kept_for_others_is_not_promised(decode: Decode) -> None:
    spec = RequestSpec(request_id="a", attempt=0, prompt=pack_ids(list(range(10))), sampling=SamplingParams())
    for kept in (Kept(num_free=62), Kept(num_promised=30)):
        assert _refused(decode.receiver.reserve(spec, R, kept=kept)) == "growth"
    assert isinstance(decode.receiver.reserve(spec, R, kept=Kept(num_free=61, num_promised=29)), Grant)


def test_blocks_are_spare_while_every_request_of_theirs_is_kept_elsewhere(decode: Decode) -> None:
    for name, retains_prefix, is_spare in (("a", False, True), ("b", False, True), ("c", True, False)):
        prompt = pack_ids(list(range(11)))
        spec = RequestSpec(request_id=name, attempt=0, prompt=prompt, sampling=SamplingParams())
        answer = decode.receiver.reserve(spec, R, retains_prefix=retains_prefix)
        assert isinstance(answer, Grant)
        decode.granted_to[answer.grant.grant_id.epoch] = (name, 0)
        decode.arrive(answer.grant, decode.open(answer.grant))
        blocks, _ = decode.receiver.adopt(decode.receiver.arrived[0])
        assert [decode.pool.is_spare(block) for block in blocks] == [is_spare, is_spare, False]
        decode.pool.free(blocks)


def test_hashes_that_somebody_keeps_are_not_computed_again(decode: Decode) -> None:
    _adopted(decode, "a", 10)
    spec = RequestSpec(request_id="b", attempt=0, prompt=pack_ids(list(range(11))), sampling=SamplingParams())
    answer = decode.receiver.reserve(spec, R, hashes=lambda: [b"one", b"two"])
    assert isinstance(answer, Grant) and answer.grant.num_computed_tokens == 0


def test_another_tenants_blocks_are_no_hits(decode: Decode) -> None:
    _adopted(decode, "a", 10)
    prompt = pack_ids(list(range(11)))
    spec = RequestSpec(request_id="b", attempt=0, prompt=prompt, sampling=SamplingParams(), cache_salt=b"x")
    answer = decode.receiver.reserve(spec, R)
    assert isinstance(answer, Grant) and answer.grant.num_computed_tokens == 0


@pytest.mark.parametrize(("num_tokens", "max_local_tokens", "cached"), [(8, 0, 8), (11, 3, 8), (2, 2, 0)])
def test_a_prompt_of_which_little_is_missing_is_held(
    decode: Decode, num_tokens: int, max_local_tokens: int, cached: int
) -> None:
    _adopted(decode, "a", 10)
    answer = decode.reserve("b", num_tokens=num_tokens, max_local_tokens=max_local_tokens)
    assert isinstance(answer, NoCapacity)
    assert (answer.reason, answer.num_cached_tokens) == ("held", cached)
    assert decode.holds_nothing()


def test_shortage_says_what_is_short() -> None:
    decode = Decode(num_blocks=8)
    assert _refused(decode.reserve(num_tokens=33)) == "never_fits"
    assert _refused(decode.reserve(num_tokens=12, growth_reserve=6)) == "growth"
    decode.pool.allocate(6)
    assert _refused(decode.reserve(num_tokens=12)) == "blocks"


def test_a_prompt_may_take_the_whole_pool(decode: Decode) -> None:
    assert len(decode.grant(num_tokens=64 * 4).block_ids) == 64


def test_hits_that_would_be_pinned_are_not_free() -> None:
    decode = Decode(num_blocks=4)
    _adopted(decode, "a", 8)
    assert _refused(decode.reserve("b", num_tokens=16, growth_reserve=1)) == "growth"
    [block] = decode.pool.allocate(1)
    assert _refused(decode.reserve("b", num_tokens=16)) == "blocks"
    decode.pool.free([block])
    assert decode.grant("b", num_tokens=16).num_computed_tokens == 8


def test_a_promise_has_its_turn_while_older_ones_and_it_are_half_of_the_pool_at_most() -> None:
    decode = Decode(num_blocks=16)
    books = decode.receiver.reservations
    decode.grant("a", num_tokens=20)
    decode.opened("b")
    older = books.promises
    assert len(older) == 2 and books.num_granted_blocks == 8
    assert books.has_turn(0, older) and not books.has_turn(1, older)
    assert books.has_turn(16, frozenset()), "nobody is before it"
    decode.receiver.abort("b", 0)
    assert books.has_turn(3, older) and not books.has_turn(4, older)


def _refused(answer: Grant | NoCapacity) -> str:
    assert isinstance(answer, NoCapacity), answer
    return answer.reason


def test_promises_stay_below_half_of_the_pool_but_one_passes() -> None:
    decode = Decode(num_blocks=16)
    decode.grant("a", num_tokens=40)  # alone, it may take more than half
    assert _refused(decode.reserve("b", num_tokens=4, first=500)) == "growth"
    decode.receiver.abort("a", 0)
    decode.grant("c", num_tokens=16)
    decode.grant("d", num_tokens=16, first=100)
    assert _refused(decode.reserve("e", num_tokens=4, first=200)) == "growth"


def test_what_is_cached_is_not_promised() -> None:
    decode = Decode(num_blocks=16)
    _adopted(decode, "a", 16)
    decode.grant("b", num_tokens=24, first=100)
    assert len(decode.grant("c", num_tokens=24).block_ids) == 2


def test_quarantine_counts_as_promised() -> None:
    decode = Decode(num_blocks=16)
    decode.opened("a", num_tokens=24)
    assert decode.receiver.reservations.num_granted_blocks == 6
    decode.receiver.abort("a", 0)
    decode.grant("b", num_tokens=8, first=100)
    assert _refused(decode.reserve("c", num_tokens=4, first=200)) == "growth"


def test_the_same_reserve_again_gets_the_same_grant(decode: Decode) -> None:
    assert decode.grant() == decode.grant()
    decode.open(decode.grant())
    assert _refused(decode.reserve()) == "stale" and decode.receiver.counters.stale_messages == 1


def test_a_higher_attempt_ends_the_lower_one(decode: Decode) -> None:
    first = decode.grant("a", 0)
    second = decode.grant("a", 1)
    assert first.grant_id != second.grant_id
    assert decode.receiver.reservations.num_granted_blocks == 3
    decode.open(first)
    assert isinstance(decode.said_to_peer()[-1], KVRefused)
    decode.open(second)
    decode.grant("a", 2)  # the opened one goes into quarantine
    assert decode.receiver.reservations.num_quarantined_blocks == 3


def test_an_attempt_that_ended_gets_nothing(decode: Decode) -> None:
    decode.grant("a", 3)
    decode.receiver.abort("a", 3)
    assert _refused(decode.reserve("a", 3)) == "stale"
    assert _refused(decode.reserve("a", 2)) == "stale"
    assert isinstance(decode.reserve("a", 4), Grant)
    assert _refused(decode.reserve("a", 2)) == "stale"


def test_a_draining_worker_grants_and_opens_nothing(decode: Decode) -> None:
    grant = decode.grant()
    decode.receiver.draining = True
    assert _refused(decode.reserve("b")) == "draining"
    decode.receiver.is_active = False
    assert _refused(decode.reserve("b")) == "draining"
    decode.open(grant)
    assert only(decode.said_to_peer(), KVRefused).reason == "draining"
    assert only(decode.said_to_router(), HandoffFailed).blame == "draining" and decode.holds_nothing()


def test_a_newer_attempt_ends_the_older_one_where_nothing_is_granted(decode: Decode) -> None:
    decode.grant("a", 0)
    decode.receiver.draining = True
    assert _refused(decode.reserve("a", 1)) == "draining"
    assert decode.holds_nothing()


# --- GRANTED -----------------------------------------------------------------------------------------------------


def test_a_granted_reservation_that_is_aborted_is_free_at_once(decode: Decode) -> None:
    grant = decode.grant()
    reservation = decode.receiver.reservations.of_request("a")
    decode.receiver.abort("a", 0)
    assert reservation is not None and reservation.state is ReservationState.RELEASED
    assert decode.holds_nothing()
    decode.open(grant)
    assert isinstance(decode.said_to_peer()[-1], KVRefused)
    assert decode.said_to_router() == []


def test_copies_that_were_granted_are_free_with_the_rest(decode: Decode) -> None:
    decode.reserve(choices=(0, 1, 2))
    decode.receiver.abort("a", 0)
    assert decode.holds_nothing()


def test_an_open_that_was_closed_before_it_came_binds_nobody(decode: Decode) -> None:
    grant = decode.grant()
    decode.close(grant, 1000)
    assert only(decode.said_to_peer(), KVDone).open_id == 1000
    assert decode.open(grant) == 1000
    assert only(decode.said_to_peer(), KVRefused).reason == "the open was closed before"
    assert only(decode.said_to_router(), HandoffFailed).blame == "refused" and decode.holds_nothing()


def test_a_long_reason_is_cut_to_what_a_message_may_hold(decode: Decode) -> None:
    decode.open(decode.grant(), change={"spec": msgspec.structs.replace(SPEC, windows=4096 * (7,))})
    for message in (only(decode.said_to_peer(), KVRefused), only(decode.said_to_router(), HandoffFailed)):
        assert Decoder(type(message)).decode(encode(message)) == message


def test_a_grant_that_nobody_opens_lapses_and_its_router_hears_so(decode: Decode) -> None:
    decode.grant()
    decode.wait(1.9)
    assert not decode.holds_nothing()
    decode.wait(0.2)
    assert decode.holds_nothing()
    assert only(decode.said_to_router(), HandoffFailed).blame == "expired"


def test_a_lost_router_frees_its_grants(decode: Decode) -> None:
    decode.grant()
    decode.receiver.on_router_lost("r-1")
    assert not decode.holds_nothing()
    decode.receiver.on_router_lost(R)
    assert decode.holds_nothing()


def test_a_router_that_comes_back_keeps_what_it_names(decode: Decode) -> None:
    decode.grant("a")
    decode.grant("b", 1, first=100)
    decode.receiver.keep_only(R, frozenset({("b", 1), ("a", 1)}))
    assert decode.receiver.reservations.num_granted_blocks == 3


# --- KVOpen -------------------------------------------------------------------------------------------------------


def test_the_first_open_binds_and_the_same_again_is_answered_again(decode: Decode) -> None:
    grant = decode.grant()
    open_id = decode.open(grant)
    decode.open(grant, change={"open_id": open_id})
    assert [type(message) for message in decode.said_to_peer()] == [KVOpened, KVOpened]
    assert decode.receiver.has_open


@pytest.mark.parametrize(
    ("session", "change"),
    [(P, {"open_id": 5}), ("p-0#2", {}), (P, {"incarnation": 8})],
)
def test_another_writer_is_refused(decode: Decode, session: str, change: dict[str, object]) -> None:
    grant, open_id = decode.opened()
    decode.open(grant, session=session, change={"open_id": open_id, **change})
    assert only(decode.said_to_peer(), KVRefused).reason == "the grant was opened before"
    decode.arrive(grant, open_id)
    assert decode.receiver.arrived


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mac": b"forged"}, "mac"),
        ({"grant_id": GrantId(D, 1, 99)}, "never given"),
        ({"grant_id": GrantId(D, 2, 1)}, "never given"),
        ({"grant_id": GrantId("d-1", 1, 1)}, "never given"),
        ({"version": "0.0.9"}, "0.1.0 here, 0.0.9 there"),
        ({"tp_size": 3}, "split over 3 ranks there"),
        ({"tp_size": 2**40}, "ranks there"),
        ({"spec": msgspec.structs.replace(SPEC, block_size=8)}, "block_size 4 here, 8 there"),
    ],
)
def test_an_open_that_does_not_fit_is_refused(decode: Decode, change: dict[str, object], words: str) -> None:
    grant = decode.grant()
    decode.open(grant, change=change)
    assert words in only(decode.said_to_peer(), KVRefused).reason
    assert not decode.receiver.has_open
    assert decode.receiver.counters.stale_messages == 1


def test_a_worker_that_requires_checksums_refuses_who_makes_none() -> None:
    decode = Decode(config=TransferConfig(kv_checksum="on"), checks_bytes=True)
    decode.open(decode.grant("a"))
    assert "checksums are required here" in only(decode.said_to_peer(), KVRefused).reason
    decode.open(decode.grant("b"), change={"has_checksums": True})
    assert isinstance(decode.said_to_peer()[-1], KVOpened)


def test_an_open_that_is_told_again_is_answered_while_the_worker_drains_and_refused_when_it_is_over(
    decode: Decode,
) -> None:
    grant, open_id = decode.opened()
    decode.receiver.draining = True
    decode.open(grant, change={"open_id": open_id})
    assert isinstance(decode.said_to_peer()[-1], KVOpened)
    decode.receiver.abort("a", 0)
    decode.open(grant, change={"open_id": open_id})
    assert only(decode.said_to_peer(), KVRefused).reason == "the grant was opened before"


def test_the_router_of_a_grant_that_may_not_be_opened_hears_so_at_once(decode: Decode) -> None:
    decode.open(decode.grant(), change={"version": "0.0.9"})
    failed = only(decode.said_to_router(), HandoffFailed)
    assert (failed.request_id, failed.attempt, failed.blame) == ("a", 0, "refused") and "0.0.9" in failed.reason
    assert decode.holds_nothing()
    decode.wait(3.0)
    assert decode.said_to_router() == []


def test_an_open_that_is_none_of_the_grants_ends_no_grant(decode: Decode) -> None:
    """A forged one, and one of another writer than the one that has it."""
    grant = decode.grant()
    decode.open(grant, change={"mac": b"forged"})
    open_id = decode.open(grant)
    decode.open(grant, session="p-0#2")
    assert decode.said_to_router() == []
    decode.arrive(grant, open_id)
    assert decode.receiver.arrived


def test_a_peer_with_an_old_quarantine_opens_nothing_more(decode: Decode) -> None:
    decode.opened("a")
    decode.receiver.on_session_lost(P)
    decode.open(decode.grant("b", first=100))
    assert isinstance(decode.said_to_peer()[-1], KVOpened)  # a young one may still end cleanly
    decode.wait(1.1)
    decode.open(decode.grant("c", first=200))
    assert only(decode.said_to_peer(), KVRefused).reason == "fenced_peer"
    assert [each.request_id for each in decode.said_to_router() if isinstance(each, HandoffFailed)] == ["a", "c"]
    decode.open(decode.grant("d", first=300), change={"incarnation": 8})
    assert isinstance(decode.said_to_peer()[-1], KVOpened)


# --- OPEN ----------------------------------------------------------------------------------------------------------


def test_renewals_keep_the_lease_and_silence_ends_it(decode: Decode) -> None:
    grant, open_id = decode.opened()
    for _ in range(5):
        decode.wait(2.5)
        decode.receiver.on_message(P, KVRenew(opens=((grant.grant_id, open_id),)))
        assert only(decode.said_to_peer(), KVRenewed).opens == ((grant.grant_id, open_id, 3.0),)
    decode.wait(3.1)
    assert only(decode.said_to_peer(), CancelKV).open_id == open_id
    failed = only(decode.said_to_router(), HandoffFailed)
    assert (failed.blame, failed.worker_id) == ("expired", "p-0")
    assert decode.receiver.reservations.num_quarantined_blocks == 3  # a lease that runs out frees nothing
    decode.wait(1000)
    assert decode.receiver.reservations.num_quarantined_blocks == 3


def test_an_arrival_hands_over_and_tells_everybody(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id, num_cached_tokens=4)
    assert only(decode.said_to_router(), HandoffDone).num_bytes == 3 * SPEC.block_bytes()
    assert only(decode.said_to_peer(), KVDone).open_id == open_id
    reservation = decode.receiver.arrived[0]
    assert reservation.num_cached_by_writer == 4
    assert reservation.first_tokens == FIRST and reservation.num_tokens == 10
    assert not decode.receiver.has_open
    blocks, copies = decode.receiver.adopt(reservation)
    assert tuple(blocks) == grant.block_ids and copies == []
    hashes = hash_blocks(list(range(10)), 4, prefix_salt(SPEC, b""))
    assert decode.pool.match_prefix(hashes) == blocks[:2]
    assert decode.receiver.num_live == 0 and decode.pool.num_owned_blocks == 3


def test_arrived_reservations_wait_in_the_order_of_arrival(decode: Decode) -> None:
    opens = [decode.opened(name, num_tokens=10) for name in "abc"]
    for index in (2, 0, 1):
        decode.arrive(*opens[index])
    assert [reservation.spec.request_id for reservation in decode.receiver.arrived] == ["c", "a", "b"]


def test_only_the_full_set_of_rank_pairs_is_an_arrival() -> None:
    decode = Decode(tp_size=2)
    grant, open_id = decode.opened(tp_size=4)
    for source in range(4):
        assert not decode.receiver.arrived
        decode.arrive(grant, open_id, source_rank=source, decode_rank=1 - source // 2)  # no such pair
        decode.arrive(grant, open_id, source_rank=source, decode_rank=source // 2)
        decode.arrive(grant, open_id, source_rank=source, decode_rank=source // 2)
    assert decode.receiver.arrived[0].first_tokens == FIRST
    assert only(decode.said_to_router(), HandoffDone).num_bytes == 3 * SPEC.block_bytes()
    assert decode.receiver.counters.stale_messages == 4
    done = [message for message in decode.said_to_peer() if isinstance(message, KVDone)]
    assert len(done) == 2, "the last one's repetition is answered"


@pytest.mark.parametrize(("num_tokens", "first_tokens"), [(9, FIRST), (10, (ChoiceTokens(3, 0, (SampledToken(1),)),))])
def test_a_wrong_arrival_is_not_adopted(
    decode: Decode, num_tokens: int, first_tokens: tuple[ChoiceTokens, ...]
) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id, num_tokens=num_tokens, first_tokens=first_tokens)
    assert only(decode.said_to_router(), HandoffFailed).blame == "peer"
    assert not decode.receiver.arrived
    assert decode.holds_nothing()  # its one rank said that it writes no more


@pytest.mark.parametrize("how", ["intact", "another sum", "other blocks"])
def test_sums_are_of_the_blocks_that_were_granted(how: str) -> None:
    """Those of others say nothing of what lies in these, though they are right."""
    decode = Decode(checks_bytes=True)
    grant = decode.grant()
    open_id = decode.open(grant, change={"has_checksums": True})
    decode.arrive(
        grant,
        open_id,
        verdict=Verdict.CORRUPT if how == "another sum" else Verdict.INTACT,
        block_ids=grant.block_ids[::-1] if how == "other blocks" else grant.block_ids,
    )
    if how == "intact":
        assert only(decode.said_to_router(), HandoffDone) and decode.receiver.arrived
    else:
        assert only(decode.said_to_router(), HandoffFailed).blame == "checksum"
        assert not decode.receiver.arrived and decode.receiver.counters.checksum_failures == 1


@pytest.mark.parametrize(("are_made", "are_checked"), [(False, True), (True, False)])
def test_sums_that_one_side_has_not_are_not_asked_for(are_made: bool, are_checked: bool) -> None:
    decode = Decode(checks_bytes=are_checked)
    grant = decode.grant()
    decode.arrive(grant, decode.open(grant, change={"has_checksums": are_made}))
    assert only(decode.said_to_router(), HandoffDone) and decode.receiver.arrived


def test_a_drafts_state_that_nobody_can_use_is_refused_and_named(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id, draft=b"hidden")
    failed = only(decode.said_to_router(), HandoffFailed)
    assert failed.blame == "peer"
    assert failed.reason == "6 bytes of a draft's state came from rank 0 of p-0, and no draft runs here"
    assert not decode.receiver.arrived and decode.holds_nothing()


@pytest.mark.parametrize("shards", [((0, 4),), ((0, 1), (1, 4)), ((2, 4), (0, 2))])
def test_the_pairs_are_those_whose_shards_overlap(shards: tuple[tuple[int, int], ...]) -> None:
    """Decode ranks with other shares of the heads than even ones, and a prefill worker of two ranks."""
    decode = Decode(tp_size=len(shards))
    regions = tuple(
        msgspec.structs.replace(region, shard=Shard(0, 2, first, end))
        for region, (first, end) in zip(decode.first_regions, shards, strict=True)
    )
    decode.receiver.rotation.regions = regions
    grant, open_id = decode.opened(tp_size=2)
    pairs = [
        (source, target)
        for source, heads in enumerate(({0, 1}, {2, 3}))
        for target, (first, end) in enumerate(shards)
        if heads & set(range(first, end))
    ]
    for source, target in pairs:
        assert not decode.receiver.arrived
        decode.arrive(grant, open_id, source_rank=source, decode_rank=target)
    assert decode.receiver.arrived


@pytest.mark.parametrize(("clean", "blame"), [(True, "ended"), (False, "link")])
def test_a_close_dooms_and_a_clean_one_ends(decode: Decode, clean: bool, blame: str) -> None:
    grant, open_id = decode.opened()
    decode.close(grant, open_id, clean=clean)
    assert only(decode.said_to_router(), HandoffFailed).blame == blame
    assert decode.receiver.counters.num_failures == 1
    assert decode.holds_nothing() is clean
    decode.close(grant, open_id, clean=clean)
    assert decode.holds_nothing() is clean


def test_a_rank_that_the_writer_has_not_closes_nothing(decode: Decode) -> None:
    decode.close(*decode.opened(), source_rank=1)
    assert decode.said_to_router() == [] and decode.receiver.counters.stale_messages == 1
    assert decode.receiver.reservations.in_state(ReservationState.OPEN)


def test_an_end_is_told_in_the_writers_words_and_answered_where_it_was_told(decode: Decode) -> None:
    grant, open_id = decode.opened()
    closed = KVClosed(grant_id=grant.grant_id, open_id=open_id, source_rank=0, clean=False, reason="no memory")
    decode.receiver.on_message(P, closed)
    assert only(decode.said_to_router(), HandoffFailed).reason == "no memory"
    decode.receiver.on_message("p-0#2", msgspec.structs.replace(closed, clean=True))
    session, done = decode.to_peer[-1]
    assert session == "p-0#2" and isinstance(done, KVDone) and decode.holds_nothing()


def test_a_lost_connection_dooms_the_opens_of_that_session_alone(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.receiver.on_session_lost("p-0#2")
    assert decode.said_to_router() == []
    decode.receiver.on_session_lost(P)
    assert only(decode.said_to_router(), HandoffFailed).blame == "peer"
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.arrive(grant, open_id)
    assert decode.holds_nothing() and not decode.receiver.arrived


def test_an_abort_of_an_open_quarantines_and_says_nothing_to_the_router(decode: Decode) -> None:
    answer = decode.reserve(num_tokens=10, choices=(0, 1))
    assert isinstance(answer, Grant)
    decode.open(answer.grant)
    decode.receiver.abort("a", 0)
    assert decode.said_to_router() == []
    assert isinstance(decode.said_to_peer()[-1], CancelKV)
    assert decode.pool.num_quarantined_blocks == 3  # the copy, which the writer never knew, is free
    assert decode.pool.num_owned_blocks == 0


# --- DOOMED -------------------------------------------------------------------------------------------------------


def test_a_doomed_reservation_ends_with_its_last_rank_and_is_not_published() -> None:
    decode = Decode(tp_size=1)
    grant, open_id = decode.opened(tp_size=2)
    decode.receiver.abort("a", 0)
    decode.close(grant, open_id, source_rank=0, clean=True)
    decode.close(grant, open_id, source_rank=1, clean=False)
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.close(grant, open_id, source_rank=2, clean=True)  # no such rank
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.arrive(grant, open_id, source_rank=1)
    assert decode.holds_nothing() and decode.pool.num_cached_blocks == 0
    assert only(decode.said_to_peer(), KVDone)


def test_an_arrival_under_way_when_it_was_aborted_ends_it(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.receiver.abort("a", 0)
    decode.arrive(grant, open_id)
    assert decode.holds_nothing()


def test_a_renewal_of_a_doomed_one_repeats_the_cancel(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.receiver.abort("a", 0)
    decode.said_to_peer()
    decode.receiver.on_message("p-0#2", KVRenew(opens=((grant.grant_id, open_id),)))
    cancel, renewed = decode.said_to_peer()
    assert isinstance(cancel, CancelKV)
    assert isinstance(renewed, KVRenewed) and renewed.opens == ((grant.grant_id, open_id, 3.0),)


def test_a_renewal_of_what_has_arrived_gets_no_lease(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id)
    decode.said_to_peer()
    decode.receiver.on_message(P, KVRenew(opens=((grant.grant_id, open_id),)))
    assert only(decode.said_to_peer(), KVRenewed).opens == ((grant.grant_id, open_id, 0.0),)


def test_a_quarantine_is_counted_by_its_writer(decode: Decode) -> None:
    decode.opened("a")
    decode.opened("b")
    decode.wait(1.0)
    decode.receiver.abort("a", 0)
    assert decode.receiver.reservations.num_quarantined_blocks == 3
    decode.wait(1.5)
    decode.receiver.abort("b", 0)
    decode.wait(0.5)
    assert decode.receiver.quarantine_s() == decode.receiver.quarantine_s(7) == 2.0
    assert decode.receiver.quarantine_s(8) == 0.0


# --- ARRIVED, ADOPTED ------------------------------------------------------------------------------------------------


def test_an_abort_after_the_arrival_frees(decode: Decode) -> None:
    decode.arrive(*decode.opened())
    decode.receiver.abort("a", 0)
    assert decode.holds_nothing() and not decode.receiver.arrived
    decode.said_to_router()
    for attempt in (0, 1):
        decode.receiver.abort("a", attempt, unless_arrived=True)
    assert [type(message) for message in decode.said_to_router()] == [HandoffDone, HandoffFailed]


@pytest.mark.parametrize("adopted", [False, True])
def test_an_abort_unless_arrived_keeps_what_has_arrived(decode: Decode, adopted: bool) -> None:
    decode.arrive(*decode.opened())
    if adopted:
        decode.receiver.adopt(decode.receiver.arrived[0])
    decode.said_to_router()
    decode.receiver.abort("a", 0, unless_arrived=True)
    assert isinstance(decode.said_to_router()[0], HandoffDone)
    assert decode.pool.num_owned_blocks == 3


@pytest.mark.parametrize("is_open", [False, True])
def test_an_abort_unless_arrived_ends_what_has_not(decode: Decode, is_open: bool) -> None:
    grant = decode.grant()
    if is_open:
        decode.open(grant)
    decode.receiver.abort("a", 0, unless_arrived=True)
    decode.receiver.abort("a", 0, unless_arrived=True)
    answers = decode.said_to_router()
    told = [(answer.blame, answer.worker_id) for answer in answers if isinstance(answer, HandoffFailed)]
    assert told == [("abort", "p-0" if is_open else ""), ("ended", "")]
    assert not decode.receiver.arrived and decode.receiver.reservations.num_granted_blocks == 0


def test_an_abort_of_an_unknown_request_is_answered_where_the_router_is_known(decode: Decode) -> None:
    decode.receiver.abort("x", 0, unless_arrived=True)
    assert decode.said_to_router() == [] and decode.receiver.counters.stale_messages == 1
    decode.receiver.abort("x", 0, unless_arrived=True, router_id=R)
    assert only(decode.said_to_router(), HandoffFailed).blame == "unknown"


def test_an_abort_of_an_older_attempt_changes_nothing(decode: Decode) -> None:
    decode.grant("a", 2)
    decode.receiver.abort("a", 1)
    assert decode.receiver.reservations.num_granted_blocks == 3
    decode.receiver.abort("a", 3)
    assert decode.holds_nothing()


# --- latecomers ------------------------------------------------------------------------------------------------


def test_messages_of_an_ended_open_are_counted_and_a_repeated_arrival_is_answered(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id)
    decode.receiver.adopt(decode.receiver.arrived[0])
    decode.said_to_peer()
    decode.arrive(grant, open_id)
    assert only(decode.said_to_peer(), KVDone).open_id == open_id
    decode.close(grant, open_id)
    decode.receiver.on_message(P, KVRenew(opens=((grant.grant_id, open_id),)))
    assert only(decode.said_to_peer(), KVRenewed).opens == ((grant.grant_id, open_id, 0.0),)
    assert decode.receiver.counters.stale_messages == 3
    assert decode.pool.num_owned_blocks == 3


def test_messages_with_another_open_id_change_nothing(decode: Decode) -> None:
    grant, open_id = decode.opened()
    decode.arrive(grant, open_id + 1)
    decode.close(grant, open_id + 1)
    decode.receiver.on_message(P, KVRenew(opens=((grant.grant_id, open_id + 1),)))
    assert only(decode.said_to_peer(), KVRenewed).opens[0][2] == 0.0
    assert decode.receiver.has_open and decode.receiver.counters.stale_messages == 3


_DRAWN = "granted open, granted released, open arrived, open doomed, arrived adopted, arrived released"
_EDGES = {tuple(edge.split()) for edge in f"{_DRAWN}, adopted released, doomed released".split(", ")}


def test_of_opens_that_are_over_the_last_ones_are_remembered(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reservations, "_MAX_REMEMBERED", 2)
    books = decode.receiver.reservations
    for open_id in (1, 2, 1, 3):
        books.remember_open(open_id, P)
    assert [books.session_of_ended(open_id) for open_id in (1, 2, 3)] == [P, None, P]


@pytest.mark.parametrize("state", ReservationState)
@pytest.mark.parametrize("to", ReservationState)
def test_only_the_drawn_edges_exist(decode: Decode, state: ReservationState, to: ReservationState) -> None:
    decode.grant()
    reservation = next(iter(decode.receiver.reservations.live.values()))
    assert isinstance(reservation, Reservation)
    reservation.state = state
    if (state.value, to.value) in _EDGES:
        reservation.advance(to, 0.0)
        assert reservation.state is to
    else:
        with pytest.raises(InvalidTransition, match=f"{state.value} to {to.value}"):
            reservation.advance(to, 0.0)


def test_what_comes_thin_is_promised_the_memory_that_it_takes() -> None:
    """A window of one layer of two: of ten blocks seven come thin, two to a whole one's memory."""
    spec = msgspec.structs.replace(SPEC, windows=(0, 7))
    plain, shared = Decode(28), Decode(28, spec=spec)
    granted = [shared.reserve(name, num_tokens=40, first=first) for name, first in (("a", 0), ("b", 50))]
    for answer in granted:
        assert isinstance(answer, Grant)
        ids = answer.grant.block_ids
        assert [shared.pool.is_thin(block) for block in ids] == 7 * [True] + 3 * [False]
        assert are_ids(spec, ids, 64, 7) and check_grant(Endpoint(spec, "0.1.0", "local", 1), answer.grant) is None
    assert shared.pool.num_free_blocks == 28 - 2 * 3 - 7, "the odd one of the first shares a frame with the second's"
    assert shared.receiver.reservations.num_granted_blocks == 2 * (3 + 4)
    assert isinstance(plain.reserve("a", num_tokens=40), Grant)
    assert _refused(plain.reserve("b", num_tokens=40, first=50)) == "growth"
    assert _refused(shared.reserve("c", num_tokens=40, first=100)) == "growth"


def test_growth_is_weighed_against_the_memory_that_thin_blocks_take() -> None:
    decode = Decode(10, spec=msgspec.structs.replace(SPEC, windows=(0, 7)))
    assert _refused(decode.reserve(num_tokens=40, growth_reserve=4)) == "growth"
    assert isinstance(decode.reserve(num_tokens=40, growth_reserve=3), Grant)


def test_thin_blocks_of_a_doomed_grant_are_in_quarantine_one_by_one() -> None:
    decode = Decode(28, spec=msgspec.structs.replace(SPEC, windows=(0, 7)))
    grant = decode.grant("a", num_tokens=40)
    decode.open(grant, change={"spec": grant.spec})
    other = decode.grant("b", num_tokens=40, first=50)
    decode.clock.advance(1000.0)
    decode.receiver.tick()
    assert decode.receiver.reservations.num_quarantined_blocks == 3 + 4
    assert decode.pool.num_quarantined_blocks == len(grant.block_ids) == len(other.block_ids)
    assert decode.pool.num_free_blocks == 28 - 3 - 4
    decode.receiver.check()


def test_a_doomed_grant_with_hits_has_in_quarantine_what_was_to_come_alone() -> None:
    decode = Decode(28, spec=msgspec.structs.replace(SPEC, windows=(0, 7)))
    grant = decode.grant("a", num_tokens=40)
    decode.arrive(grant, decode.open(grant, change={"spec": grant.spec}))
    assert only(decode.said_to_router(), HandoffDone).num_bytes == grant.spec.block_bytes() * (3 + 7 / 2)
    blocks, _ = decode.receiver.adopt(decode.receiver.arrived[0])
    assert decode.pool.match_prefix(hash_blocks(list(range(40)), 4, prefix_salt(grant.spec, b""))) == []
    decode.pool.free(blocks)
    longer = decode.grant("b", num_tokens=60)  # ten blocks are here; of five that are not three come thin
    assert (longer.num_computed_tokens, len(longer.block_ids)) == (40, 5)
    assert decode.receiver.reservations.num_granted_blocks == 2 + 2
    decode.open(longer, change={"spec": grant.spec})
    decode.wait(1000.0)
    assert decode.receiver.reservations.num_quarantined_blocks == 2 + 2
    assert decode.pool.num_quarantined_blocks == 5 and decode.pool.num_owned_blocks == 0
    assert decode.receiver.reservations.in_state(ReservationState.DOOMED)[0].hit_blocks == []
