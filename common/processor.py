"""The processor, as Linux tells of it."""

from __future__ import annotations

from pathlib import Path


def processor_fields(path: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the first processor's fields, on x86 `model name` and `flags` among them, on ARM `Features`; or none."""
    try:
        first = path.read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def processor_features(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what the first processor can do, by Linux's names; nothing where it is neither x86 nor ARM."""
    fields = processor_fields(path)
    return frozenset(fields.get("flags", fields.get("Features", "")).split())
