"""A checkpoint's model as an engine serves it: with the length and the weights' form that were asked for."""

from __future__ import annotations

from dataclasses import replace

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..models.config import ModelConfig
from ..models.quantization import chosen_quantization


def served_model(config: EngineConfig) -> ModelConfig:
    """Read the checkpoint's config. Raises ConfigError."""
    model = ModelConfig.from_dir(config.model_dir)
    model.check_length(config.max_model_len)
    quantization = chosen_quantization(model.quantization, config.quantization)
    model = replace(model, max_model_len=config.max_model_len or model.max_model_len, quantization=quantization)
    if config.mixed_quantization and model.weights_form not in config.mixed_quantization:
        found = f"the weights are {model.weights_form}, not one of {config.mixed_quantization}"
        raise ConfigError(f"mixed_quantization: {found}")
    return model
