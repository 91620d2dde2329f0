"""What two samplers drew of the same logits, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvferry.common.request import SampledToken

Drawn = Sequence[tuple[SampledToken, ...]]  # of each row, its choices'


def assert_same(found: Drawn, expected: Drawn) -> None:
    """The tokens are equal; their log-probabilities are as near as another order of sums leaves them."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [token.token_id for token in ours] == [token.token_id for token in theirs]
        for token, other in zip(ours, theirs, strict=True):
            assert (token.logprob is None) == (other.logprob is None)
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in token.top] == [i for i, _ in other.top]
            assert [value for _, value in token.top] == pytest.approx([value for _, value in other.top], abs=1e-4)
