"""Tests of products of plain matrices."""

import platform

import pytest
import torch
import torch.nn.functional as F

from kvferry.engine.weights import weight
from kvferry.engine.weights.weight import DenseWeight


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 40])
def test_bfloat16_is_multiplied_without_its_hardware(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, has_bias: bool
) -> None:
    """Many rows are what float32 makes of them, rounded once; few are as near as bfloat16 is."""
    monkeypatch.setattr(weight, "_can_block", lambda dtype: False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(weight, "_WIDENED_SIZE", 1000)  # 10 outputs at once, and 3 in the end
    generator = torch.Generator().manual_seed(3)
    x, plain, bias = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((num_rows, 96), (53, 96), (53,))
    )
    matrix = DenseWeight(plain.clone())
    matrix.pack()
    y = matrix.product(x, bias if has_bias else None)
    wide = F.linear(x.double(), plain.double(), bias.double() if has_bias else None)
    assert y.dtype == torch.bfloat16 and y.shape == (num_rows, 53)
    torch.testing.assert_close(y.double(), wide, rtol=2**-8, atol=2**-8)
    if num_rows >= 8:
        assert (y == wide.float().bfloat16()).double().mean() > 0.99  # but for sums that end between two numbers
