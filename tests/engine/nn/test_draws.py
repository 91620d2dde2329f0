"""What is drawn by way of a few candidates is what the definitions of min-p, top-k and top-p say of all tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvferry.common.request import SamplingParams
from kvferry.engine.sampling import draws
from kvferry.engine.sampling.draws import draw

SIZE = 3000
ROUNDING = 2.0**-20  # of a sum of many float32 near 1
UNIFORMS = [index / 64 for index in range(64)] + [np.nextafter(1.0, 0.0)]
FILTERS = st.fixed_dictionaries(
    {
        "top_p": st.sampled_from([1.0, 0.999999, 0.95, 0.5, 1e-6]),
        "top_k": st.sampled_from([0, 1, 20, 500, SIZE, SIZE + 1]),
        "min_p": st.sampled_from([0.0, 1e-6, 0.05, 1.0]),
    }
)


def _probabilities(seed: int, spread: float, *, levels: int = 0) -> NDArray[np.float32]:
    """Draw a distribution; a large `spread` peaks it, and few `levels` give many tokens the same."""
    logits = np.random.default_rng(seed).standard_normal(SIZE) * spread
    if levels:
        logits = np.round(logits * levels / spread) * spread / levels
    weights = np.exp(logits - logits.max())
    found: NDArray[np.float32] = (weights / weights.sum()).astype(np.float32)
    return found


def _kept(probabilities: NDArray[np.float32], params: SamplingParams) -> NDArray[np.bool_]:
    """Tell of each token whether it may be drawn, by the definitions and a sort of all of them."""
    exact = probabilities.astype(np.float64)
    kept: NDArray[np.bool_] = probabilities >= np.float32(params.min_p) * probabilities.max()
    ordered = np.sort(exact[kept])[::-1]
    if 0 < params.top_k < len(ordered):
        kept &= exact >= ordered[params.top_k - 1]
        ordered = np.sort(exact[kept])[::-1]
    if params.top_p < 1:
        better = np.concatenate([[0.0], np.cumsum(ordered)[:-1]])
        kept &= exact >= ordered[np.flatnonzero(better < params.top_p * ordered.sum())[-1]]
    return kept


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.01, 0.5, 2.0, 5.0, 30.0]),
    levels=st.sampled_from([0, 3]),
    filters=FILTERS,
)
@example(seed=0, spread=0.01, levels=0, filters={"top_p": 0.95, "top_k": 0, "min_p": 0.0})  # the last floor
@example(seed=0, spread=2.0, levels=0, filters={"top_p": 1.0, "top_k": 500, "min_p": 0.0})
@example(seed=0, spread=5.0, levels=0, filters={"top_p": 0.999999, "top_k": 0, "min_p": 0.0})  # three of 4e-9
def test_candidates_are_enough(seed: int, spread: float, levels: int, filters: dict[str, float]) -> None:
    probabilities, params = _probabilities(seed, spread, levels=levels), SamplingParams(**filters)  # type: ignore[arg-type]
    kept = _kept(probabilities, params)
    found = draws._kept(probabilities, params)
    ours = np.zeros(SIZE, np.bool_)
    ours[slice(None) if found is None else found] = True
    # A sum that comes within rounding of top-p may keep the tokens of one value more or less, or some small ones.
    others = probabilities[kept ^ ours]
    assert len(set(others)) <= (1 if params.top_p < 1 else 0) or (params.top_p < 1 and others.sum() <= ROUNDING)
    if (kept == ours).all():
        cumulative = np.cumsum(np.where(kept, probabilities, 0).astype(np.float64))
        points = np.minimum(np.array(UNIFORMS) * cumulative[-1], np.nextafter(cumulative[-1], 0))
        assert draw(probabilities, params, UNIFORMS) == np.searchsorted(cumulative, points, side="right").tolist()


def test_top_p_is_a_share_of_what_top_k_keeps_though_no_candidate_is_left_out() -> None:
    probabilities = np.full(SIZE, 0.1 / (SIZE - 20), np.float32)
    probabilities[:20] = np.linspace(0.05, 0.04, 20)  # 0.9 in all, and all that stand above the first floor
    params = SamplingParams(top_k=20, top_p=0.95)
    assert draws._candidates(probabilities, params, 20)[0].tolist() == list(range(20))
    found = draws._kept(probabilities, params)
    assert found is not None and found.tolist() == np.flatnonzero(_kept(probabilities, params)).tolist()
    assert len(found) == 19


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_what_has_no_weight_is_never_drawn(filters: dict[str, float]) -> None:
    probabilities = np.zeros(SIZE, np.float32)
    probabilities[[7, 2000]] = 0.5
    assert set(draw(probabilities, SamplingParams(**filters), UNIFORMS)) <= {7, 2000}  # type: ignore[arg-type]
    assert draw(np.full(SIZE, np.nan, np.float32), SamplingParams(**filters), UNIFORMS) == []  # type: ignore[arg-type]
