"""For pytest: `-p kvferry.tests.emulation.plugin` gives torch the device before any test module is imported."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
import torch

from .install import CannotEmulate, install
from .stream import COUNTS

# With AMX torch's products of a row depend on how many rows there are, which graphs pad and tests compare.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# Torch, and transformers with its first model, would import these too late for `gc.freeze`: each capture of graphs
# begins with a collection, which would go through them.
for _name in (
    "torch.distributed.tensor",
    "torch._dynamo",
    "transformers.modeling_utils",
    "transformers.generation.utils",
):
    importlib.import_module(_name)
try:
    install()
except CannotEmulate as error:
    raise pytest.UsageError(str(error)) from error
# The kernel of Triton's has a stand-in (products.py), which needs no Triton.
importlib.import_module("kvferry.engine.weights.grouped").has_triton = lambda: True  # type: ignore[attr-defined]

# Nothing is compiled at first use: the runs before a capture are the same.
importlib.import_module("kvferry.engine.cuda.graphs")._WARM_UPS = 1  # type: ignore[attr-defined]

# Its products are too small to be shared: two threads of OpenMP took some five times what one takes, to wait for each
# other.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{count} {name}" for name, count in sorted(COUNTS.items()))
    terminalreporter.write_line(f"the emulated device saw {counts}")
    attention = sys.modules.get("flashinfer.attention")
    if attention is not None:
        terminalreporter.write_line(f"attention modules: {' '.join(sorted(attention.ASKED_FOR))}")
