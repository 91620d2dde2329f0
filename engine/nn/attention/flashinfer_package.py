"""FlashInfer as a package: how it is imported, and its own ways to say a window and a number in 8 bits."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from ....common.errors import ConfigError
from ....common.extras import FLASHINFER

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


def check_narrow(pages: Tensor) -> None:
    """Raises ConfigError where no kernel multiplies 8-bit queries by these pages."""
    if pages.dtype != torch.float8_e4m3fn:
        raise ConfigError("attention_backend = flashinfer_fp8 needs pages in 8 bits: --kv-cache-dtype fp8")
    if torch.cuda.get_device_capability(pages.device) != _NARROW_CAPABILITY:
        raise ConfigError("attention_backend = flashinfer_fp8 needs a Hopper card (capability 9.0); use auto")


def window_left(window: int | None) -> int:
    """Count the keys to the left of a query as FlashInfer does, itself excluded; -1 is all of them."""
    return -1 if window is None else window - 1
