"""FlashInfer as a package: how it is imported, its own ways to say a window and a number in 8 bits, and sinks, which
its wrappers leave out."""

from __future__ import annotations

import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ....common.errors import ConfigError
from ....common.extras import FLASHINFER
from .base import Scores

_MAX_E4M3 = 448.0
_NARROW_CAPABILITY = (9, 0)  # of the cards whose kernels take queries in 8 bits


def import_flashinfer(purpose: str) -> ModuleType:
    """Import the package with the norms that were tried here: its first import settles which. Raises ConfigError."""
    # Where a library that it may bring along is there, its norms are written in that one unless this says otherwise.
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    try:
        import flashinfer
    except ImportError as error:
        raise ConfigError(f"device: {purpose} on CUDA needs FlashInfer: {FLASHINFER.missing}") from error
    package: ModuleType = flashinfer
    return package


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """Return x / scale as the nearest 8-bit float; torch makes NaN of what is too large, so that is cut off."""
    scaled = x if scale == 1.0 else x.float() / scale
    return scaled.clamp(-_MAX_E4M3, _MAX_E4M3).to(torch.float8_e4m3fn)


def check_narrow(pages: Tensor, scores: Scores) -> None:
    """Raises ConfigError where no kernel multiplies 8-bit queries by these pages, or what it makes of them is other."""
    if scores.cap is not None or scores.sinks is not None:
        what = "capped scores" if scores.sinks is None else "sinks"
        raise ConfigError(f"attention_backend = flashinfer_fp8 attends without {what}, which the model has; use auto")
    if pages.dtype != torch.float8_e4m3fn:
        raise ConfigError("attention_backend = flashinfer_fp8 needs pages in 8 bits: --kv-cache-dtype fp8")
    if torch.cuda.get_device_capability(pages.device) != _NARROW_CAPABILITY:
        raise ConfigError("attention_backend = flashinfer_fp8 needs a Hopper card (capability 9.0); use auto")


def heed_sinks_(out: Tensor, log_sums: Tensor, sinks: Tensor) -> None:
    """Weigh results [rows, heads, head_dim] against sinks [heads] float32, which the wrappers do not know, in place.

    `log_sums` [rows, heads] float32: logarithms to base 2 of the sums of exp(score), as the wrappers give them. A sink
    is one more score in that sum, whose value is zero.
    """
    out.mul_(torch.sigmoid(log_sums * math.log(2) - sinks).unsqueeze(-1))


def window_left(window: int | None) -> int:
    """Count the keys to the left of a query as FlashInfer does, itself excluded; -1 is all of them."""
    return -1 if window is None else window - 1
