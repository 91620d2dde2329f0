"""Counts of a model that tensor-parallel ranks share, by their names in config.json: evenly.

But where there are more ranks than KV heads, each head is had by as many ranks: its keys and values are computed, kept
and handed over that often.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...common.errors import ConfigError

KV_HEADS = "num_key_value_heads"


def heads_of_rank(num_heads: int, num_ranks: int) -> int:
    """Count the KV heads that one of so many ranks has."""
    return max(1, num_heads // num_ranks)


def possible_sizes(counts: Mapping[str, int], *, copies_heads: bool) -> list[int]:
    """List the numbers of ranks that can share all counts. `copies_heads`: several may have the same KV head."""
    most = min(count for name, count in counts.items() if name != KV_HEADS or not copies_heads)
    return [size for size in range(1, most + 1) if _obstacle(counts, size, copies_heads=copies_heads) is None]


def check_size(counts: Mapping[str, int], tp_size: int, *, copies_heads: bool) -> None:
    """Check that so many ranks can share all counts. Raises ConfigError naming the first one that they cannot."""
    if (name := _obstacle(counts, tp_size, copies_heads=copies_heads)) is not None:
        sizes = possible_sizes(counts, copies_heads=copies_heads)
        raise ConfigError(
            f"tensor_parallel_size = {tp_size} does not divide the model's {name} = {counts[name]}; these do: {sizes}"
        )


def _obstacle(counts: Mapping[str, int], tp_size: int, *, copies_heads: bool) -> str | None:
    """Return the first count that so many ranks cannot share."""
    for name, count in counts.items():
        is_copied = copies_heads and name == KV_HEADS and tp_size % count == 0
        if count % tp_size and not is_copied:
            return name
    return None
