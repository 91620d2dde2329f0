"""Granite's multipliers, as config.json has them, of a GGUF file's fields."""

from __future__ import annotations

import math

from .model_file import Json, ModelFile


def turns_positions(file: ModelFile) -> bool:
    """Tell whether a Granite's queries and keys are turned by their positions."""
    return file.fields.flag(file.fields.of_model("rope.scaling.finetuned"), default=True)


def granite_fields(file: ModelFile) -> Json:
    return {
        "attention_multiplier": file.number("attention.scale", 0.0) or 1 / math.sqrt(file.config["head_dim"]),
        "embedding_multiplier": file.number("embedding_scale", 1.0),
        "residual_multiplier": file.number("residual_scale", 1.0),
        "logits_scaling": file.number("logit_scale"),
    }
