"""The two sides of a worker's core: what it knows from the start, and what it does to the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ..common.config import SpeculativeConfig, TransferConfig
from ..common.kv_spec import KVCacheSpec
from ..common.request import BlockId
from ..wire.fields import Message
from .roles import RoleName


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """`CoreConfig` is all that a core knows of the worker that it decides for."""

    worker_id: str
    incarnation: int
    version: str
    served_model: str  # as requests name it
    role: RoleName  # at the start
    spec: KVCacheSpec
    tp_size: int
    kv_address: str  # where others ask to write and to read
    incoming: str  # transport through which others write into our pages
    outgoing: str  # transport through which we write into theirs
    transfer: TransferConfig
    eos_token_ids: frozenset[int]
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    num_swap_blocks: int = 0
    speculative: SpeculativeConfig | None = None  # None: no token is drafted
    keeps_states: bool = False  # some of the model's layers keep a state in place of keys and values
    tpot_objective_s: float | None = None
    checks_bytes: bool = False  # arrivals that carry checksums come with a verdict
    sums_writes: bool = False  # what we write or read is summed
    sums_loans: bool = False  # what others read here is summed


class Effects(Protocol):
    """`Effects` do what the core has decided. Called under the core's lock, in the order in which things happened."""

    def to_router(self, router_id: str, message: Message) -> None: ...

    def to_peer(self, session: str, message: Message) -> None:
        """Answer a worker that writes or reads here."""
        ...

    def to_target(self, kv_address: str, message: Message) -> None:
        """Ask a worker for the right to write or to read there."""
        ...

    def announce(self) -> None:
        """Send every router a heartbeat (`status`) now."""
        ...

    def rotate(self, generation: int) -> None:
        """Begin to replace the agents through which others write, on all ranks; answered by `on_rotated`."""
        ...

    def watch(self, on: bool) -> None:
        """Let others' writes and reads make progress, or save the effort."""
        ...

    def sum_loan(self, fetch_id: int, blocks: tuple[BlockId, ...], num_thin: int) -> None:
        """Begin to sum lent blocks on all ranks; answered by `on_sums` of each."""
        ...

    def leaving(self) -> Callable[[], object]:
        """Return what waits until all that was sent to routers so far has left this process."""
        ...

    def stop_step(self) -> None:
        """Have the running step end soon, if it can: nobody wants what it computes. Said again while that is so."""
        ...

    def wake(self) -> None:
        """Have the engine ask for work: there may be some."""
        ...
