"""The native decoder against the torch path: the same logits and pages within bfloat16's rounding."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import structlog
import torch

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.config import CoreSlot
from kvferry.common.cores import CoreBoard, attach
from kvferry.common.request import SamplingParams, Sequence
from kvferry.engine.cpu import compiler
from kvferry.engine.cpu.decoder import NativeDecoder, Step
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.torch_runner import TorchRunner

from ...checkpoints import Family, write_checkpoint
from ...engine_driver import Driver, engine_config, prompts

Shape = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]  # prompt lengths, tokens of each step
SAMPLING = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
VARIANTS: dict[str, tuple[Family, dict[str, object]]] = {
    "llama": ("llama", {"vocab_size": 515}),
    "llama tied, wide heads": ("llama", {"tie_embeddings": True, "head_dim": 64, "num_qo_heads": 6}),
    "llama biases, odd sizes": ("llama", {"biases": True, "hidden_size": 72, "intermediate_size": 100}),
    "llama without sharing": ("llama", {"num_kv_heads": 4, "head_dim": 48}),
    "llama, many heads to one": ("llama", {"num_qo_heads": 7, "num_kv_heads": 1, "head_dim": 128}),
    "mistral window": ("mistral", {"sliding_window": 20}),
    "qwen2": ("qwen2", {"tie_embeddings": True, "vocab_size": 501}),
    "qwen2 window": ("qwen2", {"sliding_window": 13, "num_layers": 3}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, the widest heads": ("qwen3", {"head_dim": 256, "num_qo_heads": 2, "num_kv_heads": 1}),
    "granite": ("granite", {}),
    "phi3": ("phi3", {"hidden_size": 128}),
    "smollm3": ("smollm3", {}),
    "ministral3": ("ministral3", {}),
    "glm4": ("glm4", {}),
    "exaone4": ("exaone4", {}),
    "gemma3": ("gemma3_text", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32}),
    "olmo2": ("olmo2", {}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "arcee": ("arcee", {}),
    "olmo3": ("olmo3", {}),
    "cohere2": ("cohere2", {}),
    "cohere2, biases, odd sizes": (
        "cohere2",
        {"hidden_size": 80, "num_qo_heads": 5, "num_kv_heads": 1, "intermediate_size": 100}
        | {"config": {"attention_bias": True}},
    ),
    "yarn": (
        "qwen2",
        {"config": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}},
    ),
}
LENGTHS = (1, 7, 16, 17, 31, 64, 130, 300)
LOGIT_TOLERANCE = 0.03  # of the logits' range
PAGE_TOLERANCE = 0.05  # of the largest entry
MEAN_PAGE_TOLERANCE = 0.005  # the same of the root of the mean square


pytestmark = pytest.mark.usefixtures("isa")


class Recorded:
    """An engine whose logits can be looked at."""

    def __init__(
        self, model_dir: Path, *, is_native: bool, num_blocks: int = 64, cores: CoreSlot | None = None, **fields: Any
    ) -> None:
        """In bfloat16 unless `fields` say otherwise. To compare the pages of many blocks takes longer than steps do."""
        config = engine_config(model_dir, **({"dtype": "bfloat16"} | fields))
        self.engine = Engine(config, num_blocks=num_blocks, native=is_native, cores=cores)
        self.driver = Driver(self.engine)
        self.native_steps = 0
        self.logits: list[torch.Tensor] = []
        runner = self.engine.runner
        assert isinstance(runner, NativeRunner if is_native else TorchRunner)
        decoder = runner.decoder
        self._logits, decoder.logits = decoder.logits, self._record  # type: ignore[method-assign]
        if isinstance(decoder, NativeDecoder):
            self._forward, decoder.forward = decoder.forward, self._count  # type: ignore[method-assign]

    def _record(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden)
        self.logits.append(logits.clone())
        return logits

    def _count(self, step: Step, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        self.native_steps += 1
        return self._forward(step, on_layer)

    def prefill(self, lengths: tuple[int, ...]) -> list[Sequence]:
        seqs = [self.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)]
        for seq in seqs:
            self.driver.grow(seq, seq.num_tokens)
        long = [seq for seq in seqs if seq.num_tokens > 1]
        if long:
            self.driver.step([(seq, seq.num_tokens) for seq in long])
        return seqs


class Seen(NamedTuple):
    """What torch has after a step, which is the same whatever the set of instructions."""

    logits: torch.Tensor
    pages: torch.Tensor
    token_ids: list[list[int]]

    @classmethod
    def of(cls, run: Recorded, seqs: list[Sequence]) -> Seen:
        return cls(run.logits[-1], run.engine.kv_pages.clone(), [list(seq.token_ids) for seq in seqs])

    def take_tokens(self, seqs: list[Sequence]) -> None:
        """Have other sequences go on with these tokens."""
        for seq, token_ids in zip(seqs, self.token_ids, strict=True):
            seq.token_ids[:] = token_ids


@cache
def _decoded_by_torch(model_dir: Path, lengths: tuple[int, ...], num_steps: int, block_size: int) -> list[Seen]:
    """Return what torch has after prompts of these lengths, and after each token of their answers."""
    run = Recorded(model_dir, is_native=False, block_size=block_size)
    seqs = run.prefill(lengths)
    seen = [Seen.of(run, seqs)]
    for _ in range(num_steps):
        run.driver.step([(seq, 1) for seq in seqs])
        seen.append(Seen.of(run, seqs))
    return seen


def _decode_beside_torch(model_dir: Path, lengths: tuple[int, ...], num_steps: int, block_size: int = 16) -> None:
    """Decode torch's tokens from torch's pages; logits and pages are compared after each step."""
    run = Recorded(model_dir, is_native=True, block_size=block_size)
    seqs, seen = run.prefill(lengths), _decoded_by_torch(model_dir, lengths, num_steps, block_size)
    run.engine.kv_pages.copy_(seen[0].pages)
    run.native_steps = 0
    for step, (before, after) in enumerate(pairwise(seen), 1):
        before.take_tokens(seqs)
        run.driver.step([(seq, 1) for seq in seqs])
        _assert_same(run, after, len(lengths))
        assert run.native_steps == step


def _assert_same(
    run: Recorded, seen: Seen, rows: int, tolerance: float = LOGIT_TOLERANCE, pages_within: float = PAGE_TOLERANCE
) -> None:
    """The last logits and all pages."""
    _assert_logits_close(run.logits[-1], seen.logits[:rows], tolerance)
    ours_pages, pages = run.engine.kv_pages.float(), seen.pages.float()
    distances = (ours_pages - pages) / pages.abs().max()
    assert distances.abs().max() <= pages_within
    assert distances.square().mean().sqrt() <= MEAN_PAGE_TOLERANCE
    assert torch.equal(ours_pages.any(-1), pages.any(-1)), "a slot was written by one and not by the other"


def _assert_logits_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    spread = float(theirs.max() - theirs.min())
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * spread
    best = theirs.topk(2).values
    clear = best[:, 0] - best[:, 1] > 2 * tolerance * spread
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("models")
    for name, (family, fields) in VARIANTS.items():
        shape = {"tokenizer": False, "dtype": "bfloat16"} | fields
        write_checkpoint(root / name, family, **shape)  # type: ignore[arg-type]
    yield root
    _decoded_by_torch.cache_clear()
    _prompts_by_torch.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_steps_are_those_of_torch(checkpoints: Path, variant: str) -> None:
    _decode_beside_torch(checkpoints / variant, LENGTHS, 3)


@pytest.mark.parametrize("block_size", [8, 32, 128])
def test_block_size_does_not_matter(checkpoints: Path, block_size: int) -> None:
    _decode_beside_torch(checkpoints / "mistral window", (7, 8, 31, 32, 100), 3, block_size)


def test_contexts_grow_across_blocks(checkpoints: Path) -> None:
    _decode_beside_torch(checkpoints / "llama", (1, 6, 127), 12, block_size=8)


MANY_TOKENS = (390, 70, 33, 5), ((300, 40, 33, 5), (90, 30, 1, 1), (1, 1, 1, 1))
FEW_TOKENS = (50, 20, 9, 5), ((20, 10, 9, 5), (30, 10, 1, 1), (1, 1, 1, 1))


@cache
def _prompts_by_torch(model_dir: Path, shape: Shape) -> list[Seen]:
    lengths, steps = shape
    run, seen = Recorded(model_dir, is_native=False, block_size=16), list[Seen]()
    seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)]
    for counts in steps:
        run.driver.step(list(zip(seqs, counts, strict=True)))
        seen.append(Seen.of(run, seqs))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MANY_TOKENS, FEW_TOKENS], ids=["many tokens", "few tokens"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_native_prompts_are_those_of_torch(checkpoints: Path, variant: str, shape: Shape) -> None:
    """Chunks of several prompts, first and later ones, beside tokens of running answers."""
    lengths, steps = shape
    run = Recorded(checkpoints / variant, is_native=True, block_size=16)
    seqs = [run.driver.add(prompt, SAMPLING) for prompt in prompts(list(lengths), 500)]
    for counts, seen in zip(steps, _prompts_by_torch(checkpoints / variant, shape), strict=True):
        run.driver.step(list(zip(seqs, counts, strict=True)))
        seen.take_tokens(seqs)
        # torch is the one further from float32
        _assert_same(run, seen, len(run.logits[-1]), 2 * LOGIT_TOLERANCE, 1.2 * PAGE_TOLERANCE)
    assert run.native_steps == len(steps)


@pytest.mark.parametrize("num_threads", [1, 2])  # of two, each has too few tokens of its own: they share columns
def test_every_prompt_token_can_be_asked_for(checkpoints: Path, num_threads: int) -> None:
    """Log-probabilities of a prompt need the last layer of all its tokens, not only of the last one."""
    runs = [
        Recorded(checkpoints / "mistral window", is_native=native, block_size=16, num_threads=num_threads)
        for native in (True, False)
    ]
    for run in runs:
        (prompt,) = prompts([150], 500)
        seq = run.driver.add(prompt, SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1))
        run.driver.step([(seq, 90), (run.driver.add([3, 4, 5], SAMPLING), 3)])
        run.driver.step([(seq, 60)])
    ours, theirs = (run.driver.outputs for run in runs)
    for one, other in zip(ours, theirs, strict=True):
        first, second = (
            [entry.logprob for row in output.rows for entry in row.prompt_logprobs] for output in (one, other)
        )
        assert first == pytest.approx(second, abs=0.6) and len(first) in (59, 90)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_give_the_same_bits(checkpoints: Path, num_threads: int) -> None:
    alone, together = (
        Recorded(checkpoints / "qwen3", is_native=True, num_threads=threads) for threads in (1, num_threads)
    )
    torch.set_num_threads(1)
    for run in (alone, together):
        seqs = run.prefill(LENGTHS[:3])
        run.logits.clear()
        for _ in range(5):
            run.driver.step([(seq, 1) for seq in seqs])
    assert all(torch.equal(one, other) for one, other in zip(alone.logits, together.logits, strict=True))


def test_a_worker_borrows_the_cores_of_those_that_are_idle(checkpoints: Path) -> None:
    board = CoreBoard(3)
    slots = [board.slot(index, max_threads=4) for index in range(3)]
    run = Recorded(checkpoints / "llama", is_native=True, cores=slots[0])
    others = [attach(slot).memory for slot in slots[1:]]
    board.close()
    assert isinstance(run.engine.runner, NativeRunner)
    native = run.engine.runner.decoder
    now, long_ago = time.monotonic_ns() + 10**12, time.monotonic_ns() - 10**10  # it stays "now" for a while
    resting, working = (now, 2, 0), (now, 2, 1)
    idle, died, absent = (long_ago, 2, 0), (long_ago, 2, 1), (0, 0, 0)
    for slots_of_others, num_threads in (
        ((absent, absent), 4),
        ((working, absent), 2),
        ((working, resting), 1),
        ((idle, resting), 2),
        ((idle, died), 4),
    ):
        for other, (memory, slot) in enumerate(zip(others, slots_of_others, strict=True), 1):
            struct.pack_into("qqq", memory, 64 * other, *slot)
        for length in (5, 100):
            run.driver.step([(run.driver.add([1] * length, SAMPLING), length)])
            assert native.num_threads == num_threads
    struct.pack_into("qqq", others[0], 64, time.monotonic_ns() - 10**8, 2, 1)  # within a long step
    struct.pack_into("qqq", others[0], 128, *absent)
    run.driver.step([(run.driver.add([1] * 5, SAMPLING), 5)])
    assert native.num_threads == 2
    assert struct.unpack_from("q", others[0], 0)[0] > 0, "nobody sees this worker compute"
    assert struct.unpack_from("q", others[0], 16)[0] == 0, "the step is over"


def test_without_the_board_a_worker_keeps_to_its_own_threads(checkpoints: Path) -> None:
    slot = CoreBoard(1).slot(0, max_threads=2).model_copy(update={"path": "/proc/self/fd/9999"})
    with structlog.testing.capture_logs() as lines:
        run = Recorded(checkpoints / "llama", is_native=True, cores=slot)
    assert [line["event"] for line in lines if line["log_level"] != "info"] == ["shared_cores"]
    run.driver.step([(run.driver.add([1, 2, 3], SAMPLING), 3)])
    assert isinstance(run.engine.runner, NativeRunner) and run.engine.runner.decoder.num_threads == 1


def test_a_row_does_not_feel_how_many_others_there_are(checkpoints: Path) -> None:
    """To the bit, up to the largest batch: rows are summed up in the same order whatever their number."""
    run = Recorded(checkpoints / "llama", is_native=True, num_blocks=400)
    seqs = run.prefill((40, *range(2, 64), 3, *[2] * 10))
    run.native_steps = 0
    found = []
    for count in (1, 2, 3, 6, 7, 8, 12, 13, 17, 24, 25, 64, 74):
        output = Batch([BatchRow(seq, 1) for seq in seqs[:count]])
        for row in output.rows:
            run.driver.grow(row.seq, row.end)
        run.engine.step(output)
        found.append(run.logits[-1])
    assert all(torch.equal(logits, found[-1][: len(logits)]) for logits in found)
    assert run.native_steps == len(found)


@pytest.mark.parametrize("variant", ["llama without sharing", "llama, many heads to one", "qwen2 window", "gemma2"])
def test_exact_results_show_neither_company_nor_chunks_nor_threads(checkpoints: Path, variant: str) -> None:
    assert_exact(checkpoints / variant, dtype="bfloat16")


def assert_exact(model_dir: Path, dtype: str, **fields: Any) -> None:
    """A sequence's tokens and log-probabilities are the same in any company, by any chunks and on any threads."""
    sampling = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=3)
    found = []
    for chunk, lengths, num_threads in ((1000, (), 1), (7, (90,), 1), (100, (1, 40, 3), 1), (64, (1, 1), 3)):
        run = Recorded(model_dir, is_native=True, dtype=dtype, deterministic=True, num_threads=num_threads, **fields)
        seq, *others = (run.driver.add(prompt, sampling) for prompt in prompts([300, *lengths], 500))
        while seq.num_output_tokens < 4:
            rows = [(seq, min(chunk, seq.num_uncomputed_tokens))]
            rows += [(other, min(20, other.num_uncomputed_tokens)) for other in others]
            tokens = run.driver.step(rows)[0]
            found += [(seq.num_output_tokens, tokens[0])] if tokens else []
    assert len(found) == 16 and all(one in found[:4] for one in found)


def test_what_a_listener_raises_reaches_the_caller(checkpoints: Path) -> None:
    run = Recorded(checkpoints / "llama", is_native=True)
    seq = run.driver.add([5, 6, 7], SAMPLING)

    def refuse(layer: int) -> None:
        raise ValueError(f"layer {layer}")

    with pytest.raises(ValueError, match="layer 0"):
        run.driver.step([(seq, 3)], refuse)


def test_layers_are_reported_and_prompt_logprobs_read(checkpoints: Path) -> None:
    run = Recorded(checkpoints / "llama", is_native=True)
    seq = run.driver.add([5, 6, 7], SamplingParams(temperature=0.0, prompt_logprobs=1))
    for count in (1, 2):
        layers: list[int] = []
        run.driver.step([(seq, count)], layers.append)
        assert layers == [0, 1]
    assert run.native_steps == 2
    assert [entry.token_id for entry in run.driver.outputs[0].rows[0].prompt_logprobs] == [6]


def test_without_native_code_steps_run_in_torch(checkpoints: Path) -> None:
    engine = Engine(engine_config(checkpoints / "llama", dtype="bfloat16"), num_blocks=16, native=False)
    assert isinstance(engine.runner, TorchRunner)


def test_an_engine_without_the_library_says_so_and_runs(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_COMPILERS", ())
    with structlog.testing.capture_logs() as lines:
        engine = Engine(engine_config(checkpoints / "llama", dtype="bfloat16"), num_blocks=16)
    assert [line["event"] for line in lines] == ["cpu_kernels"] and "no C++ compiler" in lines[0]["reason"]
    assert len(Driver(engine).generate([Driver(engine).add([1, 2, 3])])[0]) == 8


def test_short_block_table_and_foreign_token_are_bugs(checkpoints: Path) -> None:
    run = Recorded(checkpoints / "llama", is_native=True)
    (seq,) = run.prefill((20,))
    seq.block_table = seq.block_table[:1]
    with pytest.raises(AssertionError, match="block table"):
        run.engine.step(Batch([BatchRow(seq, 1)]))
    with pytest.raises(AssertionError, match="vocabulary"):
        run.engine.step(Batch([BatchRow(run.driver.add([515], SAMPLING), 1)]))
