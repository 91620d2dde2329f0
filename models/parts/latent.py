"""Latent attention, as config.json tells it (DeepSeek-V2, section 2.1).

    query   nope_dim + rope_dim numbers of each head, made of q_rank numbers where there are so many
    latent  kv_rank numbers of a token, normed: of them each head's value is made, and its key but for
    key     rope_dim numbers of a token, turned by its position, the same for all heads

Latent and turned key are all that is kept of a token: kv_rank + rope_dim numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...common.errors import ConfigError
from .config_fields import ConfigFields
from .rope import rotary_fields

# What FlashInfer has kernels for: such latents and turned keys, and heads that fill tiles of so many queries evenly.
# Other numbers would leave a tile's last query without its last key: some more attend, and are left out (`cuda_heads`).
_CUDA_RANKS, _CUDA_ROPE_DIM = (128, 256, 512), 64
_CUDA_TILE = 128
# Tiles in a step. Its plan has room for 16,384; rows that fill none, and tiles whose keys are shared out, take some.
_CUDA_TILES = 15_000

Shape = tuple[int, ...]


@dataclass(slots=True, frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of the attention of each layer, of the whole model."""

    q_rank: int | None  # None: queries are made of the hidden state at once
    kv_rank: int
    nope_dim: int  # of a head's query and key: what is not turned
    rope_dim: int
    value_dim: int  # of a head's value
    bias: bool  # of the projections of hidden states, and of the output's
    is_interleaved: bool  # a turned pair's two numbers are neighbours in the checkpoint, not half a head apart
    score_scale: float

    @property
    def token_size(self) -> int:
        """Count the numbers that are kept of a token in a layer."""
        return self.kv_rank + self.rope_dim

    def check_cuda(self, num_heads: int, max_tokens: int) -> None:
        """Refuse what CUDA has no kernels for, of a rank's heads and a step's tokens. Raises ConfigError."""
        if self.kv_rank not in _CUDA_RANKS or self.rope_dim != _CUDA_ROPE_DIM:
            raise ConfigError(
                f"device: cuda has kernels for latents of {', '.join(map(str, _CUDA_RANKS))} numbers with "
                f"{_CUDA_ROPE_DIM} that are turned, the model's are {self.kv_rank} + {self.rope_dim}; use cpu"
            )
        if num_heads > _CUDA_TILE:
            raise ConfigError(f"device: cuda attends to latents with up to {_CUDA_TILE} heads a rank, not {num_heads}")
        num_heads = cuda_heads(num_heads)
        if max_tokens * num_heads > (most := _CUDA_TILES * _CUDA_TILE):
            raise ConfigError(
                f"max_num_batched_tokens: {max_tokens} tokens of {num_heads} heads over latents are too many a step "
                f"on cuda; possible: {most // num_heads}"
            )

    def shapes(self, name: str, hidden_size: int, num_heads: int) -> dict[str, Shape]:
        """Return the tensors of a layer's attention `name`, by their names in a checkpoint."""
        num_q, num_kv = num_heads * (self.nope_dim + self.rope_dim), num_heads * (self.nope_dim + self.value_dim)
        shapes: dict[str, Shape] = {f"{name}.q_proj.weight": (num_q, hidden_size)}
        biased = {"kv_a_proj_with_mqa": self.token_size, "o_proj": hidden_size}
        if self.q_rank is not None:
            shapes = {
                f"{name}.q_a_proj.weight": (self.q_rank, hidden_size),
                f"{name}.q_a_layernorm.weight": (self.q_rank,),
                f"{name}.q_b_proj.weight": (num_q, self.q_rank),
            }
            biased["q_a_proj"] = self.q_rank
        shapes |= {
            f"{name}.kv_a_proj_with_mqa.weight": (self.token_size, hidden_size),
            f"{name}.kv_a_layernorm.weight": (self.kv_rank,),
            f"{name}.kv_b_proj.weight": (num_kv, self.kv_rank),
            f"{name}.o_proj.weight": (hidden_size, num_heads * self.value_dim),
        }
        return shapes | {f"{name}.{part}.bias": (size,) for part, size in biased.items() if self.bias}


def cuda_heads(num_heads: int) -> int:
    """Return with how many heads CUDA's kernels attend for a rank of so many: a power of two."""
    return 1 << (num_heads - 1).bit_length()


def read_latent(fields: ConfigFields) -> LatentConfig:
    """Read the sizes of a family that has latents; defaults are the large models'. Raises ConfigError."""
    nope_dim, rope_dim = fields.count("qk_nope_head_dim", 128), fields.count("qk_rope_head_dim", 64)
    if rope_dim % 2:
        raise fields.refuse("qk_rope_head_dim", "must be even: rotary positions turn pairs")
    return LatentConfig(
        q_rank=fields.count("q_lora_rank", 1536) if fields.raw.get("q_lora_rank", 0) is not None else None,
        kv_rank=fields.count("kv_lora_rank", 512),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        value_dim=fields.count("v_head_dim", 128),
        bias=fields.flag("attention_bias", default=False),
        is_interleaved=fields.flag("rope_interleave", default=True),
        score_scale=(nope_dim + rope_dim) ** -0.5 * _score_factor(fields),
    )


def _score_factor(fields: ConfigFields) -> float:
    """Return what scores are multiplied by besides, where positions are stretched."""
    scaling = rotary_fields(fields)
    if (scaling.raw.get("rope_type") or scaling.raw.get("type") or "default") == "default":
        return 1.0
    share = scaling.raw.get("mscale_all_dim")
    if not share:
        return 1.0
    factor = scaling.number("factor")
    return 1.0 if factor <= 1 else (0.1 * scaling.number("mscale_all_dim") * math.log(factor) + 1.0) ** 2
