"""A call of rank 0 is made on every rank, with the same arguments, in the same lane; nothing else can be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.common.batch import GpuEvent
from kvferry.common.errors import ProtocolError
from kvferry.common.kv_spec import KVCacheSpec, Shard
from kvferry.common.request import SampledToken
from kvferry.transfer.protocol.rank_calls import Each, Gather, Lane, OwnCalls, RankCalls
from kvferry.transfer.send.plan import ShipPlan
from kvferry.transfer.send.ranks import SENDING
from kvferry.wire.grants import GrantId, GrantInfo, RegionInfo
from kvferry.wire.handoff import CancelKV, KVDone, KVOpened, KVRefused, KVRenewed
from kvferry.wire.results import ChoiceTokens
from kvferry.worker.decode_rank import RECEIVING

Few = Annotated[tuple[int, ...], msgspec.Meta(max_length=3)]


class _Thread:
    """Notes how it was asked, and does it at once."""

    def __init__(self) -> None:
        self.lanes: list[str] = []

    def call(self, function: Callable[..., None], *args: object) -> None:
        self.lanes.append("call")
        function(*args)

    def call_after(self, event: GpuEvent | None, function: Callable[..., None], *args: object) -> None:
        assert event is None
        self.lanes.append("call_after")
        function(*args)


class _Rank:
    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def add(self, number: int, blocks: Few) -> None:
        self.made.append(("add", number, blocks))

    def end(self, reason: str) -> None:
        self.made.append(("end", reason))

    def step(self) -> None:
        self.made.append(("step",))

    def secret(self, path: str) -> None:
        raise AssertionError("it is in no list")


CALLS = RankCalls({_Rank.add: Lane.THREAD, _Rank.end: Lane.BEHIND_PAGES, _Rank.step: Lane.AT_ONCE})


class _Ranks:
    """Rank 0 and two others, whose sockets are function calls."""

    def __init__(self) -> None:
        self.threads, self.ranks = [_Thread() for _ in range(3)], [_Rank() for _ in range(3)]
        self.others = [OwnCalls(CALLS, self.threads[number], self.ranks[number]) for number in (1, 2)]
        self.each = Each(CALLS, self.threads[0], self._broadcast)

    def _broadcast(self, payload: bytes) -> None:
        for other in self.others:
            other.run(payload)


def test_every_rank_makes_the_call_in_its_lane() -> None:
    group = _Ranks()
    group.each(group.ranks[0].add, 7, (1, 2))
    group.each(group.ranks[0].end, "over")
    group.each(group.ranks[0].step)
    for rank, thread in zip(group.ranks, group.threads, strict=True):
        assert rank.made == [("add", 7, (1, 2)), ("end", "over"), ("step",)]
        assert thread.lanes == ["call", "call_after"]


def test_a_rank_without_others_tells_nobody() -> None:
    rank, thread = _Rank(), _Thread()
    Each(CALLS, thread, None)(rank.add, 7, (1, 2, 3, 4))
    assert rank.made == [("add", 7, (1, 2, 3, 4))]


def test_what_is_not_in_the_list_is_called_nowhere() -> None:
    group = _Ranks()
    with pytest.raises(KeyError, match="secret"):
        group.each(group.ranks[0].secret, "/etc/passwd")
    for payload in (["secret", "x"], ["__init__"], ["made"], ["step", 1], ["add", 1], ["add", "1", []], ["end", 7], []):
        with pytest.raises(ProtocolError):
            group.others[0].run(msgspec.msgpack.encode(payload))
    assert not any(rank.made for rank in group.ranks)


def test_bounds_of_a_signature_are_those_of_its_message() -> None:
    group = _Ranks()
    group.others[0].run(msgspec.msgpack.encode(["add", 1, [1, 2, 3]]))
    with pytest.raises(ProtocolError):
        group.others[0].run(msgspec.msgpack.encode(["add", 1, [1, 2, 3, 4]]))


@given(st.binary(max_size=64))
def test_no_bytes_raise_anything_else(payload: bytes) -> None:
    for calls in (CALLS, SENDING, RECEIVING):
        with pytest.raises(ProtocolError):
            calls.decode(payload)


def test_a_list_has_each_name_once_and_a_rank_all_of_its_methods() -> None:
    class Other:
        def add(self) -> None: ...

    with pytest.raises(AssertionError, match="two methods of one name"):
        RankCalls({_Rank.add: Lane.THREAD, Other.add: Lane.THREAD})
    with pytest.raises(AssertionError):
        OwnCalls(CALLS, _Thread(), Other())


SPEC = KVCacheSpec(model="m", num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
GRANT_ID = GrantId("d-0", 7, 1)
REGION = RegionInfo(
    rank=0,
    tp_size=1,
    agent="d-0.7.1.0",
    generation=1,
    agent_metadata=b"metadata",
    base_addr=1 << 40,
    num_blocks=64,
    page_bytes=4096,
    device="DRAM",
    device_id=0,
    transport="nixl",
    shard=Shard(0, 2, 0, 2),
)
GRANT = GrantInfo(
    grant_id=GRANT_ID,
    spec=SPEC,
    kv_address="127.0.0.1:1",
    block_ids=(1, 2),
    num_tokens=40,
    num_computed_tokens=16,
    ranks=(REGION,),
    open_within_s=2.0,
    mac=b"m" * 32,
)
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "open": [(2**63 - 1, "r-1", 3, GRANT)],
    "finish": [(5, (), 0), (5, (ChoiceTokens(0, 0, (SampledToken(7, -0.5, ((7, -0.5),)),), "stop"),), 64)],
    "cancel": [(5, "aborted")],
    "on_message": [
        (KVOpened(grant_id=GRANT_ID, open_id=5, lease_s=3.0, generation=2, ranks=(REGION,)),),
        (KVRefused(grant_id=GRANT_ID, open_id=5, reason="gone"),),
        (KVRenewed(opens=((GRANT_ID, 5, 3.0),)),),
        (CancelKV(grant_id=GRANT_ID, open_id=5),),
        (KVDone(grant_id=GRANT_ID, open_id=5),),
    ],
    "on_peer_lost": [("127.0.0.1:1",)],
    "begin": [(5, "127.0.0.1:1", (REGION,), (1, 2), (3, 4), 1, True)],
    "give_up": [(5,)],
    "begin_step": [([],), ([ShipPlan(5, (1, 2), (3, 4), last=True), ShipPlan(6, (), (), all_layers=True)],)],
    "watch": [(True,), (False,)],
    "rotate": [(3,)],
    "sum_blocks": [(5, (1, 2, 3), 2)],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_listed_call_crosses_whole(name: str) -> None:
    calls = SENDING if name in SENDING.by_name else RECEIVING
    for args in SAMPLES[name]:
        payloads: list[bytes] = []

        def method(*args: object) -> None: ...

        method.__name__ = name
        Each(calls, _Thread(), payloads.append)(method, *args)
        assert calls.decode(payloads[0]) == (name, args)


def test_there_is_a_sample_of_every_listed_call() -> None:
    assert SAMPLES.keys() == SENDING.by_name.keys() | RECEIVING.by_name.keys()
    assert not SENDING.by_name.keys() & RECEIVING.by_name.keys()


def test_answers_are_whole_with_the_last_rank_and_keys_do_not_mix() -> None:
    gather: Gather[str] = Gather(2)
    assert gather.add(1, "a") is None and gather.add(2, "b") is None
    assert gather.add(2, "c") == ["b", "c"]
    assert gather.add(1, "d") == ["a", "d"]
    assert gather.add(1, "e") is None  # anew
    assert Gather[int](1).add("key", 3) == [3]
