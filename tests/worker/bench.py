"""Both roles over one pool, stepped by hand: routers, and the decode and prefill workers elsewhere, are played."""

from __future__ import annotations

from itertools import count

from kvferry.common.batch import Batch
from kvferry.common.grammar import pack_mask
from kvferry.common.request import RequestSpec
from kvferry.prefill.role import PrefillRole
from kvferry.transfer.protocol.handoff import Endpoint
from kvferry.transfer.send.counters import SendCounters
from kvferry.transfer.send.plan import ShipPlan
from kvferry.wire.fields import Message
from kvferry.wire.grants import GrantId, GrantInfo
from kvferry.wire.results import ChoiceTokens
from kvferry.wire.tasks import PrefillTask
from kvferry.worker.roles import RoleName, RolePair

from ..decode.bench import BLOCK, EOS, REGION, SPEC, Bench


class Shipping:
    """Everything is written as soon as it is told: `settle` says so to the role."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._open: dict[int, tuple[str, int]] = {}
        self._over: list[int] = []
        self.shipped: dict[str, tuple[ChoiceTokens, ...]] = {}  # by request id: what arrived with its KV
        self.cancelled: list[str] = []

    def open(self, request_id: str, attempt: int, grant: GrantInfo) -> int:
        open_id = next(self._numbers)
        self._open[open_id] = (request_id, attempt)
        return open_id

    def begin_step(self, plans: list[ShipPlan]) -> None:
        pass

    def on_layer(self, layer: int) -> None:
        pass

    def finish(self, open_id: int, first_tokens: tuple[ChoiceTokens, ...], num_cached_tokens: int = 0) -> None:
        self.shipped[self._open[open_id][0]] = first_tokens
        self._over.append(open_id)

    def cancel(self, open_id: int, reason: str) -> None:
        if open_id in self._open:
            self.cancelled.append(self._open[open_id][0])
            self._over.append(open_id)

    def settle(self, role: PrefillRole) -> None:
        over, self._over = self._over, []
        for open_id in over:
            if open_id in self._open:
                del self._open[open_id]
                role.on_source_free(open_id)
                role.router_of(open_id)

    def counters(self) -> SendCounters:
        return SendCounters(0, 0, 0, 0)


class BothBench(Bench):
    """`kinds`: which role had each step."""

    def __init__(self, active_role: RoleName = "decode", num_blocks: int = 64, *, max_num_seqs: int = 8) -> None:
        super().__init__(num_blocks, max_num_seqs=max_num_seqs)
        self.shipping = Shipping()
        self.prefill = PrefillRole(
            pool=self.pool,
            endpoint=Endpoint(SPEC, "0", "local", 1),
            clock=self.clock,
            shipping=self.shipping,
            to_router=lambda router, message: self.sent.append(message),
            eos_token_ids=frozenset({EOS}),
            max_model_len=1000,
            max_num_batched_tokens=16,
            max_num_seqs=max_num_seqs,
            own_id="d",
        )
        self.both = RolePair(self.prefill, self.role, self.pool, active_role)
        self.kinds: list[str] = []

    def send(self, message: Message) -> None:
        self.both.on_router_message("R", message)

    def task(self, spec: RequestSpec, *, granted_by: str = "e") -> PrefillTask:
        """For a decode worker elsewhere."""
        grant = GrantInfo(
            grant_id=GrantId(granted_by, 1, 1),
            spec=SPEC,
            kv_address="127.0.0.1:2",
            block_ids=tuple(range(-(-spec.num_prompt_tokens // BLOCK))),
            num_tokens=spec.num_prompt_tokens,
            num_computed_tokens=0,
            ranks=(REGION,),
            open_within_s=2.0,
            mac=b"",
        )
        mask = b"" if spec.grammar is None else pack_mask(b"\xff" * 64)
        return PrefillTask(spec=spec, grant=grant, first_mask=mask)

    def step(self, token: int = 9) -> Batch | None:
        batch = self.both.schedule()
        if batch is not None:
            self.both.begin_step(batch)
            self.both.check()
            self.complete(batch, token)
            self.kinds.append(self.both.stepping)
        self.shipping.settle(self.prefill)
        self.both.check()
        return batch

    def complete(self, batch: Batch, token: int = 9) -> None:
        self.both.complete(batch, self.output(batch, token))
