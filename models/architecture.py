"""A config.json names an architecture: its family is found here, and what no family here can do is refused.

A model of several parts (`families/nested.py`) is read as its language model.
"""

from __future__ import annotations

from dataclasses import replace

from ..common.errors import ConfigError
from .families.family import Family
from .families.lookup import ARCHITECTURES, architecture_of, declared_architecture, nearest, needs_code
from .families.nested import NESTED
from .families.table import FAMILIES
from .parts.chunks import in_common_words as llama4_in_common_words
from .parts.config_fields import ConfigFields
from .parts.lone_blocks import in_common_words
from .parts.uneven_heads import in_common_words as gemma4_in_common_words

_LAYER_KINDS = {"attention", "full_attention", "sliding_attention"}


def read_architecture(fields: ConfigFields) -> tuple[str, Family, ConfigFields]:
    """Return the architecture, the language model's family, and what is said of it. Raises ConfigError."""
    architecture = _architecture(fields)
    text_architecture, fields = _of_text(fields, architecture)
    family = FAMILIES[text_architecture]
    if family.has_lone_blocks:
        fields = in_common_words(fields)
    if family.windows == "chunks":
        fields = llama4_in_common_words(fields)
    if family.has_wide_layers:
        fields = gemma4_in_common_words(fields)
    fields = fields.with_defaults(family.defaults)
    if family.head_norms == "bare" and not fields.flag("use_qk_norm", default=True):
        family = replace(family, head_norms="none")
    _refuse_unsupported(fields, family)
    return architecture, family, fields


def _architecture(fields: ConfigFields) -> str:
    name = declared_architecture(fields.raw)
    if name is None:  # older checkpoints name the family alone
        model_type = fields.raw.get("model_type")
        name = architecture_of(model_type) or model_type
    if isinstance(name, str) and name.endswith("Model"):  # saved without its head, as embedding models are
        whole = name.removesuffix("Model") + "ForCausalLM"
        name = whole if whole in FAMILIES else name
    if name not in ARCHITECTURES:
        known = f"{', '.join(ARCHITECTURES)}{nearest(name, ARCHITECTURES) if isinstance(name, str) else ''}"
        raise ConfigError(f"{fields.path}: architecture {name!r} is not supported; these are: {known}")
    return str(name)


def _of_text(fields: ConfigFields, architecture: str) -> tuple[str, ConfigFields]:
    """Return the language model's architecture, and what config.json says of it. Raises ConfigError for another one."""
    if architecture not in NESTED:
        return architecture, fields
    nested = NESTED[architecture]
    text = fields.mapping("text_config") or ConfigFields(fields.path, {})  # older ones say everything in one place
    name = text.raw.get("model_type", next(iter(nested.texts)))
    if not isinstance(name, str) or name not in nested.texts:
        known = " or ".join(nested.texts)
        raise text.refuse("model_type", f"text_config of this architecture is supported as {known} alone")
    told = {**fields.raw, **text.raw, **_of_whole(fields, text)}
    return nested.texts[name], ConfigFields(fields.path, told).with_defaults(nested.defaults)


def _of_whole(fields: ConfigFields, text: ConfigFields) -> dict[str, object]:
    """Return what the whole model's word counts for before its language model's, as in `transformers`.

    That writes there what its class has by default: no tied head, and an end token that may be another one.
    """
    told: dict[str, object] = {"eos_token_id": fields.raw["eos_token_id"]} if fields.has("eos_token_id") else {}
    if any(each.flag("tie_word_embeddings", default=False) for each in (fields, text)):  # older ones say it of the text
        told["tie_word_embeddings"] = True
    return told


def _refuse_unsupported(fields: ConfigFields, family: Family) -> None:
    """Refuse settings under which this engine would give wrong answers, or run the checkpoint's own code."""
    if needs_code(fields.raw):
        raise fields.refuse("auto_map", "the checkpoint brings its own code, which is never run")
    if fields.flag("use_bidirectional_attention", default=False):
        raise fields.refuse("use_bidirectional_attention", "an answer's tokens see those before them alone")
    if not fields.flag("is_causal", default=True):
        raise fields.refuse("is_causal", "tokens see those before them alone, those of embedding models too")
    kinds = fields.raw.get("layer_types") if family.states is None else None  # else `parts/states.py` checks them
    if isinstance(kinds, list) and (unknown := sorted({str(kind) for kind in kinds} - _LAYER_KINDS)):
        raise ConfigError(f"{fields.path}: layer_types: layers of {', '.join(unknown)} are not supported")
    if fields.has("clip_qkv"):
        raise fields.refuse("clip_qkv", "bounds of queries, keys and values are not supported")
