"""Probes of a checkpoint's weights, kept where the doctor finds them: how far apart their forms are.

A worker whose weights may be mixed with others measures what its model thinks of fixed tokens (`engine/probe.py`). It
tells the router, and keeps it here for whoever asks before a start.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import msgspec
from blake3 import blake3

from .default import cache_dir
from .files import write_whole


def keep_probe(model_dir: Path, form: str, values: tuple[float, ...], *, cache: Path | None = None) -> None:
    """Keep the probe of one form of a checkpoint's weights. Where nothing can be written, none is kept."""
    with suppress(OSError):
        write_whole(_place(model_dir, form, cache), msgspec.json.encode(values))


def kept_probes(model_dir: Path, forms: Iterable[str], *, cache: Path | None = None) -> dict[str, tuple[float, ...]]:
    """Return the probes that are kept of these forms."""
    found: dict[str, tuple[float, ...]] = {}
    for form in forms:
        with suppress(OSError, msgspec.DecodeError):
            found[form] = msgspec.json.decode(_place(model_dir, form, cache).read_bytes(), type=tuple[float, ...])
    return found


def probe_distance(probes: Iterable[tuple[float, ...]]) -> float | None:
    """Return the mean difference of the two probes that are furthest apart. None: there are no two."""
    return max((_mean_difference(*pair) for pair in combinations(filter(None, probes), 2)), default=None)


def _mean_difference(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    differences = [abs(a - b) for a, b in zip(one, other, strict=False)]
    return sum(differences) / len(differences)


def _place(model_dir: Path, form: str, cache: Path | None) -> Path:
    marks = f"{model_dir.resolve()}:{(model_dir / 'config.json').stat().st_mtime_ns}"
    return (cache or cache_dir()) / "probes" / f"{blake3(marks.encode()).hexdigest(length=16)}-{form}.json"
