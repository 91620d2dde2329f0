"""The set of this machine's kind that widens bfloat16: another than most processors' best, and there on nearly all."""

from __future__ import annotations

from kvferry.common.config import CpuIsa
from kvferry.engine.cpu.compiler import IS_ARM

WIDENED: CpuIsa = "neon" if IS_ARM else "avx2"
