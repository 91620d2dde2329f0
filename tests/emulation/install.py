"""`install` gives this process's torch the emulated device, and `import flashinfer` its stand-ins."""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from . import stream
from .memory import CUDA, DeviceTensor, blank, fresh, is_cuda, is_pinned, pin, pinned_copy, to_device, upload

STAND_INS = Path(__file__).parent / "standins"
_CAPABILITY = (9, 0)  # a Hopper card's
_FREE_BYTES, _TOTAL_BYTES = 4 << 30, 8 << 30
_library: list[torch.library.Library] = []  # kept: what is registered goes with it


class CannotEmulate(RuntimeError):
    """This process cannot have the emulated device."""


def install() -> None:
    """Install the device for good, in all threads. Raises CannotEmulate."""
    if _library:
        return
    if torch.cuda.is_available():
        raise CannotEmulate("there is a CUDA device: run the tests on it, not on an emulated one")
    if "flashinfer" in sys.modules:
        raise CannotEmulate("flashinfer is imported already")
    sys.path.insert(0, str(STAND_INS))
    torch.version.cuda = "13.0"
    _replace_torch_cuda()
    _replace_tensor_functions()
    _register_factories()


def _replace_torch_cuda() -> None:
    properties = types.SimpleNamespace(
        name="emulated",
        major=_CAPABILITY[0],
        minor=_CAPABILITY[1],
        multi_processor_count=132,
        total_memory=_TOTAL_BYTES,
    )
    for name, replacement in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "synchronize": lambda device=None: stream.wait("the device"),
        "current_stream": lambda device=None: stream.STREAM,
        "Stream": stream.Stream,
        "stream": lambda used: contextlib.nullcontext(),
        "is_current_stream_capturing": stream.is_capturing,
        "mem_get_info": lambda device=None: (_FREE_BYTES, _TOTAL_BYTES),
        "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "empty_cache": lambda: None,
        "Event": stream.Event,
        "CUDAGraph": stream.CUDAGraph,
        "graph": stream.graph,
        "graph_pool_handle": lambda: (0, 0),
    }.items():
        if not hasattr(torch.cuda, name):
            raise CannotEmulate(f"torch {torch.__version__} has no torch.cuda.{name}: the emulation has to follow it")
        setattr(torch.cuda, name, replacement)


def _replace_tensor_functions() -> None:
    """Replace what asks for pinned memory, and what does not pass torch's dispatcher."""
    _device_constructors()  # kept by torch: `with torch.device(...)` knows them as they are now
    make_tensor, make_generator = torch.tensor, torch.Generator

    def pinning(make: Any) -> Any:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            if not pin_memory:
                return make(*args, **kwargs)
            if is_cuda(kwargs.get("device")):
                raise RuntimeError("only dense CPU tensors can be pinned")
            return pin(make(*args, **kwargs))

        return made

    def tensor(
        data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False, pin_memory: bool = False
    ) -> Tensor:
        if not is_cuda(device):
            host = make_tensor(data, dtype=dtype, device=device, requires_grad=requires_grad)
            return pin(host) if pin_memory else host
        host = make_tensor(data, dtype=dtype)
        target = torch.empty_like(host)
        upload(target, host, non_blocking=False, what="torch.tensor")
        return DeviceTensor(target)

    def zeros(*shape: Any, dtype: Any = None, device: Any = None, pin_memory: bool = False) -> Tensor:
        sizes = shape if isinstance(shape[0], int) else shape[0]
        if not is_cuda(device) or stream.is_capturing():
            return make_zeros(*shape, dtype=dtype, device=device, pin_memory=pin_memory)
        stream.note_launch(None)
        return blank(sizes, dtype)

    class Generator(make_generator):  # type: ignore[misc, valid-type]
        """Draws the CPU's numbers for either device."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return super().__new__(cls, "cpu" if is_cuda(device) else device)

        def __init__(self, device: Any = "cpu") -> None:
            super().__init__()

    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(self, DeviceTensor):
            named = {name: value for name, value in kwargs.items() if name != "copy"}
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **named)
            if is_cuda(device):
                return to_device(self, dtype, non_blocking=non_blocking)
        return move(self, *args, **kwargs)

    for name in ("empty", "zeros", "ones", "full"):
        setattr(torch, name, pinning(getattr(torch, name)))
    make_zeros = torch.zeros
    for owner, name, replacement in (
        (torch, "tensor", tensor),
        (torch, "zeros", zeros),
        (torch, "Generator", Generator),
        (Tensor, "to", to),
        (Tensor, "pin_memory", lambda self, device=None: pinned_copy(self)),
        (Tensor, "is_pinned", lambda self, device=None: is_pinned(self)),
        (Tensor, "cuda", lambda self, device=None, non_blocking=False: self.to(CUDA, non_blocking=non_blocking)),
    ):
        setattr(owner, name, replacement)


def _register_factories() -> None:
    """Give torch kernels for CUDA that make tensors out of none; all others see a device tensor and come to it."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]

    def empty(size: Any, **kwargs: Any) -> Tensor:
        return fresh(torch.empty(size, dtype=kwargs.get("dtype")))

    def empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
        return fresh(torch.empty_strided(size, stride, dtype=kwargs.get("dtype")))

    def arange(*bounds: Any, **kwargs: Any) -> Tensor:
        return DeviceTensor(torch.arange(*bounds, dtype=kwargs.get("dtype")))

    for name, kernel in {
        "empty.memory_format": empty,
        "empty_strided": empty_strided,
        "arange": arange,
        "arange.start": arange,
        "arange.start_step": arange,
    }.items():
        library.impl(name, kernel, "CUDA")  # type: ignore[no-untyped-call]
    _library.append(library)
