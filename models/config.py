"""A checkpoint's word about its model: `config.json` and `generation_config.json`, read once and checked.

Four families run, all of one decoder shape and told apart by flags: Llama (and SmolLM2), Mistral, Qwen2, Qwen3.
Anything that this engine would compute wrongly is refused here by name, before a weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..common.errors import ConfigError
from .config_fields import ConfigFields
from .quantization import Quantization
from .quantization_config import read_quantization

RopeKind = Literal["default", "linear", "llama3", "yarn"]

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_DTYPES = ("float32", "bfloat16", "float16")
_MISTRAL_WINDOW = 4096  # the family's window where config.json does not say


@dataclass(slots=True, frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions; the fields after `factor` belong to the scaling kinds that use them."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int = 0  # positions that the unscaled model was trained on
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # multiplies cos and sin (yarn)


@dataclass(slots=True, frozen=True, kw_only=True)
class ModelConfig:
    """The decoder's shape and flags, of the whole model (not of one rank)."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int  # positions that the checkpoint declares
    rope: RopeConfig
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_windows: tuple[int | None, ...]  # for each layer: keys that a token sees, itself included; None: all
    eos_token_ids: frozenset[int]
    dtype: str  # of the checkpoint
    quantization: Quantization | None = None  # of its matrices; None: plain numbers

    @classmethod
    def from_dir(cls, model_dir: Path) -> ModelConfig:
        """Raises ConfigError with the file's name and the value that does not fit."""
        raw = _read_json(model_dir / "config.json")
        generation_path = model_dir / "generation_config.json"
        generation = _read_json(generation_path) if generation_path.is_file() else {}
        return _parse(ConfigFields(model_dir / "config.json", raw), generation)

    @property
    def weights_form(self) -> str:
        """Return the name by which workers tell their weights' forms apart."""
        return self.quantization.name if self.quantization is not None else "plain"

    @property
    def longest_model_len(self) -> int:
        """Count the positions that the rotary embedding covers: more than declared where its scaling allows more."""
        scaled = int(self.rope.factor * self.rope.original_max_len)
        return max(self.max_model_len, scaled)

    def check_tp_size(self, tp_size: int) -> None:
        """Check that ranks can share each count evenly. Raises ConfigError naming the first one that they cannot."""
        counts = {
            "num_attention_heads": self.num_qo_heads,
            "num_key_value_heads": self.num_kv_heads,
            "intermediate_size": self.intermediate_size,
        }
        for name, count in counts.items():
            if count % tp_size:
                sizes = [size for size in range(1, self.num_kv_heads + 1) if not any(n % size for n in counts.values())]
                raise ConfigError(
                    f"tensor_parallel_size = {tp_size} does not divide the model's {name} = {count}; these do: {sizes}"
                )


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing: a model is a local Hugging Face directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _parse(fields: ConfigFields, generation: Mapping[str, object]) -> ModelConfig:
    architecture = _architecture(fields)
    family = _ARCHITECTURES[architecture]
    _refuse_unsupported(fields)
    hidden_size = fields.count("hidden_size")
    num_qo_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_qo_heads)
    if num_qo_heads % num_kv_heads:
        raise fields.refuse("num_key_value_heads", f"must divide num_attention_heads = {num_qo_heads}")
    head_dim = fields.count("head_dim", 128 if family == "qwen3" else hidden_size // num_qo_heads)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"the head size {head_dim} must be even: rotary positions turn pairs")
    attention_bias = fields.flag("attention_bias", default=False)
    max_model_len = fields.count("max_position_embeddings", 2048)
    return ModelConfig(
        architecture=architecture,
        num_layers=fields.count("num_hidden_layers"),
        hidden_size=hidden_size,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        max_model_len=max_model_len,
        rope=_rope(fields, max_model_len),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        qkv_bias=True if family == "qwen2" else attention_bias and family != "mistral",
        o_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=family == "llama" and fields.flag("mlp_bias", default=False),
        qk_norm=family == "qwen3",
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        sliding_windows=_sliding_windows(fields, family),
        eos_token_ids=_eos_token_ids(fields, generation),
        dtype=_dtype(fields),
        quantization=read_quantization(fields),
    )


def _architecture(fields: ConfigFields) -> str:
    declared = fields.raw.get("architectures")
    name = declared[0] if isinstance(declared, list) and declared else None
    if name is None:  # older checkpoints name the family alone
        family = fields.raw.get("model_type")
        name = next((arch for arch, known in _ARCHITECTURES.items() if known == family), family)
    if name not in _ARCHITECTURES:
        raise ConfigError(
            f"{fields.path}: architecture {name!r} is not supported; these are: {', '.join(sorted(_ARCHITECTURES))}"
        )
    return str(name)


def _refuse_unsupported(fields: ConfigFields) -> None:
    """Refuse settings under which this engine would give wrong answers, or run the checkpoint's own code."""
    if fields.has("auto_map"):
        raise fields.refuse("auto_map", "the checkpoint brings its own code, which is never run")
    if fields.raw.get("hidden_act", "silu") != "silu":
        raise fields.refuse("hidden_act", "only silu is supported")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.refuse("partial_rotary_factor", "only rotary positions over the whole head are supported")


def _rope(fields: ConfigFields, max_model_len: int) -> RopeConfig:
    """`rope_parameters` holds everything in newer checkpoints; older ones have `rope_scaling` and a top-level theta."""
    scaling = fields.mapping("rope_parameters") or fields.mapping("rope_scaling") or ConfigFields(fields.path, {})
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = scaling.raw.get("rope_type") or scaling.raw.get("type") or "default"
    if scaling.number("partial_rotary_factor", 1.0) != 1.0:
        raise scaling.refuse("partial_rotary_factor", "only rotary positions over the whole head are supported")
    if kind == "default":
        nested = [key for key, value in scaling.raw.items() if isinstance(value, dict)]
        if nested:
            raise ConfigError(f"{fields.path}: rotary parameters for each layer type ({nested}) are not supported")
        return RopeConfig(theta=theta)
    original = scaling.count("original_max_position_embeddings", max_model_len)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=scaling.number("factor"), original_max_len=max_model_len)
    if kind == "llama3":
        return _llama3(scaling, theta, original)
    if kind == "yarn":
        return _yarn(scaling, theta, original, max_model_len)
    raise ConfigError(
        f"{fields.path}: rotary scaling {kind!r} is not supported; these are: default, linear, llama3, yarn"
    )


def _llama3(scaling: ConfigFields, theta: float, original: int) -> RopeConfig:
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if low >= high:
        raise scaling.refuse("low_freq_factor", f"must be below high_freq_factor = {high}")
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=scaling.number("factor"),
        original_max_len=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(scaling: ConfigFields, theta: float, original: int, max_model_len: int) -> RopeConfig:
    factor = scaling.number("factor", max_model_len / original)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        default = _yarn_mscale(factor, scaling.number("mscale")) / _yarn_mscale(
            factor, scaling.number("mscale_all_dim")
        )
    else:
        default = _yarn_mscale(factor, 1.0)
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_len=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", default=True),
        attention_factor=scaling.number("attention_factor", default),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Return the temperature of YaRN (Peng et al. 2023, section 3.4), as a factor on cos and sin."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _sliding_windows(fields: ConfigFields, family: str) -> tuple[int | None, ...]:
    num_layers = fields.count("num_hidden_layers")
    if family == "llama":
        return (None,) * num_layers
    if family == "mistral":  # null means none, a missing key the family's default
        explicit = "sliding_window" not in fields.raw or fields.has("sliding_window")
        return ((fields.count("sliding_window", _MISTRAL_WINDOW) if explicit else None),) * num_layers
    if not fields.flag("use_sliding_window", default=False) or (
        "sliding_window" in fields.raw and not fields.has("sliding_window")
    ):
        return (None,) * num_layers
    window = fields.count("sliding_window", 4096)
    return tuple(window if is_sliding else None for is_sliding in _sliding_layers(fields, num_layers))


def _sliding_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    layer_types = fields.raw.get("layer_types")
    if layer_types is None:
        first = fields.raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.refuse("max_window_layers", "must be a whole number")
        return [layer >= first for layer in range(num_layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or not all(t in known for t in layer_types):
        raise fields.refuse("layer_types", f"must name one of {known} for each of {num_layers} layers")
    return [kind == "sliding_attention" for kind in layer_types]


def _eos_token_ids(fields: ConfigFields, generation: Mapping[str, object]) -> frozenset[int]:
    """generation_config.json wins: chat models end their turn with tokens that config.json does not name."""
    value = generation.get("eos_token_id")
    if value is None:
        value = fields.raw.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(f"{fields.path.parent}: eos_token_id = {value!r} must be token ids")
    return frozenset(ids)


def _dtype(fields: ConfigFields) -> str:
    value = fields.raw.get("dtype") or fields.raw.get("torch_dtype") or "float32"
    if value not in _DTYPES:
        raise ConfigError(f"{fields.path}: dtype {value!r} is not supported; these are: {', '.join(_DTYPES)}")
    return str(value)
