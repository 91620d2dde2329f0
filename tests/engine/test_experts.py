"""Mixtures of experts say what transformers says, token for token, on any number of ranks and in any company."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvferry.common.errors import ConfigError
from kvferry.common.request import SamplingParams
from kvferry.engine.engine import Engine
from kvferry.engine.nn.decoder import Decoder
from kvferry.engine.nn.loading import load_weights
from kvferry.engine.ranks.communicator import Communicator
from kvferry.engine.ranks.group import RankGroup
from kvferry.models.checkpoint import check_checkpoint
from kvferry.models.config import ModelConfig
from kvferry.models.parts.expert_plan import ExpertPlan
from kvferry.router.state.expert_load import ExpertLoad

from ..engine_driver import Driver, engine_config, make_engine, prompts
from ..transformers_checkpoints import NEMOTRON_H_MOE, SMALL, write_model
from .transformers_reference import reference_logprobs

LENGTHS = [1, 2, 15, 16, 17, 40, 100, 300, 1, 33]
NUM_FED = 7  # tokens of an answer: all but the last
SURE_GAP = 1e-4  # of a log-probability; below it two right implementations may disagree on the best token
QWEN3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = {
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 20,
    "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}
    | {"rope_theta": 150_000.0},
}
GRANITE = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "residual_multiplier": 0.22}
GRANITE |= {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 2.0}
HUNYUAN = {"num_experts": 8, "moe_topk": 3, "intermediate_size": 32}
OLMOE = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32}
GLM_4 = {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
EXAONE = QWEN3 | {"num_hidden_layers": 4, "sliding_window": 20, "routed_scaling_factor": 2.5}
ERNIE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 32,
    "moe_layer_interval": 2,
    "moe_layer_end_index": 2,
}
NARROW = NEMOTRON_H_MOE | {"layers_block_type": ["full_attention", "moe", "mlp"], "moe_latent_size": 32}
SOLAR_OPEN = {key: GLM_4[key] for key in GLM_4.keys() - {"use_qk_norm"}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Moe", QWEN3),
    "granite": ("GraniteMoe", GRANITE),
    "hunyuan": ("HunYuanMoEV1", HUNYUAN),
    "qwen3 normalised": ("Qwen3Moe", QWEN3 | {"norm_topk_prob": True, "attention_bias": True}),
    "qwen3 every second": ("Qwen3Moe", QWEN3 | {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    "qwen3 one dense": ("Qwen3Moe", QWEN3 | {"mlp_only_layers": [0]}),
    "qwen3 of one": ("Qwen3Moe", QWEN3 | {"num_experts_per_tok": 1}),
    "qwen3 window": ("Qwen3Moe", QWEN3 | {"use_sliding_window": True, "sliding_window": 20}),
    "qwen3 ties": ("Qwen3Moe", QWEN3),
    "qwen3 all to the same": ("Qwen3Moe", QWEN3),
    "mixtral": ("Mixtral", MIXTRAL),
    "gpt-oss": ("GptOss", GPT_OSS),
    "olmoe": ("Olmoe", OLMOE),
    "glm4": ("Glm4Moe", GLM_4),
    "glm4 air": ("Glm4Moe", GLM_4 | {"use_qk_norm": False, "attention_bias": True, "routed_scaling_factor": 1.0}),
    "minimax": ("MiniMaxM2", MIXTRAL | {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "exaone": ("ExaoneMoe", EXAONE),
    "ernie4.5": ("Ernie4_5_Moe", ERNIE),
    "dots1": ("Dots1", GLM_4 | {"head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 2}),
    "solar open": ("SolarOpen", SOLAR_OPEN),
    "layers of one block": ("NemotronH", NEMOTRON_H_MOE | {"layers_block_type": ["full_attention", "moe"] * 2}),
    "narrower rows": ("NemotronH", NARROW),
    "mixtral window": ("Mixtral", MIXTRAL | {"sliding_window": 20}),
}


PLAN = ExpertPlan(8, 2, dict.fromkeys(range(2), ((0, 1, 2, 3, 5, 6), (0, 1, 2, 4, 5, 7))))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    root = tmp_path_factory.mktemp("models")
    for name, (kind, fields) in VARIANTS.items():
        write_model(root / name, getattr(transformers, f"{kind}Config")(**SMALL | fields))
    for name, rows in (("qwen3 ties", slice(1, 6)), ("qwen3 all to the same", slice(None))):
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        for gate in (tensor for key, tensor in tensors.items() if key.endswith("mlp.gate.weight")):
            gate[rows] = gate[1].clone() if name.endswith("ties") else 0
        save_file(tensors, file, metadata={"format": "pt"})
    return root


def _answers(engine: Engine) -> list[list[int]]:
    driver = Driver(engine)
    return driver.generate([driver.add(prompt) for prompt in prompts(LENGTHS)])


def _assert_as_transformers(model_dir: Path, answers: list[list[int]]) -> None:
    compared = 0
    for prompt, answer in zip(prompts(LENGTHS), answers, strict=True):
        expected = reference_logprobs(model_dir, (*prompt, *answer))[len(prompt) - 1 : -1]
        best = expected.topk(2)
        for token, values, ids in zip(answer, best.values, best.indices, strict=True):
            if values[0] - values[1] < SURE_GAP:
                break
            assert token == ids[0], f"prompt of {len(prompt)} tokens"
            compared += 1
    assert compared > 0.8 * sum(map(len, answers))


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_transformers(models: Path, variant: str) -> None:
    check_checkpoint(models / variant, ModelConfig.from_dir(models / variant))
    _assert_as_transformers(models / variant, _answers(make_engine(models / variant)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "whole_experts", "plan", "exchange"),
    [
        ("qwen3 one dense", True, None, "sum"),
        ("qwen3 one dense", True, None, "all_to_all"),
        ("gpt-oss", False, None, "sum"),
        ("gpt-oss", True, PLAN, "all_to_all"),
        ("qwen3 ties", True, PLAN, "all_to_all"),
        ("qwen3 all to the same", True, PLAN, "sum"),
        ("qwen3 all to the same", True, PLAN, "all_to_all"),
        ("mixtral window", True, None, "all_to_all"),
        ("olmoe", False, None, "sum"),
        ("granite", True, PLAN, "all_to_all"),
        ("hunyuan", True, PLAN, "all_to_all"),
        ("glm4", True, None, "all_to_all"),
        ("narrower rows", False, None, "sum"),
        ("narrower rows", True, None, "all_to_all"),
    ],
    ids=str,
)
def test_ranks_share_experts(
    models: Path, tmp_path: Path, variant: str, whole_experts: bool, plan: ExpertPlan | None, exchange: str
) -> None:
    split: dict[str, object] = {"tensor_parallel_size": 2, "enable_expert_parallel": whole_experts}
    split["expert_exchange"] = exchange
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan.text())
        split["expert_plan"] = tmp_path / "plan.json"
    config = engine_config(models / variant, **split)
    experts, num_fed = ModelConfig.from_dir(models / variant).experts, sum(LENGTHS) + NUM_FED * len(LENGTHS)
    assert experts is not None
    group = RankGroup.start(config, num_blocks=128)
    try:
        engine = Engine(config, tp_size=2, num_blocks=128, group=group)
        answers = _answers(engine)
        for layer in engine.expert_loads():
            half = len(layer.taken) // 2
            held = (range(half), range(half, 2 * half)) if plan is None else plan.held(layer.layer)
            assert sum(layer.taken) == num_fed * experts.num_chosen
            loads = [sum(layer.taken[i] / sum(i in own for own in held) for i in own) for own in held]
            assert list(layer.of_ranks) == (list(map(int, loads)) if whole_experts else [])
    finally:
        group.close()
    _assert_as_transformers(models / variant, answers)


def test_a_skewed_gate_shows(models: Path) -> None:
    engine = make_engine(models / "qwen3 all to the same")
    _answers(engine)
    for layer in engine.expert_loads():
        assert sorted(layer.taken)[:5] == [0] * 5  # ties: the same three of eight
    assert ExpertLoad.after(None, engine.expert_loads()).imbalance == pytest.approx(8 / 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_own_experts_alone(models: Path, rank: int) -> None:
    comm = Communicator()
    comm.rank, comm.size = rank, 2
    config = ModelConfig.from_dir(models / "qwen3")
    decoder = Decoder(config, comm, dtype=torch.float32, device=torch.device("cpu"), expert_plan=ExpertPlan(8, 2))
    load_weights(decoder, models / "qwen3", load_format="auto", seed=0)
    held = {int(slot.name.split(".")[5]) for slot in decoder.slots() if ".experts." in slot.name}
    assert held == set(range(4 * rank, 4 * rank + 4))


@pytest.mark.parametrize(("whole_experts", "message"), [(True, "num_experts = 6"), (False, "intermediate_size = 30")])
def test_what_ranks_cannot_share_is_refused(models: Path, whole_experts: bool, message: str) -> None:
    config = ModelConfig.from_dir(models / "qwen3")
    assert config.experts is not None
    experts = replace(config.experts, num_experts=6, intermediate_size=30)
    with pytest.raises(ConfigError, match=message):
        replace(config, num_kv_heads=4, experts=experts).check_tp_size(4, whole_experts=whole_experts)


def test_experts_are_rounded_at_load_and_their_gate_is_not(models: Path) -> None:
    engine = make_engine(models / "qwen3", quantization="int8", dtype="float32")
    driver = Driver(engine)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=0)
    (prompt,) = prompts([60])
    ((token,),) = driver.step([(driver.add(prompt, sampling), 60)])
    expected = reference_logprobs(models / "qwen3", tuple(prompt))[-1]
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=0.5)
    form = engine.model_config.quantization
    assert form is not None and form.form(["model.layers.0.mlp.gate"], 64) is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9"),
        ("qwen3", {"topk_method": "random"}, "topk_method = 'random'"),
        ("glm4", {"n_group": 3, "topk_group": 1}, "n_group = 3"),
        ("qwen3", {"mlp_only_layers": 1}, "mlp_only_layers = 1"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(
    models: Path, tmp_path: Path, name: str, fields: dict[str, object], message: str
) -> None:
    raw = json.loads((models / name / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dir(tmp_path)


def test_a_row_does_not_feel_its_neighbours_in_exact_mode(models: Path) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2)
    engine = make_engine(models / "qwen3", deterministic=True)

    asked = prompts([5, 40, 17, 1, 23])
    together = Driver(engine)
    seqs = [together.add(prompt, sampling) for prompt in asked]
    found = [together.step([(seq, seq.num_uncomputed_tokens) for seq in seqs]) for _ in range(3)]
    for index, prompt in enumerate(asked):
        alone = Driver(engine)
        seq = alone.add(prompt, sampling)
        assert [alone.step([(seq, seq.num_uncomputed_tokens)])[0] for _ in range(3)] == [step[index] for step in found]


@pytest.mark.parametrize(
    ("size", "rank", "plan"), [(1, 0, None), (2, 1, None), (2, 1, ExpertPlan(8, 2)), (2, 1, PLAN)], ids=repr
)
def test_experts_in_mxfp4_are_what_they_mean(
    models: Path, tmp_path: Path, size: int, rank: int, plan: ExpertPlan | None
) -> None:
    """A checkpoint in MXFP4 loads as the plain one of the numbers that transformers makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain, packed = (tmp_path / name for name in ("plain", "packed"))
    tensors = load_file(models / "gpt-oss" / "model.safetensors")
    stored = dict(tensors)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 3]:
        experts, inputs, outputs = tensors[name].shape
        blocks = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 128, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        del stored[name]
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    raw = json.loads((models / "gpt-oss" / "config.json").read_text())
    for path, kept, more in (
        (plain, tensors, {}),
        (packed, stored, {"quantization_config": {"quant_method": "mxfp4"}}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw | more))
        save_file(kept, path / "model.safetensors")
    check_checkpoint(packed, ModelConfig.from_dir(packed))
    comm = Communicator()
    comm.rank, comm.size = rank, size

    def load(path: Path) -> Decoder:
        config = ModelConfig.from_dir(path)
        decoder = Decoder(config, comm, dtype=torch.float32, device=torch.device("cpu"), expert_plan=plan)
        load_weights(decoder, path, load_format="auto", seed=0)
        return decoder

    for ours, theirs in zip(load(packed).slots(), load(plain).slots(), strict=True):
        assert torch.equal(ours.target, theirs.target), ours.name
