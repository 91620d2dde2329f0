"""The settings of an adapter (LoRA) as peft's adapter_config.json tells them, and what of them is not served."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ...common.errors import ConfigError
from .config_fields import ConfigFields

CONFIG_NAME = "adapter_config.json"

# Settings under which an adapter is more than the sum above; empty ones are fine, but for those below.
_REFUSED_SETTINGS = {
    "use_dora": "DoRA scales each output of the whole matrix",
    "modules_to_save": "whole modules would replace the model's",
    "lora_bias": "biases are added to what a module yields",
    "fan_in_fan_out": "the matrices are of transposed modules",
    "layer_replication": "layers would be added to the model",
    "target_parameters": "parameters outside of linear modules are adapted, stacked experts among them",
    "trainable_token_indices": "embeddings are adapted",
    "alora_invocation_tokens": "it would be applied to a part of the prompt alone",
    "use_qalora": "inputs are pooled first",
    "use_bdlora": "the matrices are blocks of a diagonal",
    "kasa_config": "singular values stand between the matrices, beside changed base weights",
    "arrow_config": "each token would choose among adapters",
    "monteclora_config": "matrices are drawn around those that are stored",
}
_EMPTY_TOO = {"kasa_config", "monteclora_config"}  # peft takes an empty object of these for one with its defaults
# Ways to begin which leave other base weights than the model's.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def checked_settings(path: Path, config: bytes) -> ConfigFields:
    """Refuse settings under which an adapter is more than a sum of products. Raises ConfigError."""
    fields = ConfigFields(path / CONFIG_NAME, json.loads(config))
    if fields.raw.get("peft_type", "LORA") != "LORA":
        raise fields.refuse("peft_type", "adapters are LORA here")
    for key, why in _REFUSED_SETTINGS.items():
        value = fields.raw.get(key)
        if value or (value == {} and key in _EMPTY_TOO):
            raise fields.refuse(key, why)
    if fields.raw.get("bias", "none") != "none":
        raise fields.refuse("bias", "biases of the model would change; only none is served")
    if str(fields.raw.get("init_lora_weights", "")).lower().startswith(_CHANGES_BASE):
        raise fields.refuse("init_lora_weights", "it was made beside changed base weights; convert it to plain LoRA")
    return fields


def check_targets(path: Path, fields: ConfigFields, modules: Mapping[str, object]) -> None:
    """Refuse tensors that peft would leave out. A pattern is not read: what it named was saved. Raises ConfigError."""
    targets = fields.raw.get("target_modules")
    if not isinstance(targets, list):
        return
    for module in modules:
        if not any(isinstance(name, str) and f".{module}".endswith(f".{name}") for name in targets):
            raise ConfigError(f"{path}: there are matrices for {module}, which target_modules {targets} does not name")


class Scales:
    """Ranks and scales of modules, by the settings: patterns name exceptions, the first one that fits wins."""

    def __init__(self, fields: ConfigFields) -> None:
        """Raises ConfigError."""
        rank, alpha = fields.count("r", 8), fields.number("lora_alpha", 8)
        self._is_rs = fields.flag("use_rslora", default=False)
        self._rank, self._alpha = _by_pattern(fields, "rank_pattern", rank), _by_pattern(fields, "alpha_pattern", alpha)

    def of(self, module: str) -> tuple[float, float]:
        """Return a module's rank, and the factor of its product."""
        rank, alpha = self._rank(module), self._alpha(module)
        return rank, alpha / (math.sqrt(rank) if self._is_rs else rank)


def _by_pattern(fields: ConfigFields, key: str, usual: float) -> Callable[[str], float]:
    """Return what tells a module's value: that of the first exception whose pattern fits, else the usual one."""
    exceptions = fields.mapping(key)
    if exceptions is None:
        return lambda module: usual
    try:
        patterns = [(re.compile(rf"(.*\.)?({name})$"), exceptions.number(name)) for name in exceptions.raw]
    except re.error as error:
        raise fields.refuse(key, f"is no pattern: {error}") from error
    return lambda module: next((value for pattern, value in patterns if pattern.match(module)), usual)
