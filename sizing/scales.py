"""Bytes of a scale of quantized weights in a CPU's tiles (engine/cpu/factors.py).

They are a byte where the file has them so, of floats of 4 bits, half precision where it has that, a byte and a share of
a float32 in GGUF's blocks of 256 inputs, else a float32.
"""

from __future__ import annotations

from ..models.storage import Form, Storage

_BYTE, _HALF, _FULL = 1.0, 2.0, 4.0
_GGUF_SCALES = {"Q2_K": 1.5, "Q3_K": 1.5, "Q4_K": 1.5, "Q5_K": 1.5, "Q6_K": 1.25, "IQ4_XS": 1.5, "MXFP4": _BYTE}


def scale_bytes(storage: Storage | None, form: Form, *, is_short: bool) -> float:
    """Return the bytes of a scale of a matrix that is stored so. `is_short`: its plain numbers are bfloat16's."""
    if storage is None:
        return _FULL
    match storage.layout:
        case "float4":
            return _BYTE if is_short else _FULL
        case "gguf":
            return _GGUF_SCALES.get(storage.kind, _HALF)
        case "plain":  # an eighth of a weight's own number has no more digits than that
            return _HALF if form.bits == 4 and is_short else _FULL
        case "gptq" | "awq" | "packed":
            return _FULL if form.has_minima else _HALF
        case _:
            return _FULL
