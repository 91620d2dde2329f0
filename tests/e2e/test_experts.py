"""Experts between workers that split them otherwise: the tokens of `transformers`, for 32 prompts of up to 3,000."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from kvferry.tools.load.tiny_model import write_tiny_model

from . import reference
from .cluster import serve
from .test_exactness import LENGTHS, NUM_TOKENS, _complete

_VOCABULARY = 420  # ids from 4 on that the model has in any case
PROMPTS = [
    [(7 * i * i + 13 * i * n + 31 * n) % _VOCABULARY + 4 for i in range(size)] for n, size in enumerate(LENGTHS, 1)
]
Pool = tuple[int, bool]  # ranks, and whether each has whole experts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_experts=8)


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [((2, False), (2, True)), ((1, False), (2, True)), ((2, True), (1, False))],
    ids=["shared to whole", "one rank to whole", "whole to one rank"],
)
def test_pools_may_split_experts_otherwise(model_dir: Path, tmp_path: Path, prefill: Pool, decode: Pool) -> None:
    pools = {
        name: {"workers": 1, "tensor_parallel_size": ranks, "enable_expert_parallel": whole}
        for name, (ranks, whole) in (("prefill", prefill), ("decode", decode))
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(pools))
    flags = ["--served-model-name", "tiny", "--device", "cpu", "--dtype", "float32", "--no-local-prefill"]
    with serve(model_dir, tmp_path / "log", *flags, "--config", str(tmp_path / "settings.yaml")) as cluster:
        answers = asyncio.run(_complete(cluster, PROMPTS, NUM_TOKENS, "a salt"))
        assert cluster.metric("kvferry_fallback_total") == 0
    reference.Teacher(model_dir).assert_greedy(PROMPTS, answers, f"{prefill} to {decode}")
