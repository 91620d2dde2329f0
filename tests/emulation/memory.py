"""Memory of the device and of the host: device tensors, pinned memory, and copies between the two."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import stream
from .stream import COUNTS, STREAM, Race, forbid_in_capture

CUDA = torch.device("cuda", 0)
_GARBAGE = 0x7B  # of each byte that was not waited for
_GARBAGE_INT = 113
_MAX_FILLED = 1 << 22  # longer integer buffers, workspaces and pages, stay as they are: filling them takes time
_PINNED = "_kvferry_pinned"


class DeviceTensor(Tensor):
    """A tensor that says cuda:0. `data` is an ordinary tensor with its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        with torch._C._InferenceMode(False):  # what `torch.inference_mode` is around, which takes twice as long
            tensor: DeviceTensor = Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                layout=host.layout,
                device=CUDA,
                requires_grad=False,
            )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return operations.dispatch(func, args, kwargs or {})

    def __getitem__(self, key: Any) -> Any:
        return operations.take(self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        operations.put(self, key, value)

    # Torch's own would ask for a guard of the device, which a build for CPUs lacks.

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return operations.dispatch(torch.ops.aten.copy_.default, (self, source, non_blocking), {})  # type: ignore[no-any-return]

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if self.is_contiguous():
            return self
        return operations.dispatch(torch.ops.aten.clone.default, (self,), {"memory_format": memory_format})  # type: ignore[no-any-return]

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        assert not as_tuple
        stream.wait("nonzero")
        return DeviceTensor(self.host.nonzero())

    def item(self) -> Any:
        stream.wait("item")
        return self.host.item()

    def tolist(self) -> Any:
        stream.wait("tolist")
        return self.host.tolist()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"cuda:0 {self.host!r}"


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def fresh(host: Tensor) -> DeviceTensor:
    """Make memory that nobody has written to: what is read from it shows."""
    if host.is_floating_point() and host.dtype.itemsize > 1:
        host.fill_(float("nan"))
    elif host.dtype == torch.float8_e4m3fn:
        host.view(torch.uint8).fill_(0x7F)  # NaN
    elif host.dtype != torch.bool and not host.is_floating_point() and host.numel() < _MAX_FILLED:
        host.fill_(_GARBAGE_INT)
    return DeviceTensor(host)


def blank(shape: Sequence[int], dtype: torch.dtype | None) -> DeviceTensor:
    """Make zeros that take memory where they are written to: a workspace of 256 MiB is hardly used here."""
    dtype = dtype or torch.get_default_dtype()
    area = mmap.mmap(-1, max(1, math.prod(shape)) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return DeviceTensor(torch.frombuffer(area, dtype=torch.uint8).view(dtype)[: math.prod(shape)].view(*shape))


# --- pinned memory ------------------------------------------------------------------------------------------------


def pin(host: Tensor) -> Tensor:
    setattr(host.untyped_storage(), _PINNED, True)
    return host


def is_pinned(tensor: Tensor) -> bool:
    if isinstance(tensor, DeviceTensor):
        return False
    return tensor.numel() == 0 or getattr(tensor.untyped_storage(), _PINNED, False)


def pinned_copy(tensor: Tensor) -> Tensor:
    """Do as `Tensor.pin_memory`."""
    if isinstance(tensor, DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor': only dense CPU tensors can be pinned")
    return tensor if is_pinned(tensor) and tensor.numel() else pin(tensor.clone(memory_format=torch.contiguous_format))


# --- copies -------------------------------------------------------------------------------------------------------


def upload(target: Tensor, source: Tensor, *, non_blocking: bool, what: str) -> None:
    """Copy from the host. `target` holds a device tensor's numbers."""
    forbid_in_capture(f"a copy from the host ({what})")
    STREAM.settle_downloads()
    target.copy_(source)
    if not (non_blocking and is_pinned(source)):
        COUNTS["pageable uploads"] += 1
        return
    COUNTS["uploads"] += 1
    sent = source.clone(memory_format=torch.contiguous_format)

    def settle() -> None:
        if not torch.equal(_bytes_of(sent), _bytes_of(source)):
            raise Race(f"pinned memory was written to before its upload had been waited for ({what})")

    STREAM.push(settle)


def download(target: Tensor, source: Tensor, *, non_blocking: bool) -> None:
    """Copy to the host. `source` holds a device tensor's numbers."""
    forbid_in_capture("a copy to the host")
    if not (non_blocking and is_pinned(target)):
        stream.wait("a copy to the host")
        target.copy_(source)
        return
    COUNTS["downloads"] += 1
    value = source.to(target.dtype, copy=True)
    if target.is_contiguous():
        target.view(-1).view(torch.uint8).fill_(_GARBAGE)
    STREAM.push(lambda: target.copy_(value), is_download=True)


def to_device(source: Tensor, dtype: torch.dtype | None, *, non_blocking: bool) -> DeviceTensor:
    """Do as `source.to("cuda", dtype)`."""
    target = torch.empty_like(source, dtype=dtype or source.dtype)
    is_direct = target.dtype == source.dtype and source.is_contiguous()
    upload(target, source, non_blocking=non_blocking and is_direct, what=f"to, of {tuple(source.shape)}")
    return DeviceTensor(target)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


from . import operations  # noqa: E402  # it computes with device tensors, which are told of it at last
