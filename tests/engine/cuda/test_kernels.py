"""Fused kernels against torch, on a CUDA device."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from kvferry.common.errors import ConfigError
from kvferry.engine.cuda.kernels import FusedKernels

from .torch_kernels import TorchKernels

has_flashinfer = importlib.util.find_spec("flashinfer") is not None
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_flashinfer = pytest.mark.skipif(not has_flashinfer, reason="needs the extra kvferry[gpu]")

SIZES = [(1, 576), (7, 4096), (300, 5120)]
TOLERANCE = 2**-8  # half a step of bfloat16, relative


def _random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device="cuda")).bfloat16()


def _assert_close(found: Tensor, expected: Tensor) -> None:
    """By norm: single numbers may fall to the other side of a rounding border."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < TOLERANCE, float(error)


@pytest.mark.skipif(has_flashinfer, reason="flashinfer is installed")
def test_missing_flashinfer_names_the_extra() -> None:
    with pytest.raises(ConfigError, match="pip install 'flashinfer-python"):
        FusedKernels()


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_norms_are_torchs(rows: int, size: int) -> None:
    fused, reference = FusedKernels(), TorchKernels()
    x, residual, weight = _random(rows, size), _random(rows, size, seed=1, scale=5), 1 + _random(size, scale=0.1)
    _assert_close(fused.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    ours, theirs = (x.clone(), residual.clone()), (x.clone(), residual.clone())
    fused.add_norm_(*ours, weight, 1e-5)
    reference.add_norm_(*theirs, weight, 1e-5)
    assert torch.equal(ours[1], theirs[1])
    _assert_close(ours[0], theirs[0])


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_heads_are_normed_and_turned_in_place_inside_the_fused_projection(head_dim: int, rows: int) -> None:
    fused, reference = FusedKernels(), TorchKernels()
    num_q, num_kv = 8, 2
    angles = torch.rand(2048, head_dim // 2, device="cuda") * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).bfloat16().float()
    positions = torch.randint(0, 2048, (rows,), dtype=torch.int32, device="cuda")
    weight = 1 + _random(head_dim, scale=0.1)
    found = _random(rows, num_q + 2 * num_kv, head_dim)
    expected, untouched = found.clone(), found[:, num_q + num_kv :].clone()
    for kernels, heads in ((fused, found), (reference, expected)):
        q, k, _ = torch.split(heads, [num_q, num_kv, num_kv], 1)
        kernels.norm_heads_(q, weight, 1e-6)
        kernels.norm_heads_(k, weight, 1e-6)
        kernels.rotate_(q, k, positions, cos_sin)
    _assert_close(found, expected)
    assert torch.equal(found[:, num_q + num_kv :], untouched)


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_gating_is_torchs(rows: int, size: int) -> None:
    gate_up = _random(rows, 2 * size, scale=2)
    _assert_close(FusedKernels().silu_and_mul(gate_up), TorchKernels().silu_and_mul(gate_up))
    odd = _random(7, 2 * 65)  # halves that the kernel could not read
    assert torch.equal(FusedKernels().silu_and_mul(odd), TorchKernels().silu_and_mul(odd))


@pytest.mark.gpu
@needs_gpu
@needs_flashinfer
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_logits_are_not_rounded_to_sixteen_bits(rows: int) -> None:
    hidden, weight = _random(rows, 2048), _random(4000, 2048, seed=1, scale=0.02)
    found = FusedKernels().logits(hidden, weight)
    assert found.dtype == torch.float32
    expected = hidden.double() @ weight.double().t()
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert not torch.equal(found, found.bfloat16().float())
