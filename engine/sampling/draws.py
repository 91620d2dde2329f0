"""Draws one row's tokens from its probabilities, on a CPU: min-p, top-k and top-p, then as many as are asked for.

A vocabulary has some 50,000 tokens, of which a filter leaves a few. So nothing is sorted but those that are probable
enough: if the tokens above a floor have the mass that top-p asks for, or are as many as top-k keeps, what is kept is
among them. Floors are tried from high to low, and the last one leaves all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...common.request import SamplingParams

# Higher ones leave fewer to sort, and fail more often: the first nearly never at temperature 0.2, the second at 1.
_FLOORS = (1e-3, 1e-5, 0.0)

Weights = NDArray[np.float32]
Ids = NDArray[np.intp]


def draw(probabilities: Weights, params: SamplingParams, uniforms: Sequence[float]) -> list[int]:
    """Return a token for each number in [0, 1), none where the probabilities are no distribution.

    It is the first one whose cumulative weight, in the order of tokens, exceeds that share of the whole: never one of
    weight zero.
    """
    if not math.isfinite(float(probabilities.max())):
        return []
    ids = _kept(probabilities, params)
    weights = torch.from_numpy(probabilities if ids is None else probabilities[ids])
    cumulative = weights.cumsum(0, dtype=torch.float64).numpy()  # three times as fast as numpy's
    total = cumulative[-1]
    points = np.minimum(np.array(uniforms) * total, np.nextafter(total, 0.0))
    places = np.searchsorted(cumulative, points, side="right")
    found: list[int] = (places if ids is None else ids[places]).tolist()
    return found


def _kept(probabilities: Weights, params: SamplingParams) -> Ids | None:
    """Return the tokens that may be drawn, in their order; None: all. Ties with the last one stay too."""
    top_k = params.top_k if 0 < params.top_k < len(probabilities) else 0
    if not top_k and params.top_p >= 1 and params.min_p <= 0:
        return None
    ids, mass = _candidates(probabilities, params, top_k)
    weights = probabilities[ids]
    if 0 < top_k < len(ids):
        at_least = np.partition(weights, -top_k)[-top_k]
        ids, weights = ids[weights >= at_least], weights[weights >= at_least]
    if top_k:
        mass = float(weights.sum(dtype=np.float64))  # of what top-k keeps, which top-p is a share of
    if params.top_p >= 1:
        return ids
    ordered = np.sort(weights)[::-1]
    reached = np.cumsum(ordered, dtype=np.float64)
    count = int(np.searchsorted(reached, params.top_p * mass)) + 1  # the smallest set that reaches it
    return ids if count >= len(ids) else ids[weights >= ordered[count - 1]]


def _candidates(probabilities: Weights, params: SamplingParams, top_k: int) -> tuple[Ids, float]:
    """Return tokens among which are all that top-k and top-p keep, and the mass of all that min-p keeps.

    With top-k nobody asks for the mass.
    """
    if params.min_p > 0:
        ids = np.flatnonzero(probabilities >= np.float32(params.min_p) * probabilities.max())
        return ids, float(probabilities[ids].sum(dtype=np.float64))
    for floor in _FLOORS:
        ids = np.flatnonzero(probabilities >= floor)
        mass = float(probabilities[ids].sum(dtype=np.float64))
        if len(ids) >= top_k if top_k else mass >= params.top_p:
            return ids, 1.0
    return ids, mass
