"""Memory of adapters beyond their slots: what they have for experts is taken when they are loaded (engine/nn)."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.config import EngineConfig
from ..models.adapter import AdaptedModule, Adapter
from ..models.config import ModelConfig
from .rank_tensors import is_expert
from .weights import item_bytes

_BY_INPUTS = ("down_proj", "w2")  # of which ranks have parts of the inputs


def expert_modules(adapter: Adapter) -> list[AdaptedModule]:
    """List those of its modules that are routed experts'."""
    return [module for module in adapter.modules if is_expert(module.name)]


def expert_adapter_bytes(engine: EngineConfig, model: ModelConfig, adapters: Sequence[Adapter]) -> int:
    """Count the bytes that these adapters take on one rank for experts, as many of the largest as it keeps at once."""
    sizes = [sum(_rank_numbers(module, engine) for module in expert_modules(adapter)) for adapter in adapters]
    kept = sorted(sizes, reverse=True)[: max(engine.max_loras, engine.max_cpu_loras or 0)]
    return round(sum(kept) * item_bytes(engine, model))


def _rank_numbers(module: AdaptedModule, engine: EngineConfig) -> float:
    """Count a rank's numbers of an expert's two matrices: of a part of them, or of some experts' whole ones."""
    (num_outputs, rank), num_inputs, num_ranks = module.up.shape, module.down.shape[1], engine.tensor_parallel_size
    if engine.enable_expert_parallel:
        return rank * (num_outputs + num_inputs) / num_ranks
    split, whole = num_outputs, num_inputs
    if module.name.endswith(_BY_INPUTS):
        split, whole = whole, split
    return rank * (whole + split / num_ranks)
