"""Two ranks in C++ say what one says, within bfloat16's rounding, however many tokens a step has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.engine.cpu import model
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.default import cache_dir

from ...checkpoints import Family, write_checkpoint
from ...engine_driver import engine_config
from .judged import judged, judged_by_ranks

pytestmark = pytest.mark.usefixtures("native")

TOLERANCE = 0.15  # of a log-probability; those of these models spread over some 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"biases": True, "hidden_size": 72, "intermediate_size": 100, "vocab_size": 515}),
        ("mistral", {"sliding_window": 40, "tie_embeddings": True, "vocab_size": 511}),
        ("qwen3", {"head_dim": 32, "num_qo_heads": 8}),
        ("qwen2", {"num_kv_heads": 1}),
        ("gemma3_text", {"head_dim": 32}),
        ("olmo3", {}),
        ("cohere2", {"hidden_size": 128, "config": {"attention_bias": True}}),
        ("llama", {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "quantization": "int8"}),
    ],
)
def test_two_ranks_compute_what_one_computes(tmp_path: Path, family: Family, fields: dict[str, object]) -> None:
    fields = dict(fields)
    common: dict[str, object] = {"dtype": "bfloat16", "quantization": fields.pop("quantization", None)}
    shape = {"tokenizer": False, "dtype": "bfloat16"} | fields
    model_dir = write_checkpoint(tmp_path, family, **shape)  # type: ignore[arg-type]
    expected = judged(Engine(engine_config(model_dir, **common), num_blocks=64))
    config = engine_config(model_dir, tensor_parallel_size=2, num_threads=2, **common)
    found = judged_by_ranks(config)
    known = [
        index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one.token_id == other.token_id
    ]
    assert len(known) > 0.95 * len(expected) > 250  # what is said may nearly tie
    for index in known:
        assert found[index].logprob == pytest.approx(expected[index].logprob, abs=TOLERANCE)


@pytest.mark.parametrize("fails_here", [True, False])
def test_all_ranks_do_without_what_one_could_not_load(monkeypatch: pytest.MonkeyPatch, fails_here: bool) -> None:
    said = []

    class OfTwo(Communicator):
        def minimum(self, value: int, device: torch.device) -> int:
            said.append(value)
            return 0

    if fails_here:
        monkeypatch.setattr(model, "load", _unavailable)
    with pytest.raises(NativeUnavailable, match="no compiler" if fails_here else "another rank"):
        model._common_library(OfTwo(), cache_dir(), "auto", is_float32=False)
    assert said == [0 if fails_here else 1]


def _unavailable(*_: object, **__: object) -> None:
    raise NativeUnavailable("no compiler")
