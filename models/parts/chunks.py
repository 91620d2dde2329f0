"""Llama 4's layers, as its config.json tells them: three of four attend within a chunk and turn by positions.

    chunk    of so many tokens from a sequence's beginning on: a token sees those of its own chunk up to itself
    others   see all, turn nothing, and have queries that grow with their positions

What it says in words of its own is said again in those of other families, so that what reads these reads it, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...common.config import EngineConfig
from ...common.errors import ConfigError
from .config_fields import ConfigFields

_KINDS = {True: "chunked_attention", False: "full_attention"}


class Chunk(int):
    """A window of keys that begins anew with each so many tokens, in place of moving with the token that sees them."""

    def first(self, position: int) -> int:
        """Return the first position that one at `position` sees."""
        return position // self * self


def in_common_words(fields: ConfigFields) -> ConfigFields:
    """Return what is told of such a model, with all that other families have other words for. Raises ConfigError."""
    num_layers = fields.count("num_hidden_layers", 48)
    if fields.raw.get("no_rope_layers"):
        told = fields.raw["no_rope_layers"]
        if not isinstance(told, list) or len(told) != num_layers or not all(each in (0, 1) for each in told):
            raise fields.refuse("no_rope_layers", f"must have 0 or 1 for each of {num_layers} layers")
        turned = [bool(each) for each in told]
    else:
        step = fields.count("no_rope_layer_interval", 4)
        turned = [(layer + 1) % step != 0 for layer in range(num_layers)]
    kinds = [_KINDS[each] for each in turned]
    if fields.raw.get("layer_types") not in (None, kinds):
        raise fields.refuse("layer_types", "layers that turn by positions are those that attend in chunks")
    step = fields.count("interleave_moe_layer_step", 1)
    sparse = fields.raw.get("moe_layers")
    if sparse is None:
        sparse = list(range(step - 1, num_layers, step))
    if not isinstance(sparse, list) or not all(layer in range(num_layers) for layer in sparse):
        raise fields.refuse("moe_layers", f"must list layers, of {num_layers}")
    if fields.count("num_experts_per_tok", 1) != 1:
        raise fields.refuse("num_experts_per_tok", "only one expert a token is supported, where inputs are weighed")
    own = {
        "no_rope_layers": [int(each) for each in turned],
        "layer_types": None,
        "mlp_layer_types": ["sparse" if layer in sparse else "dense" for layer in range(num_layers)],
    }
    return ConfigFields(fields.path, dict(fields.raw) | own)


def read_chunks(fields: ConfigFields) -> tuple[int | None, ...]:
    """Return of each layer its chunks; None: it sees all keys."""
    turned = fields.raw["no_rope_layers"]
    assert isinstance(turned, list)
    if not fields.has("attention_chunk_size"):
        return (None,) * len(turned)
    size = Chunk(fields.count("attention_chunk_size"))
    return tuple(size if each else None for each in turned)


def first_seen(position: int, window: int | None) -> int:
    """Return the first position that a token at `position` sees; `window`: keys that it sees, or chunks; None: all."""
    if window is None:
        return 0
    return window.first(position) if isinstance(window, Chunk) else max(0, position - window + 1)


def has_chunks(windows: Sequence[int | None]) -> bool:
    """Tell whether a layer attends in chunks."""
    return any(isinstance(window, Chunk) for window in windows)


def check_chunks(windows: Sequence[int | None], engine: EngineConfig, *, is_cuda: bool) -> None:
    """Refuse chunks that a device has no attention of. Raises ConfigError."""
    sizes = {int(window) for window in windows if isinstance(window, Chunk)}
    if is_cuda and any(size % engine.block_tokens for size in sizes):
        raise ConfigError(
            f"block_size: {engine.block_tokens} must divide the chunks of {max(sizes)} tokens that layers attend in"
        )
