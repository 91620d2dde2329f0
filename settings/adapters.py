"""Adapters beside the model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..common.config import Settings
from .option import ALL, ENGINES, FRONTS, Option
from .values import Adapters, Count


class AdapterSettings(Settings):
    """Adapters."""

    enable_lora: Annotated[
        bool, Option("Adapters", "Serve adapters (LoRA) beside the model, each under a name of its own.", ALL)
    ] = False
    lora_modules: Annotated[
        Adapters,
        Option("Adapters", "NAME=DIRECTORY of an adapter as peft saves it, served from the start; several.", FRONTS),
    ] = ()
    max_loras: Annotated[int, Field(ge=1, le=1024), Option("Adapters", "Adapters in a step at once.", ENGINES)] = 8
    max_lora_rank: Annotated[
        int,
        Field(ge=1, le=256),
        Option("Adapters", "Largest rank that is served; memory is set aside for it.", ALL),
    ] = 16
    max_cpu_loras: Annotated[
        Count | None, Option("Adapters", "Adapters kept in a worker's host memory. Default: max_loras.", ENGINES)
    ] = None
    lora_experts: Annotated[
        bool,
        Option("Adapters", "Set memory aside on GPUs for adapters of experts; on CPUs they need none.", ENGINES),
    ] = False
    allow_runtime_lora_updating: Annotated[
        bool,
        Option("Adapters", "Let clients load and unload adapters; without it, the admin listener alone does.", FRONTS),
    ] = False
