"""What a world is made of, and what it tells when it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvferry.decode.role import DecodeRole
from kvferry.kvcache.blocks import BlockPool
from kvferry.prefill.role import PrefillRole
from kvferry.router.dispatch.dispatcher import Dispatcher
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.send.sender import KVSender
from kvferry.worker.roles import RolePair


@dataclass(slots=True, frozen=True)
class Parts:
    """The product's classes. Tests replace one with a broken one, to see that it is caught."""

    dispatcher: Callable[..., Dispatcher] = Dispatcher
    pool: Callable[..., BlockPool] = BlockPool
    receiver: Callable[..., KVReceiver] = KVReceiver
    sender: Callable[..., KVSender] = KVSender
    decode_role: Callable[..., DecodeRole] = DecodeRole
    prefill_role: Callable[..., PrefillRole] = PrefillRole
    role_pair: Callable[..., RolePair] = RolePair


@dataclass(slots=True)
class Tally:
    """What happened in one or many worlds."""

    num_requests: int = 0
    num_events: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)  # how often the rarer ways were taken

    def add(self, other: Tally) -> None:
        self.num_requests += other.num_requests
        self.num_events += other.num_events
        self.ends += other.ends
        self.faults += other.faults
        self.seen += other.seen
