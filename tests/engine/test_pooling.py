"""Embeddings of every runner, judged by transformers in float32: whole, in chunks, beside answers, of one token."""

from __future__ import annotations

from array import array
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvferry.common.batch import Batch, BatchRow
from kvferry.common.request import Pooling, Sequence
from kvferry.common.vectors import add, unit, values_of

from ..checkpoints import put_nan, write_checkpoint
from ..engine_driver import Driver, make_engine, prompts
from .test_runners import FLOAT32, KINDS, VOCAB_SIZE, _engine, every_kind, model_dir

__all__ = ["model_dir"]
EXACT, ROUNDED = 1 - 1e-5, 1 - 2e-3  # the least cosine, in float32 and in bfloat16
TOKENS = prompts([1, 17, 70, 33], VOCAB_SIZE)


@cache
def _states(model_dir: Path, token_ids: tuple[int, ...]) -> Tensor:
    """Return the last hidden states behind the final norm, [num_tokens, hidden_size] float32."""
    import transformers

    model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    with torch.inference_mode():
        states: Tensor = model(torch.tensor([token_ids])).last_hidden_state[0]
    return states


def _expected(model_dir: Path, token_ids: list[int], pooling: Pooling) -> Tensor:
    states = _states(model_dir, tuple(token_ids))
    pooled = {Pooling.LAST: states[-1], Pooling.CLS: states[0], Pooling.MEAN: states.mean(0)}[pooling]
    return torch.nn.functional.normalize(pooled, dim=0)


def _embed(driver: Driver, seqs: list[Sequence], chunk: int) -> list[Tensor]:
    """Compute all prompts together, `chunk` tokens of each a step, beside an answer of one token a step."""
    answer, sums = driver.add([5, 6, 7]), dict.fromkeys(map(id, seqs), b"")
    while running := [seq for seq in seqs if seq.num_uncomputed_tokens]:
        counts = [(seq, min(chunk, seq.num_uncomputed_tokens)) for seq in (answer, *running)]
        batch = Batch([BatchRow(seq, count) for seq, count in sorted(counts, key=lambda row: row[1] != 1)])
        for row in batch.rows:
            driver.grow(row.seq, row.end)
        output = driver.engine.step(batch)
        for row, result in zip(batch.rows, output.rows, strict=True):
            assert result.is_finite
            row.seq.num_computed_tokens += row.num_scheduled_tokens
            if row.seq is answer:
                answer.token_ids += [run[0].token_id for run in result.runs]
            else:
                assert not result.runs
                sums[id(row.seq)] = add(sums[id(row.seq)], result.pooled)
    assert answer.num_output_tokens
    return [torch.tensor(values_of(_unit(sums[id(seq)]))) for seq in seqs]


def _unit(vector: bytes) -> bytes:
    scaled = unit(vector)
    assert scaled is not None
    return scaled


def _embedded(driver: Driver, token_ids: list[int], pooling: Pooling) -> Sequence:
    seq = driver.add(token_ids)
    seq.samples, seq.pooling = False, pooling
    return seq


@pytest.mark.slow
@every_kind
@pytest.mark.parametrize("chunk", [1000, 16, 1])
def test_vectors_are_those_of_transformers(model_dir: Path, name: str, chunk: int) -> None:
    driver = Driver(_engine(model_dir, name))
    least = EXACT if KINDS[name].tolerance == FLOAT32 else ROUNDED
    asked = [(token_ids, pooling) for token_ids in TOKENS for pooling in Pooling]
    seqs = [_embedded(driver, token_ids, pooling) for token_ids, pooling in asked]
    for (token_ids, pooling), vector in zip(asked, _embed(driver, seqs, chunk), strict=True):
        cosine = float(vector @ _expected(model_dir, token_ids, pooling))
        assert cosine >= least, f"{len(token_ids)} tokens by {pooling}: {cosine}"


@pytest.mark.parametrize("name", ["torch float32", "native float32"])
def test_in_float32_every_value_is_close(model_dir: Path, name: str) -> None:
    driver = Driver(_engine(model_dir, name))
    [vector] = _embed(driver, [_embedded(driver, TOKENS[2], Pooling.LAST)], 1000)
    torch.testing.assert_close(vector, _expected(model_dir, TOKENS[2], Pooling.LAST), atol=1e-5, rtol=1e-4)


def test_states_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    path = put_nan(write_checkpoint(tmp_path / "model", tokenizer=False), "model.embed_tokens.weight", 3)
    driver = Driver(make_engine(path, dtype="float32"))
    seqs = [_embedded(driver, [1, 2, 3], Pooling.LAST), _embedded(driver, [4, 5, 6], Pooling.MEAN)]
    for seq in seqs:
        driver.grow(seq, 3)
    spoilt, sound = driver.engine.step(Batch([BatchRow(seq, 3) for seq in seqs])).rows
    assert not spoilt.is_finite and not spoilt.pooled
    assert sound.is_finite and len(array("f", sound.pooled)) == driver.engine.model_config.hidden_size
