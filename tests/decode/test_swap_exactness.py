"""Answers under pressure equal those without it: a real engine, a pool that is too small, KV in host memory or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvferry.common.config import TransferConfig
from kvferry.common.messages import LocalTask, Message, StepTokens
from kvferry.common.request import RequestSpec, SamplingParams, pack_ids
from kvferry.decode.role import DecodeRole
from kvferry.engine.engine import Engine
from kvferry.kvcache.blocks import BlockPool
from kvferry.tests.fake_clock import FakeClock
from kvferry.transfer.receive.receiver import KVReceiver

from ..checkpoints import write_checkpoint
from ..engine_driver import engine_config, prompts
from .bench import REGION

BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, tokens, head_dim, float32
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    "seeded": SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True),
    "penalised": SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=40, ignore_eos=True),
}
LENGTHS = [20, 33, 7, 48, 16, 31]

Answers = dict[tuple[str, int], list[int]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=False)


class _Worker:
    def __init__(self, model_dir: Path, num_blocks: int, num_swap_blocks: int, **fields: object) -> None:
        config = engine_config(model_dir, swap_space=num_swap_blocks * BLOCK_BYTES, **fields)
        self.engine = Engine(config, num_blocks=num_blocks)
        assert self.engine.num_swap_blocks == num_swap_blocks
        self.pool = BlockPool(num_blocks, 16, enable_prefix_caching=config.enable_prefix_caching)
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
            eos_token_ids=frozenset(),
            max_model_len=2048,
            max_num_batched_tokens=64,
            max_num_seqs=8,
            num_swap_blocks=num_swap_blocks,
        )

    def _on_message(self, router_id: str, message: Message) -> None:
        if isinstance(message, StepTokens):
            for update in message.updates:
                for choice in update.choices:
                    answer = self.answers.setdefault((update.request_id, choice.choice), [])
                    assert choice.first_index == len(answer)
                    answer += [token.token_id for token in choice.tokens]

    def run(self) -> Answers:
        """A request of three choices beside five of one; two of them a class lower."""
        kinds = list(SAMPLING.values())
        for number, prompt in enumerate(prompts(LENGTHS)):
            spec = RequestSpec(
                request_id=f"r{number}",
                attempt=0,
                prompt=pack_ids(prompt),
                sampling=kinds[number % 3],
                choices=(0, 1, 2) if number == 1 else (0,),
                arrival=number,
                priority=int(number in (0, 3)),
            )
            self.role.on_router_message("R", LocalTask(spec=spec))
        while (batch := self.role.schedule()) is not None:
            self.role.complete(batch, self.engine.step(batch))
            self.role.check()
        assert self.role.is_quiet
        return self.answers


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Answers:
    worker = _Worker(model_dir, num_blocks=128, num_swap_blocks=0)
    answers = worker.run()
    assert worker.role.scheduler.num_preemptions == 0
    assert len(answers) == 8 and {len(answer) for answer in answers.values()} == {40}
    return answers


@pytest.mark.parametrize("num_swap_blocks", [0, 3, 40])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_answers_under_pressure_are_the_same(
    model_dir: Path, expected: Answers, num_swap_blocks: int, enable_prefix_caching: bool
) -> None:
    worker = _Worker(
        model_dir, num_blocks=10, num_swap_blocks=num_swap_blocks, enable_prefix_caching=enable_prefix_caching
    )
    assert worker.run() == expected
    assert worker.role.scheduler.num_preemptions > 3
    swap = worker.role.scheduler.blocks.swap
    assert (swap.num_saved_blocks > 0) == (num_swap_blocks > 0)
    if num_swap_blocks == 40:
        assert swap.num_loaded_blocks > 0
