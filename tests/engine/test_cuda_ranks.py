"""Two ranks of CUDA: what transformers' own classes compute, in graphs in pieces and outside of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from kvferry.common.batch import Batch, BatchRow
from kvferry.engine.cuda.runner import CudaRunner
from kvferry.engine.nn.states import ForeignStateError

from ..engine_driver import Driver, prompts
from ..transformers_checkpoints import FALCON_H1, NEMOTRON_H_MOE, SMALL, STATES, write_model
from .cuda.lockstep import two_ranks
from .test_cuda_states import ATTENDED, GREEDY, LENGTHS, SHARED, _config, _generate, _judge
from .test_states import EXPERTS, LFM2, MAMBA

pytestmark = [
    pytest.mark.usefixtures("few_sizes"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs the extra kvferry[gpu]"),
]
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3.5": ("Qwen3_5Text", STATES),
    "qwen3 next": ("Qwen3Next", STATES | EXPERTS | SHARED),
    "lfm2": ("Lfm2", STATES | LFM2),
    "granite 4": ("GraniteMoeHybrid", STATES | MAMBA | {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "nemotron h, with experts": ("NemotronH", STATES | NEMOTRON_H_MOE),
    "falcon h1": ("FalconH1", STATES | FALCON_H1),
    "olmo 2": ("Olmo2", {"num_key_value_heads": 2}),
    "qwen 3, one head for both": ("Qwen3", {"num_key_value_heads": 1}),
}


def _write(path: Path, variant: str) -> None:
    kind, fields = VARIANTS[variant]
    write_model(path, getattr(transformers, f"{kind}Config")(**SMALL | ATTENDED | fields), dtype=torch.bfloat16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_log_probabilities_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    _write(tmp_path, variant)
    with two_ranks(monkeypatch, _config(tmp_path, tensor_parallel_size=2), 100) as engine:
        assert isinstance(engine.runner, CudaRunner) and engine.runner.pieces is not None
        answers = _generate(engine)
    _judge(tmp_path, list(zip(prompts(LENGTHS), answers, strict=True)))
    if variant in ("granite 4", "nemotron h, with experts"):
        with two_ranks(monkeypatch, _config(tmp_path, tensor_parallel_size=2, enforce_eager=True), 100) as engine:
            assert _generate(engine) == answers, "launched one by one"


@pytest.mark.parametrize("count", [1, 2])
def test_a_token_that_is_computed_again_ends_the_step_of_each_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """In pieces for rows of one token, and in those for any."""
    _write(tmp_path, "qwen3.5")
    config = _config(tmp_path, tensor_parallel_size=2)
    with (
        pytest.raises(ForeignStateError, match="3 states are not those"),  # the other rank's
        two_ranks(monkeypatch, config, 100) as engine,
    ):
        driver = Driver(engine)
        seq = driver.add(prompts([20])[0], GREEDY)
        driver.step([(seq, 20)])
        seq.num_computed_tokens -= 1
        with pytest.raises(ForeignStateError, match="3 states are not those"):
            engine.step(Batch([BatchRow(seq, count)]))
