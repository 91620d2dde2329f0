"""One contract for every runner that works on this machine: the same batches, judged by transformers in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from kvferry.common.batch import Batch, BatchRow, GpuEvent, RowOutput
from kvferry.common.grammar import GrammarBroken
from kvferry.common.request import SampledToken, SamplingParams, Sequence
from kvferry.engine.engine import Engine
from kvferry.engine.nn.plan import plan_step

from ..checkpoints import Shape, write_checkpoint
from ..engine_driver import GREEDY, Driver, engine_config, prompts
from .cpu.widened import WIDENED
from .cuda.emulation import LookingAhead
from .transformers_reference import reference_logprobs

FLOAT32, BFLOAT16 = 1e-5, 0.025  # how far a log-probability may be from the reference's, as a part of their range
SURE = 2.0  # times that: by so much the reference's best token leads where the runner's must be the same
VOCAB_SIZE = 515
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Kind:
    runner: str
    tolerance: float
    fields: dict[str, object]
    native: bool = True
    marks: tuple[pytest.MarkDecorator, ...] = ()


GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
)
KINDS = {
    "torch float32": Kind("TorchRunner", FLOAT32, {"dtype": "float32"}, native=False),
    "torch bfloat16": Kind("TorchRunner", BFLOAT16, {"dtype": "bfloat16"}, native=False),
    "tiled float32": Kind("TiledRunner", FLOAT32, {"dtype": "float32", "deterministic": True}, native=False),
    "tiled bfloat16": Kind("TiledRunner", BFLOAT16, {"dtype": "bfloat16", "deterministic": True}, native=False),
    "native float32": Kind("NativeRunner", FLOAT32, {"dtype": "float32"}),
    "native exact float32": Kind("NativeRunner", FLOAT32, {"dtype": "float32", "deterministic": True}),
    "native": Kind("NativeRunner", BFLOAT16, {"dtype": "bfloat16"}),
    "native exact": Kind("NativeRunner", BFLOAT16, {"dtype": "bfloat16", "deterministic": True}),
    "native widened": Kind("NativeRunner", BFLOAT16, {"dtype": "bfloat16", "cpu_isa": WIDENED, "deterministic": True}),
    "cuda's decode steps, emulated": Kind("AheadRunner", FLOAT32, {"dtype": "float32"}),
    "cuda": Kind("CudaRunner", BFLOAT16, {"dtype": "bfloat16", "device": "cuda", "max_num_seqs": 16}, marks=GPU),
}
every_kind = pytest.mark.parametrize("name", [pytest.param(name, marks=kind.marks) for name, kind in KINDS.items()])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(hidden_size=256, head_dim=64, num_qo_heads=4, num_kv_heads=2, vocab_size=VOCAB_SIZE)
    return write_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=False, dtype="bfloat16", shape=shape)


def _engine(model_dir: Path, name: str, **others: object) -> Engine:
    kind = KINDS[name]
    fields = {"block_size": BLOCK_SIZE, "max_model_len": 512} | kind.fields | others
    if kind.runner == "AheadRunner":
        return LookingAhead(model_dir, **fields)
    engine = Engine(engine_config(model_dir, **fields), num_blocks=128, native=kind.native)
    if kind.runner == "NativeRunner" and type(engine.runner).__name__ != kind.runner:
        pytest.skip("no native code on this machine")
    assert type(engine.runner).__name__ == kind.runner
    return engine


@dataclass(frozen=True)
class Found:
    """A token that a runner chose or judged, and those that it had been told before."""

    before: tuple[int, ...]
    token: SampledToken


def _greedy(**fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=2, **fields)  # type: ignore[arg-type]


def _scripted(engine: Engine) -> Iterator[Found]:
    """Run chunks beside answers, answers alone, choices and prompts to be judged; the answers are given, not chosen."""
    driver = Driver(engine)
    first, judged, short, late = (
        driver.add(prompt, sampling)
        for prompt, sampling in zip(
            prompts([40, 100, 5, 30], 500), (_greedy(), _greedy(prompt_logprobs=1), _greedy(), _greedy()), strict=True
        )
    )
    late.pending_choices = (0, 1)
    for rows in (
        [(first, 17), (judged, 30)],
        [(short, 5), (first, 23), (judged, 70)],
        [(first, 1), (judged, 1), (short, 1)],
        [(first, 1), (judged, 1), (short, 1)],
        [(short, 1), (first, 1), (late, 30)],
        [(judged, 1)],
    ):
        starts = {id(seq): seq.num_computed_tokens for seq, _ in rows}
        known = {id(seq): tuple(seq.token_ids) for seq, _ in rows}
        of_rows = driver.step(rows)
        for (seq, _), tokens in zip(rows, of_rows, strict=True):
            yield from (Found(known[id(seq)], token) for token in tokens)
            if tokens:
                seq.token_ids[-1] = (31 * seq.num_tokens) % 500
        entries = [entry for output in driver.outputs[-1].rows for entry in output.prompt_logprobs]
        for position, entry in enumerate(entries, starts.get(id(judged), 0) + 1):
            assert entry.token_id == judged.token_ids[position]
            yield Found(tuple(judged.token_ids[:position]), entry)


@every_kind
def test_log_probabilities_are_those_of_transformers(model_dir: Path, name: str) -> None:
    found, sure = list(_scripted(_engine(model_dir, name))), 0
    longest = {each.before[0]: each.before for each in sorted(found, key=lambda each: len(each.before))}
    for each in found:
        expected = reference_logprobs(model_dir, longest[each.before[0]])[len(each.before) - 1]
        tolerance = KINDS[name].tolerance * float(expected.max() - expected.min())
        assert each.token.logprob == pytest.approx(float(expected[each.token.token_id]), abs=tolerance)
        best = expected.topk(2)
        if best.values[0] - best.values[1] > SURE * tolerance:
            assert each.token.top[0][0] == best.indices[0]
            sure += 1
    assert len(found) == 99 + 14 and sure > 10


@every_kind
def test_layers_are_told_of_in_order_and_are_written_by_then(model_dir: Path, name: str) -> None:
    engine = _engine(model_dir, name)
    driver, events, layers = Driver(engine), list[GpuEvent | None](), list[int]()
    seq = driver.add(prompts([40], 500)[0], _greedy())

    def on_layer(layer: int) -> None:
        layers.append(layer)
        events.append(engine.layer_event())

    for count in (40, 1):
        layers.clear()
        driver.step([(seq, count)], on_layer)
        assert layers == list(range(engine.model_config.num_layers))
    assert all(event is None or event.query() for event in events), "a step has ended when its call returns"
    written = engine.kv_pages[:, seq.block_table].transpose(2, 4).flatten(1, 2)[:, :41]  # [layers, tokens, ...]
    assert bool(written.flatten(2).any(-1).all())


@pytest.mark.parametrize("lengths", [[5, 3], [300, 100], [1600, 40]], ids=["few", "by layers", "many"])
@pytest.mark.parametrize(
    ("name", "num_threads"),
    [
        pytest.param(name, num_threads, marks=kind.marks)
        for name, kind in KINDS.items()
        for num_threads in ((1,) if kind.runner == "CudaRunner" else (1, 2))  # a card's steps are none of the host's
    ],
)
def test_a_step_that_nobody_wants_ends_early_or_whole(
    model_dir: Path, name: str, lengths: list[int], num_threads: int
) -> None:
    engine = _engine(model_dir, name, max_model_len=2048, num_threads=num_threads)
    batch, told = Batch([]), list[int]()
    driver, seqs = Driver(engine), [Driver(engine).add(prompt) for prompt in prompts(lengths, 500)]
    for seq in seqs:
        driver.grow(seq, seq.num_tokens)
        batch.rows.append(BatchRow(seq, seq.num_tokens))

    def on_layer(layer: int) -> None:
        told.append(layer)
        if layer == 0 and len(told) == 1:
            engine.stop()

    output = engine.step(batch, on_layer)
    num_layers = engine.model_config.num_layers
    if KINDS[name].runner == "NativeRunner":
        assert output.is_stopped and output.rows == [RowOutput((), is_postponed=True)] * 2
        assert len(told) < num_layers
    else:
        assert not output.is_stopped and told == list(range(num_layers))
    told.clear()
    again = engine.step(batch, told.append)
    assert not again.is_stopped and told == list(range(num_layers)), "that was the last step's affair"
    other = _engine(model_dir, name, max_model_len=2048, num_threads=num_threads)
    whole = Driver(other).step([(Driver(other).add(seq.token_ids), seq.num_tokens) for seq in seqs])
    assert [row.runs[0][0] for row in again.rows] == [tokens[0] for tokens in whole]


@every_kind
def test_logits_come_in_parts(model_dir: Path, name: str) -> None:
    """Those of the rows that sample, together, then at most 64 of a prompt's at once."""
    engine = _engine(model_dir, name)
    driver = Driver(engine)
    rows = [
        (driver.add([3, 4, 5], _greedy()), 3),
        (driver.add(prompts([100], 500)[0], _greedy(prompt_logprobs=0)), 90),
        (driver.add([6, 7], _greedy()), 2),
    ]
    for seq, count in rows:
        driver.grow(seq, count)
    plan = plan_step(Batch([BatchRow(seq, count) for seq, count in rows]), BLOCK_SIZE)
    with torch.inference_mode(), engine.runner.calculating():
        parts = [part.clone() for part in engine.runner.forward(plan, None)]
        engine.runner.wait()
    assert [tuple(part.shape) for part in parts] == [(2, VOCAB_SIZE), (64, VOCAB_SIZE), (26, VOCAB_SIZE)]
    assert all(part.dtype == torch.float32 for part in parts)


@every_kind
def test_blocks_are_copied_and_rows_that_do_not_sample_yield_nothing(model_dir: Path, name: str) -> None:
    engine = _engine(model_dir, name)
    driver = Driver(engine)
    first, silent = (driver.add(prompt, _greedy()) for prompt in prompts([21, 12], 500))
    silent.samples = False
    assert [len(tokens) for tokens in driver.step([(first, 21), (silent, 12)])] == [1, 0]
    forked = driver.step_fork(first)
    driver.step([(first, 1)])
    assert forked == first.token_ids[22]


class _Residues:
    """A grammar in which the n-th token of an answer leaves n when divided by seven; `breaks_at` it is broken."""

    is_ready = True
    is_late = is_costly = False
    failure = ""

    def __init__(self, breaks_at: int = 99) -> None:
        self._breaks_at = breaks_at
        self._num_taken = 0

    def matcher(self) -> _Residues:
        return _Residues(self._breaks_at)

    def accept(self, token_ids: Ids[int]) -> None:
        for token_id in token_ids:
            assert token_id % 7 == self._num_taken % 7
            self._num_taken += 1

    def mask(self) -> bytes:
        if self._num_taken >= self._breaks_at:
            raise GrammarBroken("as asked")
        allowed = sum(1 << token_id for token_id in range(self._num_taken % 7, VOCAB_SIZE, 7))
        return allowed.to_bytes(-(-VOCAB_SIZE // 32) * 4, "little")

    def forced(self) -> int | None:
        return None

    def rollback(self, num_tokens: int) -> None:
        self._num_taken -= num_tokens


@every_kind
def test_answers_follow_their_grammars_beside_others(model_dir: Path, name: str) -> None:
    engine = _engine(model_dir, name)
    driver = Driver(engine)
    free, greedy, drawn, broken = (
        driver.add(prompt, params)
        for prompt, params in zip(
            prompts([12, 12, 9, 5], 500), (GREEDY, GREEDY, SamplingParams(seed=3), GREEDY), strict=True
        )
    )
    greedy.grammar = drawn.grammar = _Residues()
    broken.grammar = _Residues(breaks_at=2)
    drawn.pending_choices = (0, 1)
    rows = [free, greedy, drawn, broken]
    first = driver.step([(seq, seq.num_tokens) for seq in rows])
    assert all(token.token_id % 7 == 0 for of_row in first[1:] for token in of_row) and len(first[2]) == 2
    drawn.pending_choices = ()
    for step in range(1, 4):
        found = driver.step([(seq, 1) for seq in rows])
        assert all(token.token_id % 7 == step for of_row in found[1:] for token in of_row)
        outputs = driver.outputs[-1].rows
        assert [output.grammar_failure for output in outputs if output.grammar_failure] == ["as asked"] * (step == 2)
        if step == 2:
            rows.remove(broken)
    assert len(free.output_token_ids) == 4 and {token % 7 for token in free.output_token_ids} != {0, 1, 2, 3}


@every_kind
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=5, repetition_penalty=1.2)])
def test_drafts_are_judged_by_the_masks_behind_them(model_dir: Path, name: str, sampling: SamplingParams) -> None:
    engine = _engine(model_dir, name)
    if not engine.runner.results:
        pytest.skip("its results depend on what is computed beside them")
    driver, [prompt] = Driver(engine), prompts([9], 500)

    def begin() -> Sequence:
        seq = driver.add(prompt, sampling)
        seq.grammar = _Residues()
        driver.step([(seq, len(prompt))])
        return seq

    one_by_one = begin()
    for _ in range(6):
        driver.step([(one_by_one, 1)])
    right = one_by_one.output_token_ids
    no_residue, wrong = right[3] + 1, (right[3] + 7) % 490  # the second may come, and does not
    for draft, num_right in (
        (right[1:6], 5),
        ([*right[1:3], no_residue, right[4]], 2),
        ([*right[1:3], wrong, right[4]], 2),
        ([no_residue], 0),
    ):
        seq = begin()
        row = BatchRow(seq, 1 + len(draft), tuple(draft))
        driver.grow(seq, row.end)
        [output] = engine.step(Batch([row])).rows
        assert [token.token_id for token in output.runs[0]] == right[1 : num_right + 2]


@every_kind
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=5, repetition_penalty=1.2)])
def test_a_grammar_that_breaks_behind_a_draft_fails_as_without_one(
    model_dir: Path, name: str, sampling: SamplingParams
) -> None:
    engine = _engine(model_dir, name)
    driver, [prompt] = Driver(engine), prompts([9], 500)
    seq = driver.add(prompt, sampling)
    seq.grammar = _Residues(breaks_at=3)
    driver.step([(seq, len(prompt))])
    right = [token for token in range(VOCAB_SIZE) if token % 7 == 1]
    # Whatever is drawn of these masks was drafted: the second one's tokens, and then the third one's.
    sampling = msgspec.structs.replace(sampling, logit_bias={right[3]: 100.0, right[3] + 1: 100.0})
    seq.sampling, draft = sampling, (right[3], right[3] + 1, right[3] + 2)
    row = BatchRow(seq, 1 + len(draft), draft)
    driver.grow(seq, row.end)
    [output] = engine.step(Batch([row])).rows
    assert [token.token_id for token in output.runs[0]] == list(draft[:2])
    assert not output.grammar_failure and output.is_finite
    seq.token_ids.extend(draft[:2])
    seq.num_computed_tokens += 2
    [output] = engine.step(Batch([BatchRow(seq, 1)])).rows
    assert output.grammar_failure == "as asked" and not output.runs


def _alone(engine: Engine, prompt: list[int]) -> tuple[SampledToken, ...]:
    driver = Driver(engine)
    seq: Sequence = driver.add(prompt, _greedy())
    return driver.step([(seq, len(prompt))])[0]


@every_kind
def test_a_promise_of_equal_bits_has_a_name_and_is_kept(model_dir: Path, name: str) -> None:
    engine = _engine(model_dir, name)
    assert bool(engine.runner.results) == bool(KINDS[name].fields.get("deterministic"))
    assert engine.spec.results == engine.runner.results
    if engine.runner.results:
        asked = prompts([7, 40, 33, 1], 500)
        driver = Driver(engine)
        seqs = [driver.add(prompt, _greedy()) for prompt in asked]
        together = driver.step([(seq, seq.num_tokens) for seq in seqs])
        assert together == [_alone(engine, prompt) for prompt in asked]
