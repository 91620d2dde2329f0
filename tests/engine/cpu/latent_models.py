"""Small checkpoints of DeepSeek's generations whose latents and heads fill vectors, as C++ wants them."""

from __future__ import annotations

from pathlib import Path

from ...deepseek import EXPERTS, YARN, Generation, write_deepseek

SIZES: dict[str, object] = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48}
MANY_HEADS: dict[str, object] = {"num_attention_heads": 48, "num_key_value_heads": 48}
PLAIN: dict[str, tuple[Generation, dict[str, object]]] = {
    "v3": ("v3", {"q_lora_rank": 56}),
    "v3 biased, pairs half a head apart": (
        "v3",
        {"q_lora_rank": None, "attention_bias": True, "rope_interleave": False},
    ),
    "v2, odd sizes, yarn": (
        "v2",
        {
            "kv_lora_rank": 96,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 32,
            "v_head_dim": 80,
            "hidden_size": 72,
            "rope_parameters": YARN,
        },
    ),
    "mistral 4, its queries grow": ("mistral4", EXPERTS["mistral4"] | {"first_k_dense_replace": 3}),
    "v3, many heads": ("v3", MANY_HEADS | {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16}),
}
SPARSE: dict[str, tuple[Generation, dict[str, object]]] = {
    "v2 with experts": ("v2", EXPERTS["v2"]),
    "v3 with experts": ("v3", EXPERTS["v3"]),
    "mistral 4 with experts": ("mistral4", EXPERTS["mistral4"]),
}
VARIANTS = PLAIN | SPARSE


def write_models(root: Path, variants: dict[str, tuple[Generation, dict[str, object]]]) -> Path:
    """Write each into a folder of its name, long enough for attention that is cut into parts."""
    for name, (generation, fields) in variants.items():
        own = SIZES | {"max_position_embeddings": 4096} | fields
        write_deepseek(root / name, generation, **own)  # type: ignore[arg-type]
    return root
