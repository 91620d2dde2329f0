"""Drafts change no bit of an answer where layers keep states: none is left behind a drafted token, right or wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry.common.batch import Batch, BatchRow, RowKind
from kvferry.common.errors import ConfigError
from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.engine import Engine

from ...engine_driver import Driver, make_engine, prompts
from .judged import native_engine
from .state_models import VARIANTS, write_states

pytestmark = pytest.mark.usefixtures("native")

SAID = 40
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=SAID, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.3, seed=5, max_tokens=SAID, ignore_eos=True, logprobs=0),
)
Answers = list[list[SampledToken]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_states(tmp_path_factory.mktemp("models"), VARIANTS)


def said(engine: Engine, draft_of: Callable[[int, int], tuple[int, ...]]) -> Answers:
    """Return what two sequences say beside each other, fed as a decode worker feeds them.

    `draft_of`: the number of a sequence, and how many tokens it has said, to its draft.
    """
    driver = Driver(engine)
    seqs = [driver.add(prompt, sampling) for prompt, sampling in zip(prompts([21, 9], 500), SAMPLINGS, strict=True)]
    found: Answers = [[], []]
    while min(map(len, found)) < SAID:
        rows = []
        for number, seq in enumerate(seqs):
            if (count := seq.num_output_tokens) < SAID:
                draft = draft_of(number, count)[: SAID - count - 1] if count else ()
                rows.append(BatchRow(seq, seq.num_uncomputed_tokens + len(draft), draft))
                driver.grow(seq, rows[-1].end)
        rows.sort(key=lambda row: [*RowKind].index(row.kind))
        for row, result in zip(rows, engine.step(Batch(rows)).rows, strict=True):
            [run] = result.runs
            row.seq.num_computed_tokens += row.num_known_tokens
            row.seq.num_fed_again = len(run) - 1
            row.seq.token_ids += [token.token_id for token in run]
            found[seqs.index(row.seq)] += run
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("variant", "block_size"), [*((each, 8) for each in VARIANTS), ("qwen3.5", 128)])
def test_drafts_change_no_bit(checkpoints: Path, variant: str, block_size: int) -> None:
    """Of every length, right for a while, over the ends of blocks; on one thread, and on two."""

    def engine(num_threads: int) -> Engine:
        return native_engine(checkpoints / variant, deterministic=True, block_size=block_size, num_threads=num_threads)

    plain = said(engine(1), lambda number, count: ())

    def draft(number: int, count: int) -> tuple[int, ...]:
        right = [token.token_id for token in plain[number][count : count + count * 5 % 8]]
        return tuple([*right, 9, 9, 9, 9, 9, 9][: count % 7])

    assert said(engine(2), draft) == plain


def test_exact_steps_are_refused_where_torch_would_take_them(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="deterministic: layers that keep a state have exact steps, and so specu"):
        Engine(make_engine(checkpoints / "qwen3.5").config.model_copy(update={"deterministic": True}), native=False)
