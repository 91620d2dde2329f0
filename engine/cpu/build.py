"""Chooses an instruction set for this processor and loads the C++ of `native/` for it, compiled once per machine.

    load(folder) -> the library: from the wheel, or built at first use (a few seconds) and kept below `folder`

amx          AVX-512 with bfloat16 products, and AMX tiles where sums are many
avx512_bf16  AVX-512 with bfloat16 products
avx2         AVX2 with FMA, bfloat16 widened
avx2_float32 the same for models in float32, which is not widened

neon_bf16    ARM's NEON with products of bfloat16 and of bytes (Armv8.6, or 8.2 with both)
neon         NEON with products of signed bytes (Armv8.2 with `asimddp`), bfloat16 widened
neon_float32 the same for models in float32

A processor that has one has those of its kind below. Float32 has AVX2 and NEON alone: products of bfloat16 do nothing
for it, and vectors of twice the width not always. What the functions mean stands with the source; their callers' side
is `model.py` and `decoder.py`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import structlog

from ...common.config import CpuIsa
from ...common.errors import ConfigError
from ...common.processor import processor_features
from .compiler import ALL_SETS, FLOAT32_SETS, SETS, NativeUnavailable, find_compilers, prebuilt, try_out
from .kept import is_kept, load_kept, opened, why_not_kept

log = structlog.get_logger(__name__)


def load(folder: Path, isa: CpuIsa = "auto", *, is_float32: bool = False) -> ctypes.CDLL:
    """Load the library of the best set that can be had, or of the named one. Its calls release the interpreter's lock.

    `is_float32`: for models in float32; else in bfloat16. Raises NativeUnavailable, and ConfigError where the processor
    lacks the named set, or float32 has none of the name. A set below the best is told in the log, with the reasons.
    """
    reasons: list[NativeUnavailable] = []
    for name in usable_sets(isa, is_float32=is_float32):
        try:
            library = _load(folder, name)
        except NativeUnavailable as reason:
            reasons.append(reason)
        else:
            if reasons:
                log.warning("slower_instruction_set", loaded=name, reasons=list(map(str, reasons)))
            return library
    raise reasons[0]


def usable_sets(isa: CpuIsa = "auto", *, is_float32: bool = False) -> list[str]:
    """Return the sets that this processor has, the best one first; a named one alone. Raises as `load` does."""
    features, sets = processor_features(), FLOAT32_SETS if is_float32 else SETS
    if isa == "auto":
        found = [name for name, needed in sets.items() if needed <= features]
        if not found:
            raise NativeUnavailable(f"the processor lacks {_names(min(sets.values(), key=len) - features)}")
        return found
    if missing := ALL_SETS[isa] - features:
        raise ConfigError(f"cpu_isa: {isa} needs {_names(missing)}, which this processor lacks; use auto")
    if not is_float32:
        return [isa]
    if (name := f"{isa}_float32") not in sets:
        others = " or ".join(["auto", *(each.removesuffix("_float32") for each in sets)])
        raise ConfigError(f"cpu_isa: {isa} computes bfloat16 alone; for float32 use {others}")
    return [name]


def describe(folder: Path, isa: CpuIsa = "auto", *, is_float32: bool = False) -> str:
    """Say which set would be loaded, and from where; compilers are tried on a few lines. Raises as `load` does."""
    reasons: list[NativeUnavailable] = []
    for name in usable_sets(isa, is_float32=is_float32):
        if prebuilt(name) is not None:
            return f"{name}, prebuilt"
        for command in _compilers(reasons):
            try:
                if not (is_there := is_kept(folder, name, command)):
                    try_out(name, command)
            except NativeUnavailable as reason:
                reasons.append(reason)
            else:
                why = "" if is_there else why_not_kept(folder)
                return f"{name}, built by {' '.join(command)}" + (f", not kept in the cache: {why}" if why else "")
    raise reasons[0]


def _compilers(reasons: list[NativeUnavailable]) -> list[tuple[str, ...]]:
    try:
        return find_compilers()
    except NativeUnavailable as reason:
        reasons.append(reason)
        return []


def _load(folder: Path, isa: str) -> ctypes.CDLL:
    reasons: list[NativeUnavailable] = []
    library = _prebuilt(isa, reasons) or _made(folder, isa, reasons)
    library.kvferry_may_run.restype = ctypes.c_bool
    if not library.kvferry_may_run():
        raise NativeUnavailable(f"the kernel does not let this process use {isa}")
    return library


def _prebuilt(isa: str, reasons: list[NativeUnavailable]) -> ctypes.CDLL | None:
    """Return None where none is there, or the one that is needs a newer libc."""
    found = prebuilt(isa)
    try:
        return None if found is None else opened(found)
    except NativeUnavailable as reason:
        reasons.append(reason)
        return None


def _made(folder: Path, isa: str, reasons: list[NativeUnavailable]) -> ctypes.CDLL:
    """Load what the first compiler makes that can: a system's own may be too old, and another beside it."""
    for command in _compilers(reasons):
        try:
            return load_kept(folder, isa, command)
        except NativeUnavailable as reason:
            reasons.append(reason)
    raise reasons[0]


def _names(features: frozenset[str]) -> str:
    return ", ".join(sorted(features))
