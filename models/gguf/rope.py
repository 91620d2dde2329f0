"""Rotary positions of a GGUF file, as config.json has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .fields import GgufFields
from .tensors import Part, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gguf import ReaderTensor

# Tensors that are no weights: by what each rotary frequency is divided.
LLAMA3_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (LLAMA3_FACTORS, SHORT_FACTORS, LONG_FACTORS)
_MAX_FACTORS = 1 << 12  # pairs of numbers of a head: more than any head has

# Turns over the original context: of fewer than the first a frequency is divided, of more than the second it is kept.
# Llama 3.1's and those of all behind it, and Llama 4's, which are a step.
_BANDS = ((1.0, 4.0), (1.0, 1.0))
_KINDS = ("none", "linear", "yarn", "longrope")
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow", "yarn_attn_factor": "attention_factor"}


def rope_factors(sources: Iterable[ReaderTensor]) -> dict[str, list[float]]:
    """Return by what rotary frequencies are divided, by their tensor's name. Raises ValueError for what is no factor.

    Sizes are looked at before any number is: a small file may claim many.
    """
    found = {}
    for source in sources:
        if source.name not in FACTORS:
            continue
        shape = shape_of(source)
        if len(shape) != 1 or not 1 <= shape[0] <= _MAX_FACTORS:
            raise ValueError(
                f"{source.name} has the shape {list(shape)}; it should be one row of 1 to {_MAX_FACTORS} factors"
            )
        found[source.name] = factors = [float(factor) for factor in Part.whole(source).numbers()]
        if wrong := [factor for factor in factors if not 0 < factor < math.inf]:
            raise ValueError(f"{source.name} has the factor {wrong[0]}; frequencies are divided by finite ones above 0")
    return found


def rope_fields(
    fields: GgufFields, head_dim: int, factors: Mapping[str, list[float]], *, may_turn_parts: bool
) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and, of families that `may_turn_parts` of heads, how much of each they turn.

    Raises ValueError for a scaling that is not known.
    """
    theta = fields.number(fields.of_model("rope.freq_base"), 10_000.0)
    turned = fields.integer(fields.of_model("rope.dimension_count"), head_dim)
    found = {"rope_theta": theta, "rope_scaling": _scaling(fields, theta, head_dim, factors)}
    if may_turn_parts:
        return found | {"partial_rotary_factor": turned / head_dim}
    if turned != head_dim:
        raise ValueError(f"{fields.of_model('rope.dimension_count')} = {turned}: all of a head's {head_dim} are turned")
    return found


def _scaling(
    fields: GgufFields, theta: float, head_dim: int, factors: Mapping[str, list[float]]
) -> dict[str, Any] | None:
    key = fields.of_model("rope.scaling.type")
    kind = fields.find(key) or "none"
    if kind not in _KINDS:
        raise ValueError(f"{key} = {kind!r} is not supported; these are: {', '.join(_KINDS)}")
    if SHORT_FACTORS in factors and LONG_FACTORS in factors:
        return _longrope(fields, factors)
    if kind == "longrope":
        raise ValueError(f"{key} = {kind!r}, and there is no {LONG_FACTORS} beside {SHORT_FACTORS}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _number(fields, "factor")}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": _number(fields, "factor"),
            "original_max_position_embeddings": fields.integer(_key(fields, "original_context_length")),
            **{ours: _number(fields, name) for name, ours in _YARN.items() if fields.find(_key(fields, name))},
        }
    return _llama3(factors[LLAMA3_FACTORS], theta, head_dim) if LLAMA3_FACTORS in factors else None


def _key(fields: GgufFields, name: str) -> str:
    return fields.of_model(f"rope.scaling.{name}")


def _number(fields: GgufFields, name: str) -> float:
    return fields.number(_key(fields, name))


def _longrope(fields: GgufFields, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": factors[SHORT_FACTORS],
        "long_factor": factors[LONG_FACTORS],
        "original_max_position_embeddings": fields.integer(_key(fields, "original_context_length")),
    }
    if fields.find(_key(fields, "attn_factor")):
        scaling["attention_factor"] = _number(fields, "attn_factor")
    return scaling


def _llama3(factors: list[float], theta: float, head_dim: int) -> dict[str, Any]:
    """Return the scaling of Llama 3.1 and later whose factors these are: the file has them, and not their cause."""
    factor, original = round(max(factors), 3), 8192
    turns = [original * theta ** (-2 * index / head_dim) / (2 * math.pi) for index in range(len(factors))]
    for low, high in _BANDS:
        kept = [float(each > low) if low == high else min(1.0, max(0.0, (each - low) / (high - low))) for each in turns]
        wanted = [1 / ((1 - share) / factor + share) for share in kept]
        if all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(factors, wanted, strict=True)):
            break
    else:
        raise ValueError(f"{LLAMA3_FACTORS} is not the scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
