"""What arithmetic says a step must take: its products over the measured matmul rate, its bytes over the read rate.

    P       weights in matrices, outside the embedding and the head
    head    vocab_size * hidden_size: the output projection, read and computed only for rows that sample
    KV      2 * num_kv_heads * head_dim numbers for each layer and cached token
    pairs   (query, key) pairs of causal attention: n (n + 1) / 2 for n tokens, fewer with a sliding window

A step is bound by whichever of the two takes longer, so that is its floor. Not counted, as nothing can avoid less of
it than nearly nothing: norms, biases, the embedding's rows, activations, sampling. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvferry.models.config import ModelConfig

Bound = Literal["compute", "memory"]


@dataclass(slots=True, frozen=True)
class Rates:
    """What the machine does at best, measured in the same run."""

    matmul_flops_per_s: float
    read_bytes_per_s: float


@dataclass(slots=True, frozen=True)
class Work:
    """What a step cannot avoid."""

    flops: float
    num_bytes: float

    def floor_s(self, rates: Rates) -> float:
        return max(self.flops / rates.matmul_flops_per_s, self.num_bytes / rates.read_bytes_per_s)

    def bound(self, rates: Rates) -> Bound:
        is_compute = self.flops / rates.matmul_flops_per_s >= self.num_bytes / rates.read_bytes_per_s
        return "compute" if is_compute else "memory"


def num_layer_weights(model: ModelConfig) -> int:
    """P: the products' weights in all layers."""
    attention = 2 * (model.num_qo_heads + model.num_kv_heads) * model.head_dim * model.hidden_size
    mlp = 3 * model.hidden_size * model.intermediate_size
    return model.num_layers * (attention + mlp)


def num_head_weights(model: ModelConfig) -> int:
    return model.vocab_size * model.hidden_size


def num_causal_pairs(num_tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees: each of n tokens sees itself and all before, at most `window`."""
    seen = num_tokens if window is None else min(window, num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def num_visible_keys(context: float, model: ModelConfig) -> float:
    """Keys that one query reads in all layers together, with `context` tokens up to and including itself."""
    return sum(context if window is None else min(context, window) for window in model.sliding_windows)


def decode_work(model: ModelConfig, num_rows: int, context: float, item_bytes: int, kv_item_bytes: int) -> Work:
    """One step of `num_rows` sequences that each see `context` tokens.

    Bytes: every weight once, with the head, and each row's keys and values (of `kv_item_bytes` each). FLOP: two for
    each weight and row, and four for each query head's dimension and visible key (the score and the weighted sum).
    """
    weights = num_layer_weights(model) + num_head_weights(model)
    keys = num_rows * num_visible_keys(context, model)
    return Work(
        flops=2 * weights * num_rows + 4 * model.num_qo_heads * model.head_dim * keys,
        num_bytes=weights * item_bytes + 2 * model.num_kv_heads * model.head_dim * keys * kv_item_bytes,
    )


def prefill_work(model: ModelConfig, num_tokens: int, item_bytes: int) -> Work:
    """A prompt from nothing to its first token, in one pass over the weights whatever the chunks are.

    FLOP: 2 P n for the products, 4 * num_qo_heads * head_dim for each causal pair and layer (2 L H D n^2 without a
    window), and the head for the one row that samples.
    """
    pairs = sum(num_causal_pairs(num_tokens, window) for window in model.sliding_windows)
    weights, head = num_layer_weights(model), num_head_weights(model)
    return Work(
        flops=2 * weights * num_tokens + 4 * model.num_qo_heads * model.head_dim * pairs + 2 * head,
        num_bytes=(weights + head) * item_bytes,
    )
