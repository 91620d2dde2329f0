"""Experts of a GGUF file: stacks of matrices, one of all gates, one of all ups and one of all downs of a layer.

They become a tensor for each matrix of each expert, in its blocks; or gpt-oss's stacks, in which rows of gate and up
stand in turns, and whose MXFP4 has a block's numbers in pairs of neighbours, where a file has its first half beside its
second.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..families.experts import ExpertTraits
from .tensors import PLAIN, Part, StoredTensor, bytes_of, stored, to_bfloat16

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .tensors import Array

MXFP4 = "MXFP4"
MXFP4_STACK = "MXFP4 in stacks"  # as gpt-oss has them, not as blocks
_BOTH = "gate_up.weight"
_MXFP4_BYTES = 17  # of a block: the exponent, and 32 numbers of 4 bits

Stacks = Mapping[str, Mapping[str, Part]]  # layer -> "gate.weight", "up.weight" ... -> all experts' of that layer


def expert_tensors(stacks: Stacks, of: ExpertTraits, kept: Collection[str]) -> Iterator[StoredTensor]:
    """Yield the tensors of all layers' experts. Raises ValueError where a layer lacks one."""
    wanted = [f"{part}.weight" for part in ("gate", "up", "down")[-len(of.parts) :]]
    wanted += ["gate.bias", "up.bias", "down.bias"] if of.is_stacked else []
    stacks = {layer: _apart(parts) for layer, parts in stacks.items()}
    for layer, parts in stacks.items():
        if parts.keys() != set(wanted):
            found = ", ".join(sorted(parts))
            raise ValueError(f"blk.{layer} has of its experts {found} and needs {', '.join(wanted)}")
    if of.is_stacked:
        are_mxfp4 = all(parts[name].kind == MXFP4 for parts in stacks.values() for name in wanted[:3])
        for layer, parts in stacks.items():
            yield from _stacked(f"model.layers.{layer}.{of.module}.experts", parts, are_mxfp4=are_mxfp4)
        return
    for layer, parts in stacks.items():
        for name, own in zip(wanted, of.parts, strict=True):
            for index, part in enumerate(parts[name].of_experts()):
                module = ".".join(filter(None, (f"model.layers.{layer}", of.module, f"experts.{index}.{own}")))
                yield stored(part, f"{module}.weight", kept, may_widen=True)


def _apart(parts: Mapping[str, Part]) -> Mapping[str, Part]:
    """Return a layer's stacks, one that has each expert's gate before its up as two."""
    both = parts.get(_BOTH)
    if both is None:
        return parts
    size = both.shape[1] // 2
    halves = {name: both.rows_of_experts(first, size) for name, first in (("gate.weight", 0), ("up.weight", size))}
    return {name: part for name, part in parts.items() if name != _BOTH} | halves


def _stacked(name: str, parts: Mapping[str, Part], *, are_mxfp4: bool) -> Iterator[StoredTensor]:
    gate, up, down = (parts[f"{part}.weight"] for part in ("gate", "up", "down"))
    (count, inner, hidden), biases = gate.shape, [parts[f"{part}.bias"] for part in ("gate", "up", "down")]
    matrices = {"gate_up_proj": ((gate, up), (2 * inner, hidden)), "down_proj": ((down,), (hidden, inner))}
    for matrix, (sources, (size_out, size_in)) in matrices.items():
        if are_mxfp4:
            groups = (count, size_out, size_in // 32)
            numbers, exponents = partial(_mxfp4_numbers, sources), partial(_mxfp4_exponents, sources)
            yield StoredTensor(f"{name}.{matrix}_blocks", "U8", (*groups, 16), numbers, kind=MXFP4_STACK)
            yield StoredTensor(f"{name}.{matrix}_scales", "U8", groups, exponents, kind=MXFP4_STACK)
        else:
            kinds = {source.kind for source in sources}
            kind = kinds.pop() if len(kinds) == 1 else "+".join(sorted(kinds))
            dtype, widened = (kind, "") if kind in PLAIN else ("BF16", kind)
            numbers = partial(_plain, sources, dtype)
            yield StoredTensor(f"{name}.{matrix}", dtype, (count, size_in, size_out), numbers, widened_from=widened)
    yield StoredTensor(f"{name}.gate_up_proj_bias", "F32", (count, 2 * inner), partial(_biases, biases[:2]))
    yield StoredTensor(f"{name}.down_proj_bias", "F32", (count, hidden), partial(_biases, biases[2:]))


def _in_turns(parts: list[Array]) -> Array:
    """[outputs, ...] of each -> [outputs of all, ...], one of each in turns."""
    import numpy as np

    return np.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def _of_experts(sources: tuple[Part, ...] | list[Part]) -> Iterator[list[Part]]:
    yield from (list(parts) for parts in zip(*(source.of_experts() for source in sources), strict=True))


def _mxfp4_numbers(sources: tuple[Part, ...]) -> Iterator[Array]:
    """Yield each expert's numbers, two in a byte: neighbours."""
    for parts in _of_experts(sources):
        yield _pairs(bytes_of(_in_turns([_blocks(part)[..., 1:] for part in parts])))


def _pairs(halves: npt.NDArray[np.uint8]) -> Array:
    """[..., 16] bytes, numbers 0 to 15 of a block in the low halves and 16 to 31 in the high ones -> in pairs."""
    import numpy as np

    numbers = np.concatenate((halves & 15, halves >> 4), -1)
    packed: npt.NDArray[np.uint8] = numbers[..., ::2] | numbers[..., 1::2] << 4
    return packed


def _mxfp4_exponents(sources: tuple[Part, ...]) -> Iterator[Array]:
    for parts in _of_experts(sources):
        yield bytes_of(_in_turns([_blocks(part)[..., 0] for part in parts]))


def _blocks(part: Part) -> npt.NDArray[np.uint8]:
    """[outputs, groups, bytes of a block]."""
    rows: npt.NDArray[np.uint8] = bytes_of(part.rows).reshape(len(part.rows), -1, _MXFP4_BYTES)
    return rows


def _plain(sources: tuple[Part, ...], dtype: str) -> Iterator[Array]:
    """Yield each expert's matrix, [inputs, outputs]."""
    import numpy as np

    for parts in _of_experts(sources):
        numbers = np.ascontiguousarray(_in_turns([part.numbers() for part in parts]).T, dtype=np.float32)
        yield to_bfloat16(numbers) if dtype == "BF16" else numbers.astype(np.float16 if dtype == "F16" else np.float32)


def _biases(sources: list[Part]) -> Iterator[Array]:
    import numpy as np

    for parts in _of_experts(sources):
        yield _in_turns([part.numbers() for part in parts]).astype(np.float32)
