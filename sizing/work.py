"""The work of a step, counted from a model's shape: products, pairs of queries and keys, bytes between ranks.

    params      numbers of matrices: of layers, of routed experts, of the head that rows which sample are multiplied by
    pairs       (query, key) pairs of causal attention: n (n + 1) / 2 for n tokens, fewer with a sliding window
    exchanged   each rank's share of the sums over the ranks, behind each mixer and each feed-forward, and behind the
                embedding; or, in place of the sum behind a layer's experts, the rows that it sends to other ranks
                (engine/nn/exchange.py)

Not counted, as they take next to nothing: norms' weights, biases, sampling. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..common.config import ExpertExchange
from ..models.checkpoint import tensor_shapes
from ..models.config import ModelConfig
from ..models.parts.chunks import Chunk
from ..models.parts.mamba import MambaConfig
from .rank_tensors import is_expert

_EXCHANGES = 4  # in place of a sum: numbers of rows, rows to their experts, results back, a join of all
_SUM_BYTES, _CHOICE_BYTES = 4, 8  # of a number that comes back; of an expert's number and its weight
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# Of all tokens, in every layer: what queries, keys and values, or a state, are made of.
_PROJECTED = re.compile(r"\.(q|k|v|qkv|q_a|q_b|kv_b)_proj|\.kv_a_proj_with_mqa|\.in_proj|\.conv(1d)?\.weight")


class Params(NamedTuple):
    """Numbers of the whole model's matrices."""

    layers: int  # without routed experts
    experts: int  # routed ones, all of them
    head: int  # multiplied by the rows that sample, alone
    last: int  # of `layers`, what stands behind the last keys and values, or states, that are kept
    last_experts: int  # of `experts`, those there
    borrowing: int  # of `last`, those of layers that keep nothing


def count_params(model: ModelConfig) -> Params:
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(model).items() if len(shape) >= 2}
    sizes = {name: size for name, size in sizes.items() if ".layers." in name or "_layer_model_projection" in name}
    experts = {name: size for name, size in sizes.items() if is_expert(name)}
    num_experts = sum(experts.values())
    last = sum(size for name, size in sizes.items() if _is_behind(name, model))
    last_experts = sum(size for name, size in experts.items() if _is_behind(name, model))
    head = model.vocab_size * model.hidden_size
    borrowing = sum(size for name, size in sizes.items() if _layer_of(name) >= num_kept_layers(model))
    return Params(sum(sizes.values()) - num_experts, num_experts, head, last - last_experts, last_experts, borrowing)


def _is_behind(name: str, model: ModelConfig) -> bool:
    """Tell whether a matrix is multiplied by rows that sample alone, as no later token reads what comes of it."""
    layer, last = _layer_of(name), num_kept_layers(model) - 1
    return layer > last or (layer == last and not _PROJECTED.search(name))


def _layer_of(name: str) -> int:
    return int(found[1]) if (found := _LAYER.search(name)) else -1


def num_kept_layers(model: ModelConfig) -> int:
    """Count the layers up to the last one that keeps something: those behind it matter to no later token."""
    return model.num_layers if model.uneven is None else model.uneven.num_kept


def mixers(model: ModelConfig) -> list[int]:
    """List the layers in which tokens meet those before them."""
    return [layer for layer in range(model.num_layers) if model.has_mixer(layer)]


def num_feed_forwards(model: ModelConfig) -> int:
    return sum(map(model.has_feed_forward, range(model.num_layers)))


def num_whole_layers(model: ModelConfig) -> int:
    """Count the layers, those of one block two for one, as a step's costs are known of a mixer with a feed-forward."""
    return -(-(len(mixers(model)) + num_feed_forwards(model)) // 2)


def flops_per_pair(model: ModelConfig) -> int:
    """Count the operations of one query and one key in one layer: two for each number of the score and of the sum.

    Of layers whose heads differ, in one whose heads have `head_dim` numbers.
    """
    num_values = model.head_dim if model.latent is None else model.latent.kv_rank
    return 2 * model.num_qo_heads * (model.head_dim + num_values)


def num_causal_pairs(num_tokens: int, window: int | None) -> int:
    """Count pairs of a query and a key that it sees: each of n tokens sees itself and all before, at most `window`."""
    if isinstance(window, Chunk):
        whole, rest = divmod(num_tokens, window)
        return whole * num_causal_pairs(window, None) + num_causal_pairs(rest, None)
    seen = num_tokens if window is None else min(window, num_tokens)
    return seen * (seen + 1) // 2 + (num_tokens - seen) * seen


def num_prompt_pairs(num_tokens: int, model: ModelConfig, num_layers: int | None = None) -> int:
    """Count the pairs of a prompt in all layers together, or the first ones; those of wider heads by as much more."""
    attending = _attending(model, [layer for layer in attending_layers(model) if layer < (num_layers or math.inf)])
    return round(sum(width * num_causal_pairs(num_tokens, window) for window, width in attending))


def num_spared_pairs(num_tokens: int, model: ModelConfig) -> float:
    """Count those of a prompt's pairs that are not of the tokens alone which sample: of the layers behind the last keys
    and values that are kept, and of the layer that keeps them.
    """
    layers = [layer for layer in attending_layers(model) if layer >= num_kept_layers(model) - 1]
    return sum(width * num_causal_pairs(num_tokens, window) for window, width in _attending(model, layers))


def num_visible_keys(context: float, model: ModelConfig) -> float:
    """Count keys that one query reads in all layers together, with `context` tokens up to and including itself.

    Those of wider heads count by as much more.
    """
    return sum(width * num_seen(context, window) for window, width in _attending(model, attending_layers(model)))


def num_seen(context: float, window: int | None) -> float:
    """Count the keys that the last one of so many tokens sees in one layer."""
    return context if window is None else min(context, window)


def _attending(model: ModelConfig, layers: Sequence[int]) -> list[tuple[int | None, float]]:
    """Return of each of these layers, which read keys, its window, and how wide its heads are beside others'."""
    return [(model.sliding_windows[layer], model.heads_of(layer).dim / model.head_dim) for layer in layers]


def attending_layers(model: ModelConfig) -> Sequence[int]:
    """List the layers that read keys and values, their own or another one's."""
    return model.kv_layers if model.uneven is None else range(model.num_layers)


def num_values(model: ModelConfig) -> int:
    """Count the numbers of activations that are read or written beside products, of one token in all layers: around
    norms and sums with the residual stream, rotation, attention's output, the feed-forward's gate, or its activation.
    """
    layers = list(filter(model.has_feed_forward, range(model.num_layers)))
    inner = sum(map(model.inner_size, filter(model.has_mlp, layers)))
    if (experts := model.experts) is not None:
        inner += sum(model.sparse_layers) * (experts.intermediate_size * experts.num_chosen + experts.shared_size)
    heads = [model.heads_of(layer) for layer in mixers(model)]
    of_mixers = sum(3 * model.hidden_size + 3 * model.num_qo_heads * own.dim + 4 * own.size for own in heads)
    of_feed_forwards = 3 * len(layers) * model.hidden_size + len(model.family.mlp.parts) * inner
    return of_mixers + of_feed_forwards


def num_sums(model: ModelConfig, exchange: ExpertExchange = "sum") -> int:
    """Count a step's sums over the ranks, and what takes their place."""
    of_inputs = model.num_layers + 1 if model.layer_inputs is not None else 0  # in each layer, behind the table
    of_experts = sum(model.has_mlp(layer) for layer, is_sparse in enumerate(model.sparse_layers) if is_sparse)
    of_layers = len(mixers(model)) + num_feed_forwards(model) + _num_norm_sums(model) + of_inputs + of_experts
    return of_layers + 1 + _num_exchanged(model, exchange) * (_EXCHANGES - 1)


def _num_norm_sums(model: ModelConfig) -> int:
    """Count the norms that reach over the heads of all ranks: of each a number of each token is summed."""
    states = model.states
    of_states = states.num_layers if isinstance(states, MambaConfig) and states.is_normed_whole else 0
    return of_states + (2 * len(model.kv_layers) if model.family.head_norms == "whole" else 0)  # of queries, of keys


def _num_exchanged(model: ModelConfig, exchange: ExpertExchange) -> int:
    """Count the layers whose experts' tokens are exchanged."""
    return sum(model.sparse_layers) if exchange == "all_to_all" else 0


def exchanged_bytes(
    num_tokens: int, num_ranks: int, item_bytes: int, model: ModelConfig, exchange: ExpertExchange = "sum"
) -> float:
    """Return the bytes that each rank sends in a step of so many tokens: rings, 2 (n - 1) / n of each sum."""
    ring = model.hidden_size * item_bytes * 2 * (num_ranks - 1) / num_ranks
    num_exchanged = _num_exchanged(model, exchange)
    routed = _routed_bytes(num_ranks, item_bytes, model) if num_exchanged else 0.0
    num_wide = num_sums(model) - _num_norm_sums(model) - num_exchanged
    return num_tokens * (num_wide * ring + num_exchanged * routed)


def _routed_bytes(num_ranks: int, item_bytes: int, model: ModelConfig) -> float:
    """Return a rank's bytes for each token of a step where it has 1 / n of the tokens and of the experts: rows to ranks
    with an expert that they chose, sums back in float32, finished rows to all. Experts are taken to be chosen evenly.
    """
    experts = model.experts
    assert experts is not None
    count, chosen = experts.num_experts, experts.num_chosen
    missed = math.comb(count - count // num_ranks, chosen) / math.comb(count, chosen)
    to_one = model.hidden_size * (item_bytes + _SUM_BYTES) + chosen * _CHOICE_BYTES
    return (num_ranks - 1) / num_ranks * ((1 - missed) * to_one + model.hidden_size * item_bytes)
