"""Tensors in files, read by slice: of experts that are stored in one tensor for all, as if each had its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from ...models.checkpoint import expert_parts
from ...models.config import ModelConfig
from ...models.parts.expert_stacks import StackPart


class TensorSlice(Protocol):
    """A tensor in a file: read by slice."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: tuple[slice, ...]) -> Tensor: ...


class TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> TensorSlice: ...
    def get_tensor(self, name: str) -> Tensor: ...


class _OneExpert:
    """Implements `TensorFile` and `TensorSlice` of one expert's matrix, or its scale: no other's numbers are read."""

    def __init__(self, file: TensorFile, stack: str, part: StackPart) -> None:
        self._file, self._stack, self._part = file, stack, part

    def keys(self) -> list[str]:
        return [self._part.name]

    def get_slice(self, name: str) -> TensorSlice:
        return self

    def get_tensor(self, name: str) -> Tensor:
        return self[tuple(slice(0, size) for size in self._part.shape)]

    def get_shape(self) -> list[int]:
        return list(self._part.shape)

    def get_dtype(self) -> str:
        return self._file.get_slice(self._stack).get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        part, stack = self._part, self._file.get_slice(self._stack)
        one = slice(part.expert, part.expert + 1)
        if not part.shape:  # a scale
            return stack[(one,)].reshape(())
        rows, columns = index
        rows = slice(part.start + rows.start, part.start + rows.stop)
        return stack[(one, columns, rows)][0].T if part.is_transposed else stack[(one, rows, columns)][0]


def with_parts(files: Mapping[str, tuple[TensorFile, str]], config: ModelConfig) -> dict[str, tuple[TensorFile, str]]:
    """Return tensor name -> its file and its name there, with a stack of experts in as many parts."""
    shapes = {name: tuple(file.get_slice(own_name).get_shape()) for name, (file, own_name) in files.items()}
    found = dict(files)
    for name, parts in expert_parts(config, shapes).items():
        file, own_name = found.pop(name)
        found |= {part.name: (_OneExpert(file, own_name, part), part.name) for part in parts}
    return found
