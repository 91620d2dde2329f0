"""A decode role with a real receiver; routers and prefill workers are played by hand, and so is the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvferry.common.adapter import Adapters
from kvferry.common.batch import Batch, RowOutput, StepOutput
from kvferry.common.config import TransferConfig
from kvferry.common.grammar import Grammars
from kvferry.common.kv_spec import KVCacheSpec
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.common.served import Served
from kvferry.decode.role import DecodeRole
from kvferry.kvcache.frame_pool import block_pool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.protocol.handoff import open_mac
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.transfer.receive.reservation import ReservationState
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantInfo, RegionInfo
from kvferry.wire.handoff import KVArrived, KVOpen
from kvferry.wire.results import ChoiceTokens, Grant, StepTokens
from kvferry.wire.tasks import ReserveKV

BLOCK, EOS = 4, 2
SPEC = KVCacheSpec(model="m", num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK, dtype="float32")
REGION = RegionInfo(
    rank=0,
    tp_size=1,
    agent="d.1.0.0",
    generation=0,
    agent_metadata=b"",
    base_addr=0,
    num_blocks=64,
    page_bytes=SPEC.page_bytes(),
    device="DRAM",
    device_id=0,
    transport="local",
)


class Bench:
    """`sent`: what the routers got; `told`: the prefill workers."""

    def __init__(
        self, num_blocks: int = 64, *, max_num_seqs: int = 8, num_swap_blocks: int = 0, kv: KVCacheSpec = SPEC
    ) -> None:
        self.sent: list[Message] = []
        self.told: list[Message] = []
        self.kv = kv
        self.pool = block_pool(kv, num_blocks)
        self.clock = FakeClock()
        self.receiver = KVReceiver(
            worker_id="d",
            incarnation=1,
            spec=kv,
            tp_size=1,
            pool=self.pool,
            regions=(REGION,),
            kv_address="127.0.0.1:1",
            config=TransferConfig(),
            clock=self.clock,
            version="0",
            transport="local",
            to_router=lambda router, message: self.sent.append(message),
            to_peer=lambda session, message: self.told.append(message),
        )
        self.role = self.make_role(max_num_seqs=max_num_seqs, num_swap_blocks=num_swap_blocks)

    def make_role(
        self,
        *,
        max_model_len: int = 1000,
        max_num_seqs: int = 8,
        num_swap_blocks: int = 0,
        leaving: Callable[[], Callable[[], object]] | None = None,
        grammars: Grammars | None = None,
        adapters: Adapters | None = None,
    ) -> DecodeRole:
        return DecodeRole(
            pool=self.pool,
            spec=self.kv,
            receiver=self.receiver,
            clock=self.clock,
            to_router=lambda router, message: self.sent.append(message),
            eos_token_ids=frozenset({EOS}),
            max_model_len=max_model_len,
            max_num_batched_tokens=16,
            max_num_seqs=max_num_seqs,
            num_swap_blocks=num_swap_blocks,
            leaving=leaving,
            served=Served(grammars=grammars, adapters=adapters),
        )

    def spec(
        self, name: str, num_tokens: int, n: int = 1, outputs: tuple[list[int], ...] = (), **more: object
    ) -> RequestSpec:
        sampling = SamplingParams(temperature=0.0, max_tokens=4)
        return RequestSpec(
            request_id=name,
            attempt=0,
            prompt=pack_ids(list(range(100, 100 + num_tokens))),
            sampling=sampling,
            choices=tuple(range(n)),
            outputs=tuple(pack_ids(tokens) for tokens in outputs),
            **more,  # type: ignore[arg-type]  # fields by name
        )

    def send(self, message: Message) -> None:
        self.role.on_router_message("R", message)

    def check(self) -> None:
        """Every block has as many references as there are holders."""
        self.role.check()
        held = Counter(block for blocks in self.role.scheduler.references() for block in blocks)
        for reservation in self.receiver.reservations.live.values():
            if reservation.state is not ReservationState.DOOMED:
                held.update(reservation.hit_blocks + reservation.block_ids + reservation.copy_blocks)
        assert {b: count for b in range(self.pool.num_blocks) if (count := self.pool.ref_count(b))} == held

    def last(self, kind: type[Message]) -> Message:
        return next(message for message in reversed(self.sent) if isinstance(message, kind))

    def hand_over(self, spec: RequestSpec, first_tokens: tuple[ChoiceTokens, ...], num_cached: int = 0) -> None:
        """Reserve, open and arrive, as a prefill worker would."""
        self.send(ReserveKV(spec=spec))
        grant = self.last(Grant)
        assert isinstance(grant, Grant)
        self.open(spec, grant.grant)
        self.arrive(spec, grant.grant, first_tokens, num_cached=num_cached)

    def open(self, spec: RequestSpec, grant: GrantInfo, open_id: int = 7) -> None:
        self.receiver.on_message(
            "p#1",
            KVOpen(
                grant_id=grant.grant_id,
                open_id=open_id,
                mac=open_mac(grant, spec.request_id, spec.attempt),
                worker_id="p",
                incarnation=5,
                spec=self.kv,
                version="0",
                transport="local",
                tp_size=1,
            ),
        )

    def arrive(
        self,
        spec: RequestSpec,
        grant: GrantInfo,
        first_tokens: tuple[ChoiceTokens, ...],
        open_id: int = 7,
        num_cached: int = 0,
    ) -> None:
        self.receiver.on_arrived(
            0,
            KVArrived(
                grant_id=grant.grant_id,
                open_id=open_id,
                source_rank=0,
                num_tokens=spec.num_prompt_tokens,
                first_tokens=first_tokens,
                num_cached_tokens=num_cached,
            ),
        )

    def step(self, token: int = 9) -> Batch | None:
        batch = self.role.schedule()
        if batch is not None:
            self.complete(batch, token)
        return batch

    def complete(self, batch: Batch, token: int = 9) -> None:
        self.role.complete(batch, self.output(batch, token))

    def output(self, batch: Batch, token: int) -> StepOutput:
        """Every row that samples yields this token."""
        rows = [
            RowOutput(tuple((SampledToken(token),) for _ in row.choices) if row.samples else ()) for row in batch.rows
        ]
        return StepOutput(rows, 0.01, batch.num_tokens, 0.001)

    def run(self, token: int = 9) -> None:
        for _ in range(50):
            if self.step(token) is None:
                return
        raise AssertionError("it never ends")

    def tokens(self, name: str) -> dict[int, list[tuple[int, int]]]:
        """(index, token) pairs that the router got, by choice."""
        got: dict[int, list[tuple[int, int]]] = {}
        for message in self.sent:
            if isinstance(message, StepTokens):
                for update in message.updates:
                    for choice in update.choices if update.request_id == name else ():
                        pairs = enumerate(choice.tokens, choice.first_index)
                        got.setdefault(choice.choice, []).extend((index, token.token_id) for index, token in pairs)
        return got


def first_token(choice: int, token: int, finish: str | None = None) -> ChoiceTokens:
    return ChoiceTokens(choice, 0, (SampledToken(token),), finish)
