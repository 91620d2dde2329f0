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
from kvferry.sizing.work import count_params, flops_per_pair, num_kept_layers, num_prompt_pairs, num_visible_keys

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


def decode_work(model: ModelConfig, num_rows: int, context: float, item_bytes: int, kv_row_bytes: int) -> Work:
    """One step of `num_rows` sequences that each see `context` tokens.

    Bytes: every weight once, with the head, and each row's keys and values (of `kv_row_bytes` for a token and head).
    FLOP: two for each weight and row, and four for each query head's dimension and visible key (the score and the
    weighted sum).
    """
    params = count_params(model)
    weights = params.layers + params.head
    keys = num_rows * num_visible_keys(context, model)
    return Work(
        flops=2 * weights * num_rows + flops_per_pair(model) * keys,
        num_bytes=weights * item_bytes + 2 * model.num_kv_heads * keys * kv_row_bytes,
    )


def prefill_work(model: ModelConfig, num_tokens: int, item_bytes: int) -> Work:
    """A prompt from nothing to its first token, in one pass over the weights whatever the chunks are.

    FLOP: 2 P n for the products, 4 * num_qo_heads * head_dim for each causal pair and layer (2 L H D n^2 without a
    window), and the head for the one row that samples. The last layer that keeps keys and values is counted whole: an
    engine that computes that row alone behind these has so much less to do. Layers behind it see that row alone.
    """
    pairs = num_prompt_pairs(num_tokens, model, num_kept_layers(model))
    params = count_params(model)
    products = (params.layers - params.borrowing) * num_tokens + params.borrowing + params.head
    return Work(
        flops=2 * products + flops_per_pair(model) * pairs,
        num_bytes=(params.layers + params.head) * item_bytes,
    )
