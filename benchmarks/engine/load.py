"""What the engine is measured under: the workers' own schedulers and step loop around it, and no network.

    decode    sequences whose prompts are in the cache, all of them in every step, each token fed back
    prefill   one prompt from nothing to its first token, in the chunks that the prefill scheduler cuts

A step costs here what it costs in a worker: scheduling, hashing of full blocks and sampling included. Answers are
greedy and never end, and no prompt begins like another. Keys and values that no step has computed are the random
numbers that the pages are filled with.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from statistics import mean
from typing import Protocol

import torch

from kvferry.common.batch import Batch, StepOutput
from kvferry.common.clock import SystemClock
from kvferry.common.request import RequestId, SamplingParams, Sequence
from kvferry.decode.scheduler import DecodeScheduler
from kvferry.engine.engine import Engine
from kvferry.engine.loop import EngineLoop
from kvferry.engine.nn.attention.int8_rows import stored_head_dim, write_rows
from kvferry.kvcache.blocks import BlockPool, prefix_salt
from kvferry.prefill.scheduler import PrefillScheduler, Prompt

_GREEDY = SamplingParams(temperature=0.0, max_tokens=1 << 30, ignore_eos=True)
_KV_SEED = 1


@dataclass(slots=True, frozen=True)
class DecodeSample:
    """Steps in a row."""

    num_rows: int
    context: float  # mean of the tokens that a row's query saw, itself included
    step_s: tuple[float, ...]  # from one step's end to the next one's


@dataclass(slots=True, frozen=True)
class PrefillSample:
    """One prompt."""

    num_tokens: int
    num_steps: int
    elapsed_s: float


@dataclass(slots=True)
class _DecodeLoad:
    """Ends after `num_steps`."""

    scheduler: DecodeScheduler
    num_rows: int
    num_steps: int
    draft: tuple[int, ...] = ()  # of each row
    ended: threading.Event = field(default_factory=threading.Event)
    step_ends_s: list[float] = field(default_factory=list)
    contexts: list[float] = field(default_factory=list)  # of each step

    def schedule(self) -> Batch | None:
        if len(self.step_ends_s) == self.num_steps:
            return None
        batch = self.scheduler.schedule()
        assert batch is not None and len(batch.rows) == self.num_rows, "every row of every step decodes"
        for row in batch.rows:
            row.draft = self.draft
            row.num_scheduled_tokens += len(self.draft)
        return batch

    def begin_step(self, batch: Batch) -> None:
        self.contexts.append(mean(row.start + 1 for row in batch.rows))

    def on_layer(self, layer: int) -> None:
        """Nothing is shipped."""

    def complete(self, batch: Batch, output: StepOutput) -> None:
        for row, here, result in zip(batch.rows, self.scheduler.complete(batch), output.rows, strict=True):
            assert here
            row.seq.token_ids += [token.token_id for token in result.runs[0]]
        self.step_ends_s.append(time.perf_counter())
        if len(self.step_ends_s) == self.num_steps:
            self.ended.set()


@dataclass(slots=True)
class _PrefillLoad:
    """Ends with the prompt."""

    scheduler: PrefillScheduler
    ended: threading.Event = field(default_factory=threading.Event)
    began_s: float = field(default_factory=time.perf_counter)
    ended_s: float = 0.0
    num_steps: int = 0
    _prompts: list[Prompt] = field(default_factory=list)  # of the running step

    def schedule(self) -> Batch | None:
        work = self.scheduler.schedule()
        if work is None:
            return None
        batch, self._prompts = work
        return batch

    def begin_step(self, batch: Batch) -> None:
        """Nothing is opened."""

    def on_layer(self, layer: int) -> None:
        """Nothing is shipped."""

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self.scheduler.observe(output.step_s, output.num_tokens)
        self.num_steps += 1
        for row, prompt in zip(batch.rows, self._prompts, strict=True):
            if self.scheduler.complete(prompt, row.num_scheduled_tokens):
                self.ended_s = time.perf_counter()
                self.ended.set()


class _Idle:
    """Between two loads."""

    def schedule(self) -> Batch | None:
        return None

    def begin_step(self, batch: Batch) -> None: ...
    def on_layer(self, layer: int) -> None: ...
    def complete(self, batch: Batch, output: StepOutput) -> None: ...


class _Load(Protocol):
    """What the engine is given for a while."""

    def schedule(self) -> Batch | None: ...
    def begin_step(self, batch: Batch) -> None: ...
    def on_layer(self, layer: int) -> None: ...
    def complete(self, batch: Batch, output: StepOutput) -> None: ...


class _Relay:
    """Implements `StepRole` for the loop, which runs as long as the engine: one load after another."""

    def __init__(self) -> None:
        self.load: _Load = _Idle()

    def schedule(self) -> Batch | None:
        return self.load.schedule()

    def begin_step(self, batch: Batch) -> None:
        self.load.begin_step(batch)

    def on_layer(self, layer: int) -> None:
        self.load.on_layer(layer)

    def complete(self, batch: Batch, output: StepOutput) -> None:
        self.load.complete(batch, output)

    def note_turn(self, turn_s: float) -> None:
        """Loads time their steps themselves."""


class LoadedEngine:
    """An engine with its loop running, as in a worker. `close` it. Used by one thread."""

    def __init__(self, engine: Engine, *, seed: int = 0) -> None:
        self.engine = engine
        config = engine.config
        self.pool = BlockPool(
            engine.num_blocks, config.block_tokens, enable_prefix_caching=config.enable_prefix_caching
        )
        self._random = random.Random(seed)
        _fill_pages(engine.kv_pages)
        # One for all prompts: it learns the speed and cuts chunks by it, as a worker's does over its life.
        self._prefill = PrefillScheduler(
            self.pool,
            SystemClock(),
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
        )
        self._relay = _Relay()
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._loop = EngineLoop(self._relay, engine.step, self._on_failure)
        self._loop.start()

    def close(self) -> None:
        self._loop.stop()

    def prefill(self, num_tokens: int) -> PrefillSample:
        seq = self._sequence(num_tokens)
        self._prefill.add(seq, prefix_salt(self.engine.spec, b""))
        load = _PrefillLoad(self._prefill)
        self._run(load, load.ended)
        self.pool.free(seq.block_table)
        return PrefillSample(num_tokens, load.num_steps, load.ended_s - load.began_s)

    def decode(
        self, num_rows: int, context: int, num_steps: int, num_warm_up_steps: int = 8, *, num_drafts: int = 0
    ) -> DecodeSample:
        """`num_steps` steps whose contexts lie around `context`, after some that do not count.

        Each row checks `num_drafts` tokens, which are drawn at random: next to none is right.
        """
        config = self.engine.config
        scheduler = DecodeScheduler(
            self.pool,
            self.engine.spec,
            max_num_batched_tokens=max(config.max_num_batched_tokens, num_rows * (1 + num_drafts)),
            max_num_seqs=num_rows,
        )
        num_prompt_tokens = max(1, context - num_warm_up_steps - num_steps // 2)
        num_all = num_warm_up_steps + num_steps
        room = num_prompt_tokens + num_all + num_drafts if num_drafts else num_prompt_tokens
        sequences = [self._adopted(scheduler, num_prompt_tokens, room) for _ in range(num_rows)]
        load = _DecodeLoad(scheduler, num_rows, num_all, tuple(self._token_id() for _ in range(num_drafts)))
        with self.engine.measuring():  # no step has computed the prompts
            self._run(load, load.ended)
        for seq in sequences:
            scheduler.remove(seq)
        ends_s = load.step_ends_s[num_warm_up_steps - 1 :]
        step_s = tuple(end - start for start, end in itertools.pairwise(ends_s))
        return DecodeSample(num_rows, mean(load.contexts[num_warm_up_steps:]), step_s)

    def _adopted(self, scheduler: DecodeScheduler, num_prompt_tokens: int, room: int) -> Sequence:
        """A sequence whose prompt has come from elsewhere, with its first token, and blocks for `room` tokens."""
        seq = self._sequence(num_prompt_tokens)
        seq.token_ids.append(self._token_id())
        seq.block_table = self.pool.allocate(self.engine.spec.num_blocks_for(room))
        seq.num_computed_tokens = num_prompt_tokens
        seq.num_published_blocks = num_prompt_tokens // self.pool.block_size
        scheduler.adopt(seq)
        return seq

    def _sequence(self, num_tokens: int) -> Sequence:
        name = RequestId(f"{self._random.getrandbits(64):x}")
        return Sequence(name, 0, 0, [self._token_id() for _ in range(num_tokens)], num_tokens, _GREEDY)

    def _token_id(self) -> int:
        return self._random.randrange(self.engine.model_config.vocab_size)

    def _run(self, load: _Load, ended: threading.Event) -> None:
        self._ended = ended
        with self._loop.lock:
            self._relay.load = load
            self._loop.wake()
        ended.wait()
        if self._error is not None:
            raise self._error
        with self._loop.lock:
            self._relay.load = _Idle()

    def _on_failure(self, error: BaseException) -> None:
        """On the loop's thread, which has ended."""
        self._error = error
        self._ended.set()


def _fill_pages(pages: torch.Tensor) -> None:
    """Zeros would be quicker to read and to multiply on some processors."""
    generator = torch.Generator(pages.device).manual_seed(_KV_SEED)
    for layer in pages:
        if layer.dtype == torch.int8:
            _fill_int8(layer, generator)
            continue
        values = torch.empty(layer.shape, dtype=torch.bfloat16, device=layer.device).normal_(generator=generator)
        if layer.dtype.itemsize == 1:  # 8-bit floats are storage: few operations know them
            layer.view(torch.uint8).copy_(values.to(layer.dtype).view(torch.uint8))
        else:
            layer.copy_(values)


def _fill_int8(layer: torch.Tensor, generator: torch.Generator) -> None:
    """Draw what is to be written, for whole numbers have their scales beside them."""
    num_blocks, num_parts, num_heads, block_size, _ = layer.shape
    slots = torch.arange(num_blocks * block_size)
    shape = (len(slots), num_heads, stored_head_dim(layer))
    for part in range(num_parts):
        rows = torch.empty(shape).normal_(generator=generator)
        write_rows(layer, part, slots // block_size, slots % block_size, rows)
