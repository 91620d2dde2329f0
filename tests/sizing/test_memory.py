"""What a rank is said to take, beside the tensors of a live engine."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from kvferry.engine.engine import Engine
from kvferry.engine.ranks.communicator import Communicator
from kvferry.models.config import ModelConfig
from kvferry.models.parts.expert_plan import ExpertPlan, even_split
from kvferry.sizing.memory import block_tokens, cache_token_bytes, weight_bytes

from ..engine_driver import engine_config

NUM_BLOCKS = 64
_SMALL: dict[str, object] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, object] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_STACKED: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
_MAMBA: dict[str, object] = {
    "layer_types": ["mamba", "attention", "mamba"],
    "mamba_n_heads": 8,
    "mamba_d_state": 48,
    "mamba_proj_bias": True,
    "shared_intermediate_size": 512,
    "num_local_experts": 0,
}
_LONE: dict[str, object] = {"num_hidden_layers": 6, "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2}
_LONE_EXPERTS: dict[str, object] = _LONE | {
    "hybrid_override_pattern": "ME*EM-",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
}
_WIDE: dict[str, object] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "attention_k_eq_v": True,
    "global_head_dim": 128,
    "hidden_size_per_layer_input": 64,
    "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": 1024,
}
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama, its head tied": ("Llama", {"tie_word_embeddings": True, "vocab_size": 2048}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "an odd vocabulary": ("Llama", {"vocab_size": 1511}),
    "sizes that fill no tile": (
        "Llama",
        {"hidden_size": 336, "head_dim": 96, "num_attention_heads": 8, "vocab_size": 700},
    ),
    "mistral, wide": ("Mistral", {"intermediate_size": 1536, "sliding_window": 64}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 4}),
    "one head for all ranks": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3, deep, tied": ("Qwen3", {"num_hidden_layers": 6, "tie_word_embeddings": True}),
    "experts": ("Qwen3Moe", _EXPERTS),
    "experts in every second layer": ("Qwen3Moe", _EXPERTS | {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "stacked experts": ("GptOss", _STACKED),
    "stacked experts in MXFP4": ("GptOss", _STACKED | {"quantization_config": {"quant_method": "mxfp4"}}),
    "numbers in NVFP4": ("Llama", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
    "experts in NVFP4": (
        "Qwen3Moe",
        _EXPERTS | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
    ),
    "layers of one block": ("NemotronH", _LONE | {"hybrid_override_pattern": "M-M*-M"}),
    "layers of one block, with experts": ("NemotronH", _LONE_EXPERTS),
    "experts of narrower rows": ("NemotronH", _LONE_EXPERTS | {"moe_latent_size": 128}),
    "gemma 2": ("Gemma2", {}),
    "heads of two sizes": ("Gemma4", _WIDE | {"hidden_size_per_layer_input": 0}),
    "experts beside an MLP": (
        "Gemma4",
        _WIDE | _EXPERTS | {"enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0},
    ),
    "borrowed keys": ("Gemma4", _WIDE | {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    "convolutions": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "conv_L_cache": 3}),
    "states of one group": ("GraniteMoeHybrid", _MAMBA),
    "states of groups": ("GraniteMoeHybrid", _MAMBA | {"mamba_n_groups": 4}),
    "experts whose inputs are weighed": (
        "Llama4",
        {
            "num_local_experts": 4,
            "intermediate_size": 256,
            "intermediate_size_mlp": 768,
            "interleave_moe_layer_step": 2,
        },
    ),
    "states beside keys": ("FalconH1", {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_state": 48}),
    "olmo 2, norms of whole projections": ("Olmo2", {}),
    "phi 3, fused": ("Phi3", {"pad_token_id": 0}),
    "latents and experts": (
        "DeepseekV3",
        {
            "q_lora_rank": 96,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 256,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
}
_STATES: dict[str, object] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 48,
}
_GATED: dict[str, object] = _EXPERTS | {"shared_expert_intermediate_size": 256}
IN_FLOAT32: dict[str, tuple[str, dict[str, object]]] = {
    "states": ("Qwen3_5", _STATES),
    "states, key head by key head, and experts": ("Qwen3Next", _STATES | _GATED),
    "a shared expert with a gate": ("Qwen2Moe", _GATED),
}
PRECISIONS = ("plain", "int8", "int4")


@pytest.fixture(scope="module", autouse=True)
def _own_objects_alone() -> None:
    """Objects of what ran before in this process stay out of collections and lists of objects: a second for each."""
    gc.collect()
    gc.freeze()


class _FakeRank(Communicator):
    """A rank whose collectives are never used: only its shards matter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class _LoneRank(Engine):
    """The first rank of several, alone."""

    def _connect(self, tp_rank: int, tp_size: int, store: object) -> Communicator:
        return _FakeRank(tp_size)


def _storages() -> dict[int, int]:
    """The memory of all tensors that are alive, by its address."""
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor:
            if each.is_mkldnn:
                found[id(each)] = each.numel() * each.element_size()
            else:
                found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return found


def _taken(config: object, num_ranks: int) -> int:
    gc.collect()
    before = _storages()
    engine = _LoneRank(config, tp_size=num_ranks, num_blocks=NUM_BLOCKS)  # type: ignore[arg-type]
    gc.collect()
    pages = engine.kv_pages
    after = _storages() | {pages.untyped_storage().data_ptr(): pages.nbytes}  # without what aligns them
    return sum(size for address, size in after.items() if address not in before)


def _splits(path: Path, model: ModelConfig, num_ranks: int) -> list[dict[str, object]]:
    """Of experts: parts, whole ones, a plan by which the first rank has one more, and tokens that are exchanged."""
    if model.experts is None or num_ranks == 1:
        return [{}]
    first, second = even_split(model.experts.num_experts, num_ranks)
    layers = [layer for layer, is_sparse in enumerate(model.sparse_layers) if is_sparse]
    plan = ExpertPlan(model.experts.num_experts, num_ranks, dict.fromkeys(layers, ((*first, second[-1]), second)))
    (path / "plan.json").write_text(plan.text())
    whole: dict[str, object] = {"enable_expert_parallel": True}
    return [{}, whole, whole | {"expert_plan": path / "plan.json"}, whole | {"expert_exchange": "all_to_all"}]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_that_of_a_live_rank(tmp_path: Path, name: str, dtype: str, num_ranks: int) -> None:
    kind, fields = SHAPES[name]
    shape = {"architectures": [f"{kind}ForCausalLM"], "torch_dtype": dtype}
    (tmp_path / "config.json").write_text(json.dumps(_SMALL | fields | shape))
    model = ModelConfig.from_dir(tmp_path)
    for precision in PRECISIONS if dtype == "bfloat16" and model.quantization is None else PRECISIONS[:1]:
        for split in _splits(tmp_path, model, num_ranks):
            config = engine_config(
                tmp_path,
                tensor_parallel_size=num_ranks,
                quantization=None if precision == "plain" else precision,
                load_format="dummy",
                swap_space=0,
                **split,
            )
            said = weight_bytes(config, model) + NUM_BLOCKS * block_tokens(config, model) * cache_token_bytes(
                config, model
            )
            assert said == pytest.approx(_taken(config, num_ranks), rel=0.03), (precision, split)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_weights_that_are_float32_in_every_model_are_counted(tmp_path: Path, name: str, num_ranks: int) -> None:
    """They are a hundredth of such small models: within a thousandth of all weights."""
    kind, fields = IN_FLOAT32[name]
    shape = {"architectures": [f"{kind}ForCausalLM"], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(_SMALL | fields | shape))
    model = ModelConfig.from_dir(tmp_path)
    for precision in PRECISIONS:
        asked = None if precision == "plain" else precision
        config = engine_config(
            tmp_path,
            tensor_parallel_size=num_ranks,
            quantization=asked,
            load_format="dummy",
            swap_space=0,
            block_size=16,
        )
        pages = NUM_BLOCKS * block_tokens(config, model) * cache_token_bytes(config, model)
        assert weight_bytes(config, model) == pytest.approx(_taken(config, num_ranks) - pages, rel=1e-3), precision


@pytest.mark.parametrize("name", ["llama", "experts"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_have_room_for_the_largest(tmp_path: Path, name: str, num_ranks: int) -> None:
    kind, fields = SHAPES[name]
    shape = {"architectures": [f"{kind}ForCausalLM"], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(_SMALL | fields | shape))
    model = ModelConfig.from_dir(tmp_path)
    for num_slots in (1, 8):
        config = engine_config(
            tmp_path,
            tensor_parallel_size=num_ranks,
            enable_lora=True,
            max_loras=num_slots,
            max_lora_rank=32,
            load_format="dummy",
            swap_space=0,
        )
        said = weight_bytes(config, model) + NUM_BLOCKS * block_tokens(config, model) * cache_token_bytes(config, model)
        assert said == pytest.approx(_taken(config, num_ranks), rel=0.03)
