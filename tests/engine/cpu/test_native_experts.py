"""Experts in C++ say what torch says in float32, within bfloat16's rounding, and exactly so in any company."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from kvferry.common.request import SampledToken, SamplingParams
from kvferry.engine.cpu import build
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.cpu.runner import NativeRunner
from kvferry.engine.engine import Engine
from kvferry.engine.ranks.group import RankGroup
from kvferry.models.default import cache_dir
from kvferry.models.experts import DEEPSEEK_V2, DEEPSEEK_V3, ExpertTraits
from kvferry.models.families import FAMILIES

from ...engine_driver import Driver, engine_config, prompts
from ...transformers_checkpoints import SMALL, write_model

QWEN3 = SMALL | {
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
}
TOLERANCE = 0.1  # the median of a log-probability's error; log-probabilities of these models spread over some 20
ROUNDED = 0.15  # that with inputs of products in 8 bits
JUDGED = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0, logprobs=0)


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        build.load(cache_dir())
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    return write_model(tmp_path_factory.mktemp("models") / "qwen3", transformers.Qwen3MoeConfig(**QWEN3))


def _judged(engine: Engine) -> list[SampledToken]:
    """Return log-probabilities of long and short prompts in chunks and beside answers, and of what is said then."""
    driver, found = Driver(engine), list[SampledToken]()
    seqs = [driver.add(prompt, JUDGED) for prompt in prompts([5, 200, 70], 500)]
    for counts in ((5, 130, 0), (1, 70, 70), (1, 1, 1)):
        rows = [(seq, count) for seq, count in zip(seqs, counts, strict=True) if count]
        for (seq, _), tokens in zip(rows, driver.step(rows), strict=True):
            found += tokens
            if tokens:
                seq.token_ids[-1] = 7  # whatever nearly ties
        found += [entry for row in driver.outputs[-1].rows for entry in row.prompt_logprobs]
    return found


def _engine(model_dir: Path, **fields: object) -> Engine:
    return Engine(engine_config(model_dir, **fields), num_blocks=64)


def _error(found: list[SampledToken], expected: list[SampledToken]) -> float:
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if one.token_id == other.token_id]
    assert len(pairs) > 0.95 * len(expected) > 250  # what is said may nearly tie
    errors = [abs(one.logprob - other.logprob) for one, other in pairs if one.logprob and other.logprob]
    return median(errors)


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        ({"num_threads": 3}, TOLERANCE),
        ({"quantization": "int8"}, ROUNDED),
        ({"quantization": "int4"}, ROUNDED),
        ({"cpu_isa": "avx2"}, TOLERANCE),
    ],
    ids=str,
)
def test_experts_compute_what_torch_computes(qwen3: Path, fields: dict[str, object], tolerance: float) -> None:
    expected = _judged(_engine(qwen3, dtype="float32", quantization=fields.get("quantization")))
    engine = _engine(qwen3, dtype="bfloat16", **fields)
    assert isinstance(engine.runner, NativeRunner)
    assert _error(_judged(engine), expected) < tolerance


@pytest.mark.parametrize(
    ("traits", "fields"),
    [
        (DEEPSEEK_V2, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_shared_experts": 2}),
        (DEEPSEEK_V3, {"n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}),
    ],
    ids=["V2", "V3"],
)
def test_choices_of_deepseek(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traits: ExpertTraits, fields: dict[str, Any]
) -> None:
    monkeypatch.setitem(FAMILIES, "Qwen3MoeForCausalLM", replace(FAMILIES["Qwen3MoeForCausalLM"], experts=traits))
    raw = json.loads((qwen3 / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = _judged(_engine(tmp_path, dtype="float32", load_format="dummy"))
    engine = _engine(tmp_path, dtype="bfloat16", load_format="dummy")
    assert isinstance(engine.runner, NativeRunner)
    assert _error(_judged(engine), expected) < TOLERANCE


@pytest.mark.parametrize("whole_experts", [False, True])
def test_two_ranks_share_experts(qwen3: Path, whole_experts: bool) -> None:
    config = engine_config(
        qwen3, dtype="bfloat16", tensor_parallel_size=2, num_threads=2, enable_expert_parallel=whole_experts
    )
    group = RankGroup.start(config, num_blocks=64)
    try:
        engine = Engine(config, tp_size=2, num_blocks=64, group=group)
        assert isinstance(engine.runner, NativeRunner)
        assert _error(_judged(engine), _judged(_engine(qwen3, dtype="float32"))) < TOLERANCE
    finally:
        group.close()


@pytest.mark.parametrize("fields", [{}, {"quantization": "int4"}], ids=str)
def test_a_token_has_the_same_bits_in_any_company(qwen3: Path, fields: dict[str, object]) -> None:
    asked = prompts([5, 170, 1, 64, 23], 500)
    answers = []
    for chunk, num_threads in ((10**9, 1), (67, 2), (None, 3)):
        engine = _engine(qwen3, dtype="bfloat16", deterministic=True, num_threads=num_threads, **fields)
        driver = Driver(engine)
        seqs = [driver.add(prompt, JUDGED) for prompt in asked]
        if chunk is not None:
            driver.generate(seqs, chunk=chunk)
        else:  # each alone
            for seq in seqs:
                driver.generate([seq])
        said = [
            (id(row), token.logprob)
            for output in driver.outputs
            for row in output.rows
            for token in (*row.prompt_logprobs, *(run[0] for run in row.runs))
        ]
        answers.append((sorted(logprob or 0.0 for _, logprob in said), [seq.output_token_ids for seq in seqs]))
    assert answers[0] == answers[1] == answers[2]


def test_what_experts_are_taken_is_counted(qwen3: Path) -> None:
    taken = []
    for dtype in ("float32", "bfloat16"):
        engine = _engine(qwen3, dtype=dtype)
        driver = Driver(engine)
        driver.step([(driver.add(prompt, JUDGED), 40) for prompt in prompts([40, 40], 500)])
        counts = engine.expert_counts()
        assert [len(layer) for layer in counts] == [16, 0, 16]
        taken.append(torch.tensor([counts[0], counts[2]]))
        assert taken[-1][0].sum() == 80 * 3
    assert (taken[0] - taken[1]).abs().sum() < 0.2 * taken[0].sum()
