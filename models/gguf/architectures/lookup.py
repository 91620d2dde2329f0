"""The architectures of GGUF files that are read: a line for each that says how its files differ.

What llama.cpp's converter does to a checkpoint is undone, so that the directory that comes of a file is read like any
other: it gives the rows of queries and keys another order in some, adds the offset of a norm to its weights, stacks
experts, multiplies by factors beforehand, and leaves away what its own code knows by the architecture
(https://github.com/ggml-org/llama.cpp, `conversion/` and `src/models/`).
"""

from __future__ import annotations

from dataclasses import replace

from ...families.lookup import nearest
from .architecture import Architecture
from .dense import DENSE
from .sparse import MIXTRAL, WITH_EXPERTS
from .stateful import WITH_STATES

ARCHITECTURES = DENSE | WITH_EXPERTS | WITH_STATES
ARCHITECTURES |= {
    # Language models of several parts: those that see are in a file of their own.
    "qwen2vl": ARCHITECTURES["qwen2"],
    "qwen3vl": ARCHITECTURES["qwen3"],
    "qwen3vlmoe": ARCHITECTURES["qwen3moe"],
    "nemotron_h_moe": ARCHITECTURES["nemotron_h"],
}
# A file of `deepseek2` whose experts are scored by a sigmoid.
_DEEPSEEK_V3 = replace(ARCHITECTURES["deepseek2"], checkpoint="DeepseekV3ForCausalLM")
# A file of `olmo2` with a window.
_OLMO3 = replace(ARCHITECTURES["olmo2"], checkpoint="Olmo3ForCausalLM")


def architecture(name: str, *, num_experts: int, window: int, has_sigmoid: bool) -> Architecture:
    """Return the architecture of a file. Raises ValueError, with the nearest that is read."""
    if name == "llama" and num_experts:
        return MIXTRAL
    if name == "olmo2" and window:
        return _OLMO3
    if name == "deepseek2" and has_sigmoid:
        return _DEEPSEEK_V3
    if (found := ARCHITECTURES.get(name)) is None:
        known = f"{', '.join(ARCHITECTURES)}{nearest(name, ARCHITECTURES)}"
        raise ValueError(f"its architecture is {name}; these are read: {known}")
    return found
