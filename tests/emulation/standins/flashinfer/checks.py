"""What native code asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from kvferry.tests.emulation.memory import DeviceTensor

_ALIGNMENT = 16  # bytes: kernels load that many at once


class NativeCheckError(RuntimeError):
    """Native code would refuse its arguments, or compute wrong numbers from them."""


def check(condition: object, message: str) -> None:
    if not condition:
        raise NativeCheckError(message)


def rows(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of a device tensor whose last dimension lies side by side."""
    assert_on_device(name, tensor, dtype)
    check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1, f"{name}: the last dimension is strided {tensor.stride()}")
    check(tensor.data_ptr() % _ALIGNMENT == 0, f"{name} does not begin at a multiple of {_ALIGNMENT} bytes")
    return tensor.host  # type: ignore[attr-defined,no-any-return]


def whole(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the numbers of a contiguous device tensor."""
    assert_on_device(name, tensor, dtype)
    check(tensor.is_contiguous(), f"{name} is not contiguous: {tensor.stride()}")
    return tensor.host  # type: ignore[attr-defined,no-any-return]


def assert_on_device(name: str, tensor: Tensor, dtype: torch.dtype | None) -> None:
    check(isinstance(tensor, DeviceTensor), f"{name} is not on the device")
    check(dtype is None or tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}")


def host_ints(name: str, tensor: Tensor) -> list[int]:
    check(not isinstance(tensor, DeviceTensor), f"{name} is on the device: planning would wait for it")
    check(tensor.dtype == torch.int32 and tensor.is_contiguous(), f"{name} is {tensor.dtype} {tensor.stride()}")
    found: list[int] = tensor.tolist()
    return found
