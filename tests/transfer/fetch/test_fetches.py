"""Prefixes are read from elsewhere, or not, and nothing that was not asked for is ever found in the cache."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from structlog.testing import capture_logs

from kvferry.common.errors import InvalidTransition
from kvferry.common.kv_spec import Shard
from kvferry.kvcache.thin import twin
from kvferry.transfer.backends.local import LocalFault
from kvferry.transfer.fetch import fetch as fetch_module
from kvferry.transfer.fetch import reader
from kvferry.transfer.fetch.fetch import FetchFailure, FetchState
from kvferry.transfer.fetch.lending import HASH_BYTES
from kvferry.wire.fetches import KVFetch, KVFetchable, KVFetchDone, KVFetchRefused

from .fetch_hosts import HASHES, LEASE_S, SPEC, Pair


@pytest.fixture(params=[False, True], ids=["unchecked", "checksums"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(checksums=request.param)


def _num_held(pair: Pair, count: int) -> int:
    return len(pair.fetcher.pool.match_prefix(HASHES[:count]))


def test_what_lies_elsewhere_is_found_here_afterwards(pair: Pair) -> None:
    pair.lender.store(HASHES[:3])
    assert pair.begin(HASHES[:3])
    pair.settle()
    assert pair.ended == ["q"]
    assert _num_held(pair, 3) == 3
    pair.check()
    assert (pair.fetches.num_fetches, pair.fetches.num_failures) == (1, 0)
    assert pair.fetches.num_bytes == 3 * SPEC.block_bytes()
    assert not len(pair.fetches) and not len(pair.lending)
    assert pair.lender.pool.num_owned_blocks == pair.fetcher.pool.num_owned_blocks == 0


def test_only_what_is_missing_and_lies_there_is_asked_for(pair: Pair) -> None:
    pair.lender.store(HASHES[:4])
    pair.fetcher.store(HASHES[:2])
    assert pair.begin(HASHES[:6], num_blocks=4)
    question = pair.to_lender[0]
    assert isinstance(question, KVFetch)
    assert question.hashes == b"".join(HASHES[2:4])
    for num_owned in (2, 4):
        assert pair.fetcher.pool.num_owned_blocks == num_owned, "what is here stays here meanwhile"
        assert sum(map(len, pair.fetches.references())) == num_owned
        pair.deliver(to_lender=True)
        pair.deliver(to_lender=False)
    pair.settle()
    assert _num_held(pair, 4) == 4 and pair.fetches.num_failures == 0


def test_what_has_come_meanwhile_is_not_asked_for() -> None:
    pair = Pair(num_blocks=24, part_blocks=2)
    pair.lender.store(HASHES[:4])
    pair.begin(HASHES[:4])
    pair.fetcher.store(HASHES[2:3])
    pair.settle()
    assert _num_held(pair, 4) == 4 and pair.lending.num_lent_blocks == 3


def test_what_lies_in_a_lower_tier_is_not_asked_for(pair: Pair) -> None:
    pair.fetches._also_held = lambda name: name == HASHES[1]
    pair.lender.store(HASHES[:3])
    pair.fetcher.store(HASHES[:1])
    assert pair.begin(HASHES[:3])
    question = pair.to_lender[0]
    assert isinstance(question, KVFetch) and question.hashes == HASHES[2]
    assert pair.fetcher.pool.num_owned_blocks == 1
    pair.settle()
    assert pair.fetcher.pool.match_prefix(HASHES[2:3]) and _num_held(pair, 3) == 1
    assert pair.fetcher.pool.num_owned_blocks == 0


def test_nothing_is_begun_where_nothing_is_missing_or_nothing_has_room(pair: Pair) -> None:
    pair.fetcher.store(HASHES[:2])
    assert not pair.begin(HASHES[:2])
    assert pair.fetcher.pool.num_owned_blocks == 0
    pair.fetcher.pool.allocate(pair.fetcher.pool.num_free_blocks)
    assert not pair.begin(HASHES[:3])
    pair.fetches._reserve = lambda: 1
    assert not pair.begin(HASHES[:3])
    assert not pair.to_lender and not pair.ended
    assert not pair.fetches.references()


@pytest.mark.parametrize("part_blocks", [0, 2])
def test_a_long_prefix_comes_in_parts(part_blocks: int) -> None:
    pair = Pair(num_blocks=24, part_blocks=part_blocks)
    pair.lender.store(HASHES[:5])
    pair.begin(HASHES[:5])
    pair.settle()
    assert _num_held(pair, 5) == 5
    assert pair.ended == ["q"] and pair.fetches.num_failures == 0


@pytest.mark.parametrize(("most", "expected"), [(4096, [1, 2, 3]), (2, [1, 2, 2, 1])])
def test_each_part_is_twice_as_large_as_the_one_before_up_to_a_bound(
    most: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.transfer.fetch.fetches.MAX_PART_BLOCKS", most)
    pair, sizes = Pair(num_blocks=24, part_blocks=1), list[int]()
    lend = pair.lending.on_message

    def on_message(session: str, message: KVFetch | KVFetchDone) -> None:
        if isinstance(message, KVFetch):
            sizes.append(len(message.hashes) // HASH_BYTES)
        lend(session, message)

    monkeypatch.setattr(pair.lending, "on_message", on_message)
    pair.lender.store(HASHES[:6])
    pair.begin(HASHES[:6])
    pair.settle()
    assert sizes == expected and _num_held(pair, 6) == 6


def test_what_is_here_of_a_prefix_stays_when_the_rest_fails() -> None:
    pair = Pair(num_blocks=24, part_blocks=2)
    pair.lender.store(HASHES[:3])  # and no more
    pair.begin(HASHES[:5])
    pair.settle()
    assert pair.ended == ["q"]
    assert _num_held(pair, 5) == 3
    assert pair.fetches.num_failures == 1
    assert pair.fetches.failures == {FetchFailure.EVICTED: 1}
    assert pair.fetches.num_bytes == 3 * SPEC.block_bytes()


def test_what_is_here_of_a_prefix_stays_when_the_rest_has_no_room() -> None:
    pair = Pair(num_blocks=24, part_blocks=2)
    pair.lender.store(HASHES[:5])
    pair.begin(HASHES[:5])
    pair.deliver(to_lender=True)
    pair.deliver(to_lender=False)
    pair.fetcher.pool.allocate(pair.fetcher.pool.num_free_blocks)
    pair.settle()
    assert pair.ended == ["q"] and _num_held(pair, 5) == 2
    assert pair.fetches.failures == {FetchFailure.NO_ROOM: 1}
    assert not pair.fetches.references() and not len(pair.lending)


@pytest.mark.parametrize(("num_free", "reserve", "fits"), [(2, 0, True), (1, 0, False), (2, 1, False)])
def test_an_answer_for_which_there_is_no_room_any_more_brings_nothing(
    pair: Pair, num_free: int, reserve: int, fits: bool
) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.fetcher.pool.allocate(pair.fetcher.pool.num_free_blocks - num_free)
    pair.fetches._reserve = lambda: reserve
    pair.settle()
    assert pair.ended == ["q"] and not pair.fetches.references()
    assert pair.fetches.failures == ({} if fits else {FetchFailure.NO_ROOM: 1})


def test_what_the_lender_has_evicted_is_refused(pair: Pair) -> None:
    assert pair.begin(HASHES[:3])
    pair.deliver(to_lender=True)
    refused = pair.to_fetcher[0]
    assert isinstance(refused, KVFetchRefused) and refused.reason == "gone"
    pair.settle()
    assert pair.ended == ["q"] and pair.fetches.num_failures == 1
    assert pair.fetches.failures == {FetchFailure.REFUSED: 1}
    assert not pair.fetches.references()


def test_lent_blocks_are_not_evicted_while_the_lease_lasts(pair: Pair) -> None:
    blocks = pair.lender.store(HASHES[:3])
    pair.begin(HASHES[:3])
    pair.deliver(to_lender=True)
    assert all(pair.lender.pool.ref_count(block) == 1 for block in blocks)
    assert pair.lender.pool.num_free_blocks == 9
    pair.cut()  # the reader may read on: only time ends it
    pair.advance(LEASE_S - 0.01)
    pair.tick()
    assert len(pair.lending) == 1
    lent = next(iter(pair.lending._leases))
    pair.advance(0.02)
    pair.tick()
    assert not len(pair.lending) and pair.lender.pool.num_owned_blocks == 0
    pair.lending.on_sums(0, lent, b"late")
    assert not pair.to_fetcher


def test_more_than_a_share_of_the_pool_is_lent_one_share_after_the_other(pair: Pair) -> None:
    pair.lender.store(HASHES[:4])
    pair.begin(HASHES[:4])
    pair.deliver(to_lender=True)
    answer = pair.to_fetcher[0]
    assert isinstance(answer, KVFetchable) and len(answer.block_ids) == 3
    pair.settle()
    assert pair.ended == ["q"] and pair.fetches.num_failures == 0
    assert _num_held(pair, 4) == 4
    assert not len(pair.lending) and pair.lender.pool.num_owned_blocks == 0
    pair.check()


def test_where_a_share_of_the_pool_is_lent_already_nothing_is(pair: Pair) -> None:
    pair.lender.store(HASHES[:4])
    pair.begin(HASHES[:3])
    pair.deliver(to_lender=True)
    pair.to_fetcher.clear()
    pair.begin(HASHES[3:4], key="r")
    pair.deliver(to_lender=True)
    refused = pair.to_fetcher[-1]
    assert isinstance(refused, KVFetchRefused) and refused.reason == "full"


@pytest.mark.parametrize(
    ("is_held", "reserve", "lent"),
    [(False, 9, 3), (False, 10, 2), (False, 12, 0), (False, 13, 0), (True, 9, 3), (True, 10, 0)],
)
def test_no_more_is_lent_than_leaves_the_lender_what_it_needs(is_held: bool, reserve: int, lent: int) -> None:
    pair = Pair()
    pair.lending._reserve = lambda: reserve
    pair.lender.store(HASHES[:3], keep=is_held)
    pair.begin(HASHES[:3])
    pair.deliver(to_lender=True)
    assert pair.lending.num_lent_blocks == lent


@pytest.mark.parametrize("is_lifted", [False, True])
def test_a_question_that_is_asked_again_is_answered_once(is_lifted: bool) -> None:
    pair, lifts = Pair(), list[Callable[[], None]]()

    def lift(hashes: list[bytes], num_thin: int, done: Callable[[], None]) -> bool:
        lifts.append(done)
        assert (hashes, num_thin) == (HASHES[:3], 0), "no more than may be lent"
        return is_lifted

    pair.lending._lift = lift
    pair.lender.store(HASHES[:4])
    pair.begin(HASHES[:4])
    for _ in range(2):
        pair.lending.on_message("s", pair.to_lender[0])  # type: ignore[arg-type]
    assert len(lifts) == 1 + is_lifted and len(pair.to_fetcher) == (not is_lifted)
    for done in lifts:
        done()
    assert len(pair.to_fetcher) == len(pair.lending) == 1 and pair.lending.num_lent_blocks == 3
    pair.advance(LEASE_S)
    pair.tick()
    assert not len(pair.lending) and pair.lender.pool.num_owned_blocks == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "2"}, "kvferry 1 here, 2 there"),
        ({"transport": "ucx"}, "transport"),
        ({"tp_size": 2}, "1 tensor-parallel ranks here, 2 there"),
    ],
)
def test_who_does_not_fit_is_told_why_and_nothing_is_lifted(change: dict[str, object], words: str) -> None:
    pair = Pair(spec=msgspec.structs.replace(SPEC, num_kv_heads=2))
    pair.lending._lift = lambda hashes, num_thin, done: bool(hashes)
    pair.lender.store(HASHES[:1])
    pair.begin(HASHES[:1])
    question = msgspec.structs.replace(pair.to_lender[0], **change)
    pair.lending.on_message("s", question)  # type: ignore[arg-type]
    refused = pair.to_fetcher.pop()
    assert isinstance(refused, KVFetchRefused) and words in refused.reason and not len(pair.lending)


def test_a_lease_that_is_over_before_the_read_has_ended_brings_nothing(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.network.set_fault(pair.lender.region.agent, LocalFault.HOLD)
    pair.deliver(to_lender=False)
    pair.reader.step()
    pair.advance(LEASE_S)
    pair.lending.tick()
    pair.lender.store(HASHES[5:17])  # everything there is another's now
    pair.network.clear_fault(pair.lender.region.agent)
    pair.settle()
    assert pair.ended == ["q"] and pair.fetches.num_failures == 1
    assert set(pair.fetches.failures) <= {FetchFailure.LEASE_OVER, FetchFailure.READ_FAILED}
    assert _num_held(pair, 2) == 0
    assert pair.fetcher.pool.num_owned_blocks == 0
    pair.check()


def test_the_lease_counts_from_the_question_and_not_from_the_answer(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.advance(1.0)
    pair.deliver(to_lender=True)
    pair.advance(LEASE_S - 1.0)  # the lender still has 1 s
    pair.settle()
    assert pair.fetches.num_failures == 1
    assert pair.fetches.failures == {FetchFailure.LEASE_OVER: 1} and pair.reader.num_bytes == 0


def test_an_answer_that_does_not_come_is_not_waited_for(pair: Pair) -> None:
    pair.begin(HASHES[:2], within_s=2.0)
    pair.advance(0.9)
    pair.tick()
    assert not pair.ended
    pair.advance(0.1)  # the other half is for reading
    pair.tick()
    assert pair.fetches.failures == {FetchFailure.NO_ANSWER: 1} and pair.fetches.seconds == pytest.approx(1.0)
    assert pair.ended == ["q"] and not pair.fetches.references()
    pair.lender.store(HASHES[:2])
    pair.settle()  # the question and its end arrive after all
    assert not len(pair.lending)


def test_a_prompt_waits_for_no_longer_than_the_router_said(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.network.set_fault(pair.lender.region.agent, LocalFault.HOLD)
    pair.begin(HASHES[:2], within_s=0.2)
    pair.settle()
    pair.advance(0.2)
    pair.tick()
    assert pair.ended == ["q"]


def test_blocks_of_a_read_that_was_given_up_stay_out_of_use_until_it_ends(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.network.set_fault(pair.lender.region.agent, LocalFault.HOLD)
    pair.begin(HASHES[:2], within_s=0.2)
    pair.settle()
    pair.advance(0.3)
    pair.tick()
    pair.settle()
    assert pair.ended == ["q"]
    assert pair.fetches.given_up.num_blocks == pair.fetcher.pool.num_owned_blocks == 2
    assert len(pair.fetches) == 1
    pair.fetcher.store(HASHES[5:15])  # all that is left
    pair.network.clear_fault(pair.lender.region.agent)  # it lands
    pair.settle()
    assert pair.fetcher.pool.num_owned_blocks == 0
    pair.check()


def test_blocks_of_a_failed_read_stay_out_of_use_until_our_agent_is_replaced(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.network.set_fault(pair.lender.region.agent, LocalFault.FAIL)
    pair.begin(HASHES[:2])
    pair.settle()
    assert pair.ended == ["q"] and pair.fetches.given_up.num_blocks == 2
    assert not pair.reader.wants_new_agent(pair.fetcher.clock.now())
    pair.advance(reader.FAILED_AFTER_S)
    assert pair.reader.wants_new_agent(pair.fetcher.clock.now())
    pair.fetcher.rotate()
    pair.reader.agent_replaced(pair.fetcher.clock.now())
    pair.settle()
    assert not pair.fetches.references() and not pair.reader.num_unfinished
    pair.fetcher.store(HASHES[3:15])
    pair.network.clear_fault(pair.lender.region.agent)
    pair.check()


def test_a_lender_that_is_gone_is_an_ordinary_failure(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.lender.backend.close()
    pair.settle()
    assert pair.ended == ["q"] and not pair.fetches.references()
    assert _num_held(pair, 2) == 0


def test_a_broken_connection_ends_the_fetches_from_there(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.deliver(to_lender=False)
    pair.fetches.on_peer_lost("another:1")
    assert not pair.ended
    pair.cut()
    pair.settle()
    assert pair.ended == ["q"] and not pair.fetches.references()


def test_other_bytes_than_the_lender_has_are_found_by_their_checksum() -> None:
    pair = Pair(checksums=True)
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)  # pinned, and summed
    pair.lender.pages[1, pair.lender.pool.match_prefix(HASHES[:1])[0], 0, 0, 0, 0] += 1
    pair.settle()
    assert pair.fetches.num_failures == 1 and _num_held(pair, 2) == 0
    assert pair.fetches.failures == {FetchFailure.OTHER_SUMS: 1}
    assert pair.fetcher.pool.num_owned_blocks == 0


def test_checksums_that_are_required_and_not_made_refuse_the_fetch() -> None:
    pair = Pair()
    pair.lending._needs_checksums = True
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.settle()
    assert pair.fetches.num_failures == 1
    pair.lending._needs_checksums, pair.fetches._needs_checksums = False, True
    pair.begin(HASHES[:2])
    pair.settle()
    assert pair.fetches.num_failures == 2 and _num_held(pair, 2) == 0
    assert pair.fetches.failures == {FetchFailure.REFUSED: 1, FetchFailure.MISFIT: 1}
    pair = Pair(checksums=True)
    pair.lending._needs_checksums = pair.fetches._needs_checksums = True
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.settle()
    assert pair.fetches.num_failures == 0 and _num_held(pair, 2) == 2


@pytest.mark.parametrize("side", ["lender", "fetcher"])
def test_without_checksums_on_one_side_nothing_is_summed(side: str) -> None:
    pair = Pair(checksums=True)
    if side == "lender":
        pair.lending._sum_blocks = None
    else:
        pair.fetches._has_checksums = False
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    [answer] = pair.to_fetcher
    assert isinstance(answer, KVFetchable) and not answer.has_checksums
    pair.settle()
    assert pair.fetches.num_failures == 0 and _num_held(pair, 2) == 2


def test_a_cancelled_prompt_is_not_called_and_its_blocks_come_back(pair: Pair) -> None:
    pair.lender.store(HASHES[:2])
    pair.begin(HASHES[:2])
    pair.deliver(to_lender=True)
    pair.deliver(to_lender=False)
    pair.fetches.cancel("q")
    pair.fetches.cancel("q")
    assert pair.fetches.given_up.num_blocks == 2
    pair.settle()
    assert not pair.ended and not pair.fetches.references() and not len(pair.lending)


def test_a_prompt_that_comes_again_begins_anew(pair: Pair) -> None:
    """A decode worker does not cancel what an attempt that has ended was waiting for."""
    pair.lender.store(HASHES[:2])
    for _ in range(2):
        assert pair.begin(HASHES[:2])
    assert len(pair.fetches) == 1
    pair.settle()
    assert pair.ended == ["q"] and _num_held(pair, 2) == 2
    assert not len(pair.fetches) and not pair.fetches.references()


def test_answers_that_no_lender_gives_are_refused(pair: Pair) -> None:
    pair.lender.store(HASHES[:3])
    region = pair.lender.region
    for answer in (
        {"block_ids": (1, 1)},
        {"block_ids": (0, 99)},
        {"block_ids": (0, 1, 2, 3)},
        {"block_ids": ()},
        {"ranks": ()},
        {"ranks": (region, region)},
        {"ranks": (msgspec.structs.replace(region, shard=Shard(0, 1, 0, 1)),)},
        {"ranks": (msgspec.structs.replace(region, num_blocks=2**40),)},
        {"ranks": (msgspec.structs.replace(region, page_bytes=7),)},
        {"ranks": (msgspec.structs.replace(region, transport="ucx"),)},
    ):
        pair.begin(HASHES[:3])
        question = pair.to_lender.popleft()
        assert isinstance(question, KVFetch)
        fields = {"block_ids": (0, 1, 2), "ranks": (region,)} | answer
        pair.fetches.on_message(KVFetchable(fetch_id=question.fetch_id, lease_s=LEASE_S, **fields))  # type: ignore[arg-type]
        assert pair.ended.pop() == "q"
        assert isinstance(pair.to_lender.popleft(), KVFetchDone)
        assert not pair.fetches.references()


def test_two_prompts_fetch_the_same_prefix_and_one_copy_stays(pair: Pair) -> None:
    pair.lender.store(HASHES[:1])
    pair.begin(HASHES[:1], "one")
    pair.begin(HASHES[:1], "two")
    pair.settle()
    assert sorted(pair.ended) == ["one", "two"]
    assert pair.fetcher.pool.num_cached_blocks == 1
    assert pair.fetcher.pool.num_owned_blocks == 0
    pair.check()


def test_a_failure_is_told_once_for_each_lender_and_reason(pair: Pair) -> None:
    with capture_logs() as logs:
        for _ in range(3):
            pair.begin(HASHES[:2])  # nothing is there
            pair.settle()
    told = [entry for entry in logs if entry["event"] == "prefix_fetch_failed"]
    assert [entry["log_level"] for entry in told] == ["warning", "debug", "debug"]
    assert {(entry["reason"], entry["detail"]) for entry in told} == {("refused", "gone")}
    assert pair.fetches.failures == {FetchFailure.REFUSED: 3}


def test_a_fetch_moves_along_its_states_alone(pair: Pair) -> None:
    pair.begin(HASHES[:2])
    fetch = next(iter(pair.fetches._fetches.values()))
    for state in FetchState:
        for to in FetchState:
            fetch.state = state
            if to in fetch_module._NEXT[state]:
                fetch.advance(to)
                assert fetch.state is to
            else:
                with pytest.raises(InvalidTransition):
                    fetch.advance(to)


@pytest.mark.parametrize(
    ("state", "deadline", "after_s", "failure"),
    [
        (FetchState.ASKING, None, 4.9, None),
        (FetchState.ASKING, None, 5.0, FetchFailure.NO_ANSWER),
        (FetchState.READING, 108.0, 7.9, None),
        (FetchState.READING, 108.0, 8.0, FetchFailure.LEASE_OVER),
        (FetchState.READING, 120.0, 10.0, FetchFailure.LATE),
        (FetchState.CHECKING, 108.0, 9.9, None),
        (FetchState.CHECKING, 108.0, 10.0, FetchFailure.LATE),
    ],
)
def test_each_state_has_its_time(
    pair: Pair, state: FetchState, deadline: float | None, after_s: float, failure: FetchFailure | None
) -> None:
    pair.begin(HASHES[:2], within_s=10.0)
    [fetch] = pair.fetches._fetches.values()
    assert fetch.part is not None
    fetch.state, fetch.part.deadline = state, deadline
    assert fetch.failure_at(100.0 + after_s) is failure


WINDOWED = msgspec.structs.replace(SPEC, windows=(0, 6))  # of five blocks no window reaches three


@pytest.mark.parametrize("checksums", [False, True])
@pytest.mark.parametrize(("num_blocks", "part_blocks"), [(24, 1), (24, 8), (8, 8)])  # of eight, two are lent at once
def test_what_no_window_reaches_is_not_read(checksums: bool, num_blocks: int, part_blocks: int) -> None:
    pair = Pair(num_blocks=num_blocks, checksums=checksums, part_blocks=part_blocks, spec=WINDOWED)
    pair.lender.store(HASHES[:5])
    assert pair.begin(HASHES[:5])
    pair.settle()
    pool = pair.fetcher.pool
    blocks = pool.match_prefix([*map(twin, HASHES[:3]), *HASHES[3:5]])
    assert pool.num_cached_blocks == 5 and pair.fetches.num_failures == 0
    assert not pair.fetcher.pages[1, blocks[:3]].any() and pair.fetcher.pages[1, blocks[3:]].all()
    assert pair.fetches.num_bytes == pair.reader.num_bytes == (5 * 2 - 3) * SPEC.page_bytes()
    pair.check()


@pytest.mark.parametrize(("num_thin", "num_lent"), [(3, 5), (4, 3)])
def test_thin_blocks_are_lent_where_they_will_do(num_thin: int, num_lent: int) -> None:
    pair = Pair(num_blocks=24, spec=WINDOWED)
    for block, block_hash in zip(pair.lender.store(HASHES[:5], keep=True), HASHES[:num_thin], strict=False):
        pair.lender.pool.forget(block)
        pair.lender.pool.publish(block, twin(block_hash))
    assert pair.begin(HASHES[:5])
    pair.settle()
    assert pair.fetcher.pool.num_cached_blocks == num_lent
    assert pair.fetches.failures[FetchFailure.EVICTED] == (num_lent < 5)


def test_thin_blocks_need_not_be_fetched_where_they_will_do() -> None:
    pair = Pair(num_blocks=24, spec=WINDOWED)
    pair.lender.store(HASHES[:5])
    [first, second] = pair.fetcher.pool.allocate(2)
    pair.fetcher.pool.publish(first, twin(HASHES[0]))
    pair.fetcher.pool.publish(second, twin(HASHES[3]))
    pair.fetcher.fill(first, HASHES[0])
    pair.fetcher.fill(second, HASHES[3])
    pair.fetcher.pool.free([first, second])
    assert pair.begin(HASHES[:5])
    question = pair.to_lender[0]
    assert isinstance(question, KVFetch)
    assert (question.hashes, question.num_thin) == (b"".join(HASHES[1:5]), 2), "of the fourth block windows read"
    pair.settle()
    assert pair.fetcher.pool.num_cached_blocks == 6
