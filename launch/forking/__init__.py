"""Starts programs as forks of one process that has their imports: torch's alone take a second of a core each time."""

from __future__ import annotations

from .client import ForkedProcess, ForkServer

__all__ = ["ForkServer", "ForkedProcess"]
