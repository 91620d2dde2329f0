"""The decoder of the Llama family on packed tokens: [num_tokens, hidden_size], rows of many sequences in a line.

Which sequence a token belongs to is the attention backend's concern (it was planned for the step); this module
knows neither batches nor pages. One `Decoder` is one tensor-parallel rank's share of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.config import ModelConfig
from ..ranks.group import Communicator
from .attention.base import AttentionBackend
from .layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    ParallelHead,
    Part,
    RMSNorm,
    RotaryEmbedding,
    RowParallelLinear,
    VocabParallel,
    WeightSlot,
    rotate_,
)


class Attention:
    """QKV projection, optional head norms, rotation, attention over the pages, output projection."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        layer_id: int,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.layer_id = layer_id
        self.head_dim = config.head_dim
        self.num_qo_heads = config.num_qo_heads // comm.size
        self.num_kv_heads = config.num_kv_heads // comm.size
        num_q, num_kv = config.num_qo_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = (Part(f"{name}.q_proj", num_q), Part(f"{name}.k_proj", num_kv), Part(f"{name}.v_proj", num_kv))
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size, parts, comm, bias=config.qkv_bias, dtype=dtype, device=device
        )
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj", num_q, config.hidden_size, comm, bias=config.o_bias, dtype=dtype, device=device
        )
        self.head_norms: tuple[RMSNorm, ...] = ()
        if config.qk_norm:
            self.head_norms = tuple(
                RMSNorm(f"{name}.{part}_norm", config.head_dim, config.rms_norm_eps, dtype=dtype, device=device)
                for part in ("q", "k")
            )

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        out = self.attend(self.heads(x, rope), backend, on_layer)
        return self.o_proj(out.view(x.shape[0], self.num_qo_heads * self.head_dim))

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Return queries, keys and values as attention takes them, [num_tokens, heads of all three, head_dim]."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        heads = self.qkv_proj(x).view(x.shape[0], num_q + 2 * num_kv, self.head_dim)
        if self.head_norms:
            q_norm, k_norm = self.head_norms
            heads[:, :num_q] = q_norm(heads[:, :num_q])
            heads[:, num_q : num_q + num_kv] = k_norm(heads[:, num_q : num_q + num_kv])
        rotate_(heads[:, : num_q + num_kv], *rope)
        return heads

    def attend(self, heads: Tensor, backend: AttentionBackend, on_layer: Callable[[int], None] | None) -> Tensor:
        """Return attention's output, [num_tokens, num_qo_heads, head_dim]."""
        num_q, num_kv = self.num_qo_heads, self.num_kv_heads
        q, k, v = torch.split(heads, [num_q, num_kv, num_kv], 1)
        out = backend.forward(q, k, v, self.layer_id)
        if on_layer is not None:
            on_layer(self.layer_id)
        return out

    def slots(self) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.slots()
        yield from self.o_proj.slots()
        for norm in self.head_norms:
            yield from norm.slots()


class DecoderLayer:
    """Attention and gated MLP, each behind a norm and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer_id: int, comm: Communicator, *, dtype: torch.dtype, device: torch.device
    ):
        name, size = f"model.layers.{layer_id}", config.hidden_size
        mlp, bias = config.intermediate_size, config.mlp_bias
        self.input_norm = RMSNorm(f"{name}.input_layernorm", size, config.rms_norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, f"{name}.self_attn", layer_id, comm, dtype=dtype, device=device)
        self.mlp_norm = RMSNorm(
            f"{name}.post_attention_layernorm", size, config.rms_norm_eps, dtype=dtype, device=device
        )
        parts = (Part(f"{name}.mlp.gate_proj", mlp), Part(f"{name}.mlp.up_proj", mlp))
        self.gate_up_proj = ColumnParallelLinear(size, parts, comm, bias=bias, dtype=dtype, device=device)
        self.down_proj = RowParallelLinear(
            f"{name}.mlp.down_proj", mlp, size, comm, bias=bias, dtype=dtype, device=device
        )

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None,
    ) -> Tensor:
        x.add_(self.attention(self.input_norm(x), rope, backend, on_layer))
        return self.add_mlp_(x)

    def add_mlp_(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(self.mlp_norm(x)).chunk(2, 1)
        activated = F.silu(gate.float()).mul_(up)  # in float32, rounded once
        return x.add_(self.down_proj(activated.to(gate.dtype)))

    def slots(self) -> Iterator[WeightSlot]:
        for part in (self.input_norm, self.attention, self.mlp_norm, self.gate_up_proj, self.down_proj):
            yield from part.slots()


class Decoder:
    """One rank's decoder; its weights are filled by `weights.load_weights`."""

    def __init__(self, config: ModelConfig, comm: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        config.check_tp_size(comm.size)
        self.config = config
        self.dtype = dtype
        vocab, size = config.vocab_size, config.hidden_size
        self.embedding = ParallelEmbedding(vocab, size, comm, dtype=dtype, device=device)
        self.layers = [
            DecoderLayer(config, layer_id, comm, dtype=dtype, device=device) for layer_id in range(config.num_layers)
        ]
        self.final_norm = RMSNorm("model.norm", size, config.rms_norm_eps, dtype=dtype, device=device)
        head_rows = (
            self.embedding if config.tie_embeddings else VocabParallel(vocab, size, comm, dtype=dtype, device=device)
        )
        self.head = ParallelHead(head_rows)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, device)

    def forward(
        self,
        input_ids: Tensor,  # [num_tokens] int64
        positions: Tensor,  # [num_tokens] int64
        backend: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Return hidden states before the final norm, [num_tokens, hidden_size]. The backend is planned for this batch.

        On a CPU the residual stream is float32 whatever the weights are: it costs next to nothing there, and sixty
        additions rounded to bfloat16 are where most of a small model's error comes from.
        """
        x = self.embedding(input_ids)
        if x.device.type == "cpu":
            x = x.float()
        rope = self.rotary(positions, self.dtype)
        for layer in self.layers:
            x = layer(x, rope, backend, on_layer)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn [rows, hidden_size] of `forward` into [rows, vocab_size] float32."""
        return self.head(self.final_norm.in_type_of(hidden))

    def slots(self) -> Iterator[WeightSlot]:
        yield from self.embedding.slots("model.embed_tokens")
        for layer in self.layers:
            yield from layer.slots()
        yield from self.final_norm.slots()
        if not self.config.tie_embeddings:
            yield from self.head.rows.slots("lm_head")

    def pack(self) -> None:
        """Block the loaded weights for a CPU, one linear at a time so that memory never holds two models."""
        for layer in self.layers:
            for linear in (layer.attention.qkv_proj, layer.attention.o_proj, layer.gate_up_proj, layer.down_proj):
                linear.pack()
        self.head.pack(tied=self.config.tie_embeddings)
