"""Torch's operations over device tensors: computed on the tensors that hold the numbers, with a real device's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import nibbles, products, stream
from .memory import DeviceTensor, download, fresh, is_cuda, upload
from .stream import note_launch

# The host waits for their result, or for its size.
_READ_BACK = {
    *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose"),
    *("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2", "aten::repeat_interleave"),
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_ALLOCATIONS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided"),
    *("aten::new_empty", "aten::new_empty_strided"),
}


_SEQUENCES = (list, tuple)
_PLAIN = frozenset({int, float, bool, type(None)})  # told from tensors at once, which `isinstance` takes long for
_shares_memory: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


def _name_of(func: Any) -> str:
    """Return an operation's name, as its schema has it: asking that takes longer."""
    name: str = func._overloadpacket._qualified_op_name
    return name


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation of which at least one argument is a device tensor."""
    name = _name_of(func)
    if name == "aten::copy_":
        return _copy(func, *args, **kwargs)
    if name in ("aten::to", "aten::_to_copy"):
        return _to(func, args, kwargs)
    if name in ("aten::pin_memory", "aten::_pin_memory"):
        raise RuntimeError("cannot pin a tensor of cuda:0: only dense CPU tensors can be pinned")
    if name in _READ_BACK:
        stream.wait(name)
    return compute(func, args, kwargs)


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, tensors = _name_of(func), list[Tensor]()
    hosts: list[Any] = _hosts(args, tensors)
    named, stays = {}, True
    if kwargs:
        values = [value for key, value in kwargs.items() if key != "pin_memory"]
        named = dict(zip((key for key in kwargs if key != "pin_memory"), _hosts(values, tensors), strict=True))
        stays = not is_host(named.get("device"))
        if "device" in named and stays:
            named["device"] = None
    _check_devices(name, tensors)
    kernel: Callable[..., Any] = _OWN_KERNELS.get(func.name(), func)
    result = kernel(*hosts, **named)
    if not stays:
        return result
    if name in _ALLOCATIONS:
        return fresh(result)
    if not (func.is_view and _is_view_of(result, tensors)):
        note_launch(_repeating(kernel, hosts, named, result))
    return _on_device(result, tensors)


def _is_view_of(result: Any, given: list[Tensor]) -> bool:
    """Tell whether a result shares memory with an argument: a reshape, which may be a view, may be a copy too."""
    for made in result if isinstance(result, _SEQUENCES) else (result,):
        for tensor in given:
            if _shares_memory(made, tensor.host if isinstance(tensor, DeviceTensor) else tensor):
                break
        else:
            return False
    return True


def is_host(device: Any) -> bool:
    return device is not None and not is_cuda(device)


def _repeating(kernel: Callable[..., Any], hosts: Any, named: Any, result: Any) -> Callable[[], None] | None:
    """Return what a replay does: what the operation makes goes where it went when it was captured."""
    if not stream.is_capturing():
        return None
    passed = _tensors(hosts) + _tensors(named.values())
    written = [made for made in _tensors((result,)) if not any(made is given for given in passed)]
    if not written:
        return lambda: kernel(*hosts, **named)

    def launch_again() -> None:
        made = _tensors((kernel(*hosts, **named),))
        for target, new in zip(written, made[-len(written) :], strict=True):
            if target.data_ptr() != new.data_ptr():
                target.copy_(new)

    return launch_again


def _on_device(result: Any, given: list[Tensor]) -> Any:
    """Wrap what came out; an argument that was written to comes out as itself."""
    if isinstance(result, Tensor):
        for tensor in given:
            if isinstance(tensor, DeviceTensor) and tensor.host is result:
                assert tensor.shape == result.shape, "a device tensor that changes its shape is not emulated"
                return tensor
        return DeviceTensor(result)
    if isinstance(result, list | tuple):
        return type(result)([_on_device(part, given) for part in result])
    return result


def _tensors(values: Iterable[Any]) -> list[Any]:
    """List the tensors among values, in sequences of these, too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _SEQUENCES):
            found += _tensors(value)
    return found


def _hosts(values: Iterable[Any], found: list[Tensor]) -> list[Any]:
    """Replace device tensors by what holds their numbers; all tensors are added to those that were found."""
    hosts = list[Any]()
    for value in values:
        if type(value) in _PLAIN:
            hosts.append(value)
        elif isinstance(value, Tensor):
            found.append(value)
            hosts.append(value.host if isinstance(value, DeviceTensor) else value)
        elif isinstance(value, _SEQUENCES) and not isinstance(value, torch.Size):
            hosts.append(type(value)(_hosts(value, found)))
        else:
            hosts.append(value)
    return hosts


def _host_of(value: Any) -> Any:
    [host] = _hosts([value], [])
    return host


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if isinstance(tensor, DeviceTensor) or tensor.dim() == 0:
            continue
        if name not in _INDEXING:
            raise RuntimeError(f"{name}: expected all tensors on cuda:0, but {tuple(tensor.shape)} is on cpu")
        stream.wait("an index that the host holds")


# --- copies -------------------------------------------------------------------------------------------------------


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        result: Tensor = compute(func, (target, source), {})
        return result
    if isinstance(source, DeviceTensor):
        download(target, source.host, non_blocking=non_blocking)
        return target
    assert isinstance(target, DeviceTensor)
    is_direct = source.shape == target.shape and source.dtype == target.dtype
    is_direct = is_direct and source.is_contiguous() and target.host.is_contiguous()
    upload(target.host, source, non_blocking=non_blocking and is_direct, what=f"copy_ of {tuple(source.shape)}")
    return target


@cache
def _argument_names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


def _to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = dict(zip(_argument_names(func), args, strict=False)) | kwargs
    source, like = named["self"], named.get("other")
    assert isinstance(source, DeviceTensor), "install.py sees others before torch does"
    device, dtype = (like.device, like.dtype) if like is not None else (named.get("device"), named.get("dtype"))
    if is_host(device):
        if named.get("non_blocking"):
            raise stream.Race('.to("cpu", non_blocking=True): its result may be read before it has come')
        stream.wait("a copy to the host")
        return source.host.to(dtype or source.dtype, copy=True)
    if _name_of(func) == "aten::to" and not named.get("copy") and dtype in (None, source.dtype):
        return source
    result: Tensor = compute(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype or source.dtype})
    return result


# --- indices ------------------------------------------------------------------------------------------------------


def take(tensor: DeviceTensor, key: Any) -> DeviceTensor:
    """Do as `tensor[key]`."""
    host, key = tensor.host, _key(key)
    result = host[key]
    if _is_gathering(key):
        note_launch(lambda: result.copy_(host[key]))
    return DeviceTensor(result)


def put(tensor: DeviceTensor, key: Any, value: Any) -> None:
    """Do as `tensor[key] = value`."""
    host, key = tensor.host, _key(key)
    if isinstance(value, Tensor) and not isinstance(value, DeviceTensor):
        if _is_gathering(key) and value.dim():
            raise RuntimeError(f"index_put_: expected the values on cuda:0, but {tuple(value.shape)} is on cpu")
        upload(host[key], value, non_blocking=False, what="an assignment")
        return
    value = _host_of(value)

    def kernel() -> None:
        host[key] = value

    stream.launch(kernel)


def _key(key: Any) -> Any:
    """Return an index over tensors of the host; lists and tensors of the host are uploaded for it."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, list) or (isinstance(part, Tensor) and not _is_cheap(part)) for part in parts):
        stream.wait("an index that the host holds, or a mask")
    parts = tuple(torch.tensor(part) if isinstance(part, list) else _host_of(part) for part in parts)
    return parts if isinstance(key, tuple) else parts[0]


def _is_cheap(index: Tensor) -> bool:
    return isinstance(index, DeviceTensor) and index.dtype not in (torch.bool, torch.uint8)


def _is_gathering(key: Any) -> bool:
    return any(isinstance(part, Tensor) for part in (key if isinstance(key, tuple) else (key,)))


_OWN_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::mm.dtype": products.mm_in_dtype,
    "aten::_scaled_mm": products.scaled_mm,
    "aten::_int_mm": products.int_mm,
    "aten::_grouped_mm": products.grouped_mm,
    "aten::_scaled_grouped_mm": products.scaled_grouped_mm,
    "aten::_convert_weight_to_int4pack": nibbles.convert_weight_to_int4pack,
    "aten::_weight_int4pack_mm": nibbles.weight_int4pack_mm,
    "kvferry::coded_product": products.coded_product,
}
