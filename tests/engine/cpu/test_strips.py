"""Adapters' matrices in the form that C++ reads: each number in its place, times the scale, rounded once."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvferry.engine.cpu import build as native
from kvferry.engine.cpu.adapters import SlotMemory, StripAdapters, whole_strips
from kvferry.engine.cpu.compiler import NativeUnavailable
from kvferry.engine.nn.layers import Linear
from kvferry.engine.weights.slot_matrices import scaled
from kvferry.engine.weights.weight import DenseWeight
from kvferry.models.default import cache_dir

STORED = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def library(isa: str) -> ctypes.CDLL:
    return native.load(cache_dir())


@pytest.fixture(scope="module")
def float32_library() -> ctypes.CDLL:
    try:
        return native.load(cache_dir(), is_float32=True)
    except NativeUnavailable as reason:
        pytest.skip(f"no native code on this machine: {reason}")


def in_strips(matrix: Tensor, columns: int, inputs: int) -> Tensor:
    """Lay a matrix out, one number after the other as `native/products/adapters.hpp` describes it."""
    padded = F.pad(matrix, (0, inputs - matrix.shape[1], 0, columns - len(matrix)))
    pairs = padded.view(columns // 16, 16, inputs // 2, 2).transpose(1, 2)  # [strips, pairs, 16, 2]
    return (pairs.transpose(2, 3) if matrix.dtype == torch.float32 else pairs).reshape(columns // 16, inputs // 2, 32)


def check_strips(library: ctypes.CDLL, dtype: torch.dtype, matrix: Tensor, inputs: int, scale: float) -> None:
    memory = SlotMemory(library, 1, dtype)
    strips = StripAdapters(Linear("w", DenseWeight(torch.zeros(32, inputs, dtype=dtype))), memory, 16)
    columns = whole_strips(len(matrix))
    target = torch.full((columns // 16, inputs // 2, 32), 7.0, dtype=dtype)
    strips.write(target, matrix, scale)
    assert torch.equal(target, in_strips(scaled(matrix, scale).to(dtype), columns, inputs))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Matrices of each stored type, whole or a part of the inputs, and what their inputs are padded to."""
    columns, inputs, before = draw(st.integers(1, 70)), draw(st.integers(1, 130)), draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    whole = torch.randn(columns, before + inputs + draw(st.integers(0, 9)), generator=generator)
    matrix = whole.to(draw(st.sampled_from(STORED)))[:, before : before + inputs]
    return matrix, 32 * -(-inputs // 32) if draw(st.booleans()) else whole_strips(inputs)


# Before those that ask for a set: what they patch stays until the module's last test.
@given(matrices(), st.sampled_from([1.0, 1 / 3]))
@settings(max_examples=60)
def test_float32_lies_in_halves(
    float32_library: ctypes.CDLL, matrix_and_inputs: tuple[Tensor, int], scale: float
) -> None:
    check_strips(float32_library, torch.float32, *matrix_and_inputs, scale)


@given(matrices(), st.sampled_from([1.0, 0.5, 1 / 3, -7.25]))
@settings(max_examples=60)
def test_elements_are_rounded_once_and_lie_in_pairs(
    library: ctypes.CDLL, matrix_and_inputs: tuple[Tensor, int], scale: float
) -> None:
    check_strips(library, torch.bfloat16, *matrix_and_inputs, scale)
