"""A decode role over a real engine and nothing else: no thread, no network, no other worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvferry.common.config import EngineConfig, TransferConfig
from kvferry.common.request import RequestSpec, SampledToken, SamplingParams, pack_ids
from kvferry.decode.role import DecodeRole
from kvferry.engine.engine import Engine
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.receive.receiver import KVReceiver
from kvferry.wire.fields import Message
from kvferry.wire.results import StepTokens
from kvferry.wire.tasks import LocalTask

from .bench import REGION

Answers = dict[tuple[str, int], list[SampledToken]]  # by request and choice


class EngineWorker:
    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        max_num_seqs: int = 8,
    ) -> None:
        self.engine = Engine(config, num_blocks=num_blocks)
        self.pool = BlockPool(num_blocks, config.block_tokens, enable_prefix_caching=config.enable_prefix_caching)
        self.answers: Answers = {}
        spec, clock = self.engine.spec, FakeClock()
        receiver = KVReceiver(
            worker_id="d",
            incarnation=1,
            spec=spec,
            tp_size=1,
            pool=self.pool,
            regions=(REGION,),
            kv_address="127.0.0.1:1",
            config=TransferConfig(),
            clock=clock,
            version="0",
            transport="local",
            to_router=lambda router, message: None,
            to_peer=lambda session, message: None,
        )
        self.role = DecodeRole(
            pool=self.pool,
            spec=spec,
            receiver=receiver,
            clock=clock,
            to_router=self._on_message,
            eos_token_ids=eos_token_ids,
            max_model_len=2048,
            max_num_batched_tokens=64,
            max_num_seqs=max_num_seqs,
            num_swap_blocks=self.engine.num_swap_blocks,
            speculative=config.speculative_config,
        )

    def _on_message(self, router_id: str, message: Message) -> None:
        if isinstance(message, StepTokens):
            for update in message.updates:
                for choice in update.choices:
                    answer = self.answers.setdefault((update.request_id, choice.choice), [])
                    assert choice.first_index == len(answer)
                    answer += choice.tokens

    def run(self, prompts: Iterable[list[int]], kinds: Sequence[SamplingParams], name: str = "r") -> Answers:
        """A request of three choices beside others of one; two of them a class lower."""
        self.answers = {}
        for number, prompt in enumerate(prompts):
            spec = RequestSpec(
                request_id=f"{name}{number}",
                attempt=0,
                prompt=pack_ids(prompt),
                sampling=kinds[number % len(kinds)],
                choices=(0, 1, 2) if number == 1 else (0,),
                arrival=number,
                priority=int(number in (0, 3)),
            )
            self.role.on_router_message("R", LocalTask(spec=spec))
        while (batch := self.role.schedule()) is not None:
            self.role.complete(batch, self.engine.step(batch))
            self.role.check()
        assert self.role.is_quiet
        return {(key.removeprefix(name), choice): answer for (key, choice), answer in self.answers.items()}
