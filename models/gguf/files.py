"""A model in one GGUF file or in several, as `llama-gguf-split` and the hub's uploaders cut it.

model-00001-of-00003.gguf    the model's fields, and the first tensors (or none)
model-00002-of-00003.gguf    more tensors
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ConfigError
from .fields import GgufFields
from .header import check_header

if TYPE_CHECKING:
    from gguf import ReaderTensor

_ONE_OF_SEVERAL = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_name(path: Path) -> str:
    """Return the model's name: the file's, without its place among several."""
    match = _ONE_OF_SEVERAL.fullmatch(path.name)
    return path.stem if match is None else match[1]


def gguf_files(path: Path) -> list[Path]:
    """List all files of the model that has this one, the first one first. Raises ConfigError if one is not there."""
    match = _ONE_OF_SEVERAL.fullmatch(path.name)
    if match is None:
        return [path]
    files = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    if path not in files:
        raise ConfigError(f"{path} is no part that its own name tells of: there are {int(match[3])}")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(f"{path} is one of {len(files)} files; not beside it: {', '.join(missing[:5])}")
    return files


def read_gguf(path: Path) -> tuple[GgufFields, list[ReaderTensor]]:
    """Return the model's fields and the tensors of all its files, mapped. Raises ConfigError or ValueError."""
    from gguf import GGUFReader

    files = gguf_files(path)
    for file in files:
        check_header(file)
    readers = [GGUFReader(file) for file in files]
    fields = GgufFields(readers[0])
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    owners: dict[str, Path] = {}
    for index, (file, reader) in enumerate(zip(files, readers, strict=True)):
        own = GgufFields(reader)
        number, count = own.integer("split.no", 0), own.integer("split.count", 0) or 1
        if (number, count) != (index, len(files)):
            raise ValueError(
                f"{file.name} is by its fields part {number + 1} of {count}, by its name {index + 1} of {len(files)}"
            )
        for tensor in reader.tensors:  # of two in one file the library tells
            if (first := owners.setdefault(tensor.name, file)) is not file:
                raise ValueError(f"the tensor {tensor.name} is in two of its files, {first.name} and {file.name}")
    if (told := fields.integer("split.tensors.count", len(tensors))) != len(tensors):
        raise ValueError(f"its files have {len(tensors)} tensors where they tell of {told}")
    return fields, tensors
