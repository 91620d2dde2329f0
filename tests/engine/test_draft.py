"""A draft model in the engine: its keys and values are in its target's blocks, and it drafts what it would say."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvferry.common.batch import UNDRAFTED, Batch, BatchRow
from kvferry.common.errors import ConfigError
from kvferry.common.request import Sequence
from kvferry.engine.cuda.drafting import GraphDrafts
from kvferry.engine.engine import Engine
from kvferry.engine.other_ranks import OtherRanks
from kvferry.engine.ranks import group
from kvferry.engine.ranks.group import RankGroup

from ..checkpoints import Shape, write_checkpoint
from ..engine_driver import Driver, engine_config, prompts
from ..forks import Forks
from .cuda.emulation import LateDevice
from .test_runners import _Residues

BLOCK = 8
KINDS: dict[str, dict[str, object]] = {
    "native": {"dtype": "bfloat16"},
    "tiled": {"dtype": "float32"},
    "native, int8": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
}
TARGET = Shape(num_layers=3, hidden_size=128, num_qo_heads=4, num_kv_heads=2, head_dim=32, vocab_size=515)
SMALL = Shape(num_layers=3, hidden_size=64, num_qo_heads=2, num_kv_heads=1, head_dim=16, vocab_size=512, seed=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "target": write_checkpoint(folder / "target", shape=TARGET),
        "small": write_checkpoint(folder / "small", shape=SMALL),
    }


def make(models: dict[str, Path], draft: str | None, kind: str, *, native: bool = True, **fields: Any) -> Engine:
    speculative = {"method": "draft_model", "model": models[draft]} if draft else None
    config = engine_config(
        models["target"],
        **({"block_size": BLOCK, "deterministic": True, "speculative_config": speculative} | KINDS[kind] | fields),
    )
    engine = Engine(config, num_blocks=96, native=native)
    if kind.startswith("native") and type(engine.runner).__name__ != "NativeRunner":
        pytest.skip("no native code on this machine")
    return engine


def verify(driver: Driver, seqs: list[Sequence], drafted: dict[int, int], num_drafts: int, **moves: Any) -> int:
    """Run one step with drafts. `drafted`: up to where each one's draft model has computed. How many were right."""
    rows = []
    for seq in seqs:
        end = seq.num_computed_tokens + 1 + num_drafts
        span = (drafted[id(seq)], end if end % BLOCK == 0 else end - 1)
        driver.grow(seq, end)
        rows.append(BatchRow(seq, 1 + num_drafts, (UNDRAFTED,) * num_drafts, span))
    output = driver.engine.step(Batch(rows, **moves))
    assert output.draft_s > 0
    num_right = 0
    for row, result in zip(rows, output.rows, strict=True):
        run = result.runs[0]
        row.seq.token_ids += [token.token_id for token in run]
        row.seq.num_computed_tokens += len(run)
        drafted[id(row.seq)] = min(row.seq.num_computed_tokens, row.draft_span[1] if row.draft_span else 0)
        num_right += len(run) - 1
    return num_right


@pytest.mark.parametrize(
    ("draft", "kind"),
    [(draft, kind) for draft in ("target", "small") for kind in KINDS if (draft, kind) != ("small", "native, int8")],
)
def test_tokens_are_the_same_and_a_target_that_drafts_for_itself_is_always_right(
    models: dict[str, Path], draft: str, kind: str
) -> None:
    lengths = [5, 30, 16, 1]
    plain = Driver(make(models, None, kind))
    expected = plain.generate([plain.add(prompt) for prompt in prompts(lengths, 500)])
    driver = Driver(make(models, draft, kind))
    seqs = [driver.add(prompt) for prompt in prompts(lengths, 500)]
    for chunk in (11, 30):
        driver.step([(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in seqs if seq.num_uncomputed_tokens > 0])
        seqs_done = [seq for seq in seqs if seq.num_output_tokens]
        assert seqs_done
    drafted = {id(seq): seq.num_computed_tokens for seq in seqs}
    num_right = num_drafted = 0
    for num_drafts in (3, 1, 5, 2):
        num_right += verify(driver, seqs, drafted, num_drafts)
        num_drafted += num_drafts * len(seqs)
    for seq, tokens in zip(seqs, expected, strict=True):
        assert seq.output_token_ids[: len(tokens)] == tokens[: seq.num_output_tokens]
    if draft == "target":
        assert num_right == num_drafted
    else:
        assert num_right < num_drafted


def test_an_answer_follows_its_grammar_whatever_is_drafted(models: dict[str, Path]) -> None:
    answers = []
    for draft in (None, "small"):
        driver = Driver(make(models, draft, "tiled"))
        seqs = [driver.add(prompt) for prompt in prompts([9, 20], 500)]
        seqs[0].grammar = _Residues()
        driver.step([(seq, seq.num_tokens) for seq in seqs])
        drafted = {id(seq): seq.num_computed_tokens for seq in seqs}
        while min(seq.num_output_tokens for seq in seqs) < 6:
            if draft is None:
                driver.step([(seq, 1) for seq in seqs])
            else:
                verify(driver, seqs, drafted, 2)
        answers.append([seq.output_token_ids[:6] for seq in seqs])
    assert answers[0] == answers[1]
    assert [token % 7 for token in answers[0][0]] == list(range(6)) != [token % 7 for token in answers[0][1]]


def test_graphs_draft_what_is_drafted_one_by_one(models: dict[str, Path]) -> None:
    """Of rows with drafts of unlike lengths, behind tokens that the draft model has not seen."""
    engine = make(models, "small", "tiled", native=False)
    draft = engine._draft
    assert draft is not None
    device = LateDevice(draft._decoder, draft.pages.layers(engine.kv_pages))
    graphs = GraphDrafts(device, num_choices=draft._num_choices, block_size=BLOCK, spare_block=95)
    driver = Driver(engine)
    seqs = [driver.add(prompt) for prompt in prompts([5, 30, 16, 1], 515)]  # 512 and above are no tokens of the draft's
    driver.step([(seq, seq.num_tokens) for seq in seqs])
    for lengths, behind in (((2, 1, 4, 3), 0), ((1, 1, 1, 1), 1), ((1, 5, 1, 2), 1)):
        rows = []
        for seq, length in zip(seqs, lengths, strict=True):
            driver.grow(seq, seq.num_tokens + length)
            span = (seq.num_computed_tokens - behind, seq.num_tokens + length)
            rows.append(BatchRow(seq, 1 + length, (UNDRAFTED,) * length, span))
        drafts = graphs.propose(rows)
        assert drafts == draft._one_by_one(rows, OtherRanks(None, BLOCK).send)
        assert [len(tokens) for tokens in drafts] == list(lengths)
        driver.step([(seq, 1) for seq in seqs])
    assert device.sizes_run[-2:] == [(1, 1), (1, 1)], "the longest draft goes on alone"
    many = BatchRow(seqs[1], 2, (UNDRAFTED,), (0, seqs[1].num_tokens + 1))
    assert graphs.propose([many]) is None


def test_a_block_has_room_for_both_and_a_draft_makes_a_cache_another(models: dict[str, Path]) -> None:
    alone, small, own = (make(models, draft, "tiled") for draft in (None, "small", "target"))
    assert (alone.spec.num_layers, small.spec.num_layers, own.spec.num_layers) == (3, 4, 6)
    assert len({engine.spec.fingerprint for engine in (alone, small, own)}) == 3
    assert small.spec.block_bytes() == 4 * small.kv_pages[0, 0].numel() * 4


def test_a_draft_model_that_does_not_go_with_its_target_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    def refused(shape: Shape, **fields: Any) -> str:
        path = write_checkpoint(tmp_path / "other", shape=shape)
        with pytest.raises(ConfigError) as caught:
            make(models | {"other": path}, "other", "tiled", **fields)
        return str(caught.value)

    other = refused(Shape(vocab_size=300))
    assert "another tokenizer: token" in other
    assert str(tmp_path / "other") in other and str(models["target"]) in other
    short = refused(Shape(vocab_size=515, max_model_len=128))
    assert "has 128 positions, and the served one 2048" in short and "--max-model-len 128" in short
    assert "do not fit" in refused(Shape(num_kv_heads=4, head_dim=32))


class Teller:
    """Another rank's handler: it sends each page that it is told of to rank 0, and how full its draft pages are."""

    def __init__(self, engine: Engine, config: bytes, send: Callable[[bytes], None]) -> None:
        self._engine, self._send = engine, send

    def on_user(self, payload: bytes) -> None:
        pages = self._engine.kv_pages[self._engine.model_config.num_layers :]
        self._send(b"blocks %d" % sum(bool(pages[:, block].any()) for block in range(pages.shape[1])))

    def on_layer(self, layer_id: int) -> None:
        self._send(b"page %d" % layer_id)

    def close(self) -> None:
        """End: nothing is left to say."""


@contextmanager
def on_two_ranks(
    models: dict[str, Path], draft: str | None, kind: str, messages: queue.SimpleQueue[bytes]
) -> Iterator[tuple[Engine, RankGroup]]:
    speculative = {"method": "draft_model", "model": models[draft]} if draft else None
    fields = {"block_size": BLOCK, "deterministic": True, "speculative_config": speculative, "swap_space": 1 << 20}
    config = engine_config(models["target"], tensor_parallel_size=2, **(fields | KINDS[kind]))
    ranks = RankGroup.start(
        config,
        num_blocks=96,
        handler="kvferry.tests.engine.test_draft:Teller",
        on_message=lambda _, payload: messages.put(payload),
    )
    try:
        yield Engine(config, tp_size=2, num_blocks=96, group=ranks), ranks
    finally:
        ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize(("draft", "kind"), [("target", "native"), ("small", "native"), ("target", "native, int8")])
def test_ranks_share_a_draft_model_as_they_share_its_target(
    models: dict[str, Path], draft: str, kind: str, monkeypatch: pytest.MonkeyPatch, rank_forks: Forks
) -> None:
    """Blocks that move in the step that reads them, too. `small` has one KV head, which both ranks have."""
    monkeypatch.setattr(group, "subprocess", rank_forks)
    lengths, answers = [5, 30, 16, 1], list[list[int]]()
    for drafting in (None, draft):
        messages = queue.SimpleQueue[bytes]()
        with on_two_ranks(models, drafting, kind, messages) as (engine, ranks):
            if type(engine.runner).__name__ != "NativeRunner":
                pytest.skip("no native code on this machine")
            driver = Driver(engine)
            seqs = [driver.add(prompt) for prompt in prompts(lengths, 500)]
            if drafting is None:
                answers = driver.generate(seqs)
                continue
            driver.step([(seq, seq.num_tokens) for seq in seqs])
            drafted = {id(seq): seq.num_computed_tokens for seq in seqs}
            num_right = verify(driver, seqs, drafted, 3)
            out = [(block, slot) for slot, block in enumerate(seqs[1].block_table)]
            engine.step(Batch([], swap_out=out))
            seqs[1].block_table = []
            driver.grow(seqs[1], len(out) * BLOCK)
            back = [(slot, block) for (_, slot), block in zip(out, seqs[1].block_table, strict=True)]
            driver.grow(copy := driver.add(()), len(seqs[2].block_table) * BLOCK)
            copies = list(zip(seqs[2].block_table, copy.block_table, strict=True))
            seqs[2].block_table = copy.block_table
            num_right += verify(driver, seqs, drafted, 2, swap_in=back, block_copies=copies)
            num_right += verify(driver, seqs, drafted, 1)
            pages = [b"page %d" % page for page in range(engine.spec.num_layers)]
            assert [messages.get(timeout=60) for _ in range(4 * len(pages))] == pages * 4
            ranks.broadcast(b"count")
            own = engine.kv_pages[engine.model_config.num_layers :]
            assert messages.get(timeout=60) == b"blocks %d" % sum(bool(own[:, block].any()) for block in range(96))
            for seq, answer in zip(seqs, answers, strict=True):
                assert seq.output_token_ids[: len(answer)] == answer[: seq.num_output_tokens]
            assert (num_right == len(seqs) * (3 + 2 + 1)) == (draft == "target")
