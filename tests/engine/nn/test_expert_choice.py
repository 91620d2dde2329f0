"""A sparse layer computes what that of DeepSeek-V2 and V3 computes in transformers, whatever choice they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.engine.nn.builder import Builder
from kvferry.engine.nn.experts import SparseMLP
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig
from kvferry.models.families.experts import DEEPSEEK_V2, DEEPSEEK_V3
from kvferry.models.parts.config_fields import ConfigFields
from kvferry.models.parts.experts import read_experts, read_sparse_layers

from ...checkpoints import write_checkpoint
from ...transformers_checkpoints import SMALL, draw

COMMON = {"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "V2": {"topk_method": "greedy", "routed_scaling_factor": 1.5},
    "V2 groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    "V3": {"n_group": 3, "topk_group": 1},
    "V3 not normalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_of_deepseek(tmp_path: Path, variant: str) -> None:
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3

    version = variant[:2]
    config = getattr(transformers, f"Deepseek{version}Config")(**SMALL | COMMON | VARIANTS[variant])
    modules: Any = {"V2": modeling_deepseek_v2, "V3": modeling_deepseek_v3}[version]
    theirs = (modules.DeepseekV2Moe if version == "V2" else modules.DeepseekV3MoE)(config)
    draw(theirs)

    traits = {"V2": DEEPSEEK_V2, "V3": DEEPSEEK_V3}[version]
    fields = ConfigFields(tmp_path / "config.json", config.to_dict())
    experts = read_experts(fields, traits)
    assert experts is not None and experts.shared_size == 64
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False, hidden_size=SMALL["hidden_size"]))
    ours = SparseMLP(Builder(model, Communicator(), torch.float32, torch.device("cpu")), "", experts)
    stored = theirs.state_dict()
    for slot in (slot for leaf in ours.leaves() for slot in leaf.slots()):
        name = slot.name.removeprefix(".mlp.")
        if name.startswith("experts."):
            _, index, part, _ = name.split(".")
            fused = stored[f"experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}"][int(index)]
            halves = fused.chunk(2) if part != "down_proj" else (fused,)
            slot.target.copy_(halves[part == "up_proj"])
        else:
            slot.target.copy_(stored[name])
    for num_rows in (1, 16, 70):
        x = torch.randn(num_rows, SMALL["hidden_size"], generator=torch.Generator().manual_seed(num_rows))
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), theirs(x[None])[0], atol=1e-5, rtol=1e-4)


def test_the_first_layers_are_dense(tmp_path: Path) -> None:
    fields = ConfigFields(tmp_path, {"num_hidden_layers": 4, "first_k_dense_replace": 1})
    assert read_sparse_layers(fields, DEEPSEEK_V3) == (False, True, True, True)
    assert read_sparse_layers(ConfigFields(tmp_path, {"num_hidden_layers": 4}), DEEPSEEK_V3)[:3] == (False,) * 3


def test_more_groups_than_there_are_are_all_of_them(tmp_path: Path) -> None:
    fields = ConfigFields(tmp_path, COMMON | {"intermediate_size": 64, "n_group": 3, "topk_group": 5})
    experts = read_experts(fields, DEEPSEEK_V3)
    assert experts is not None and (experts.num_groups, experts.num_chosen_groups) == (3, 3)


def test_a_row_weighs_an_odd_number_of_experts_alike_at_any_place(tmp_path: Path) -> None:
    """Torch takes 32 numbers at a time, and rounds otherwise what is left over."""
    fields = ConfigFields(
        tmp_path, COMMON | {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "intermediate_size": 64}
    )
    experts = read_experts(fields, DEEPSEEK_V3)
    assert experts is not None and experts.scoring == "sigmoid"
    model = ModelConfig.from_dir(write_checkpoint(tmp_path, tokenizer=False, hidden_size=SMALL["hidden_size"]))
    gate = SparseMLP(Builder(model, Communicator(), torch.float32, torch.device("cpu")), "", experts).gate
    for slot in gate.slots():
        slot.target.copy_(torch.eye(*slot.shape) if len(slot.shape) == 2 else torch.zeros(slot.shape))
    rows = torch.randn(300, 16, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0))
    for tile in rows:
        here, moved = gate.choose(tile), gate.choose(tile.roll(3, 0))
        assert all(torch.equal(a.roll(3, 0), b) for a, b in zip(here, moved, strict=True))
