"""Attention in chunks on CUDA: what transformers' own class computes, in graphs and outside of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from kvferry.common.request import SampledToken
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.engine import Engine
from kvferry.engine.nn.attention.flashinfer_parts import FlashInferParts

from ..engine_driver import Driver, prompts
from ..transformers_checkpoints import LLAMA_4, SMALL, write_model
from .cuda.lockstep import two_ranks
from .test_chunks import VARIANTS
from .test_cuda_states import ATTENDED, GREEDY, NUM_TOKENS, _config, _generate, _ids, _judge

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
LENGTHS = [1, 35, 48, 95]  # a chunk has 48 tokens: it begins within an answer, a step and a row


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, fields in VARIANTS.items():
        config = transformers.Llama4TextConfig(**SMALL | ATTENDED | LLAMA_4 | fields)
        write_model(root / name, config, dtype=torch.bfloat16)
    return root


def _engine(model_dir: Path, **fields: object) -> Engine:
    return Engine(_config(model_dir, **fields), num_blocks=100)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_log_probabilities_are_those_of_transformers(checkpoints: Path, variant: str) -> None:
    found = list[list[list[SampledToken]]]()
    captured, launched = (_engine(checkpoints / variant, enforce_eager=eager) for eager in (False, True))
    for engine, chunk in ((captured, 10**9), (launched, 10**9), (launched, 37)):
        assert isinstance(engine.runner, CudaRunner)
        assert isinstance(engine.runner._attention, FlashInferParts)
        assert (engine.runner.pieces is None) == (engine is launched)
        found.append(_generate(engine, chunk, LENGTHS))
        _judge(checkpoints / variant, list(zip(prompts(LENGTHS), found[-1], strict=True)))
    assert _ids(found[0]) == _ids(found[1])


def test_two_ranks_yield_what_one_does(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(checkpoints / "scout", tensor_parallel_size=2)
    with two_ranks(monkeypatch, config, 100) as engine:
        answers = _generate(engine, lengths=LENGTHS)
    _judge(checkpoints / "scout", list(zip(prompts(LENGTHS), answers, strict=True)))


def test_steps_run_as_they_were_prepared_where_a_chunk_begins(checkpoints: Path) -> None:
    """The page that a chunk begins with is not known yet when the step is."""
    engine = _engine(checkpoints / "scout")
    assert isinstance(engine.runner, CudaRunner)
    pipeline = engine.runner.decode_pipeline
    assert pipeline is not None
    found = list[list[list[int]]]()
    for is_ahead in (True, False):
        driver = Driver(engine)
        seqs = [driver.add(prompt, GREEDY) for prompt in prompts([40, 45, 90])]
        for seq in seqs:
            driver.step([(seq, seq.num_tokens)])
        num_forecasts = pipeline.num_forecasts
        while seqs[0].num_output_tokens < NUM_TOKENS:
            if not is_ahead:
                pipeline._forecast = None
            driver.step([(seq, 1) for seq in seqs])
        assert (pipeline.num_forecasts > num_forecasts) == is_ahead
        found.append([seq.output_token_ids for seq in seqs])
    assert found[0] == found[1]


def test_pages_in_8_bits_are_attended_to_in_chunks(checkpoints: Path) -> None:
    answers = _generate(_engine(checkpoints / "scout", kv_cache_dtype="fp8"), lengths=LENGTHS)
    _judge(checkpoints / "scout", list(zip(prompts(LENGTHS), answers, strict=True)), near=0.05, most=0.6)
