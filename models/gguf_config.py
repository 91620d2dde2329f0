"""The configs and the tokenizer of a GGUF file, from its own fields, as Hugging Face's files have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's types of tokens: special ones, and ones that are found as a whole in any text
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


class GgufFields:
    """Typed reads of the GGUF file's key-value fields."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader

    def find(self, key: str) -> object:
        """Return a field's value; None where there is no such field."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _get(self, key: str) -> object:
        if (value := self.find(key)) is None:
            raise KeyError(f"no field {key}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key) if default is None or self.find(key) is not None else default
        if not isinstance(value, int):
            raise ValueError(f"field {key} is {value!r}, not an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a float32 field as the decimal that was meant: 9.99999e-06 is 1e-05."""
        value = self._get(key) if default is None or self.find(key) is not None else default
        if not isinstance(value, float):
            raise ValueError(f"field {key} is {value!r}, not a number")
        return float(f"{value:.6g}")

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise ValueError(f"field {key} is {value!r}, not a string")
        return value

    def texts(self, key: str) -> list[str]:
        return [str(item) for item in self._list(key)]

    def integers(self, key: str) -> list[int]:
        return [int(item) for item in self._list(key)]

    def _list(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise ValueError(f"field {key} is {value!r}, not a list")
        return value


def gguf_model_config(fields: GgufFields, *, tied: bool, rope_factors: list[float] | None) -> dict[str, object]:
    """Return config.json. `rope_factors`: by what each rotary frequency is divided. Raises ValueError."""
    kind = fields.text("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"its architecture is {kind}; these are read: {', '.join(_ARCHITECTURES)}")
    for key in (f"{kind}.rope.scaling.type", f"{kind}.attention.sliding_window", f"{kind}.expert_count"):
        if fields.find(key) not in (None, "none", 0):
            raise ValueError(f"{key} = {fields.find(key)!r} is not supported")
    hidden_size, num_heads = fields.integer(f"{kind}.embedding_length"), fields.integer(f"{kind}.attention.head_count")
    head_dim = fields.integer(f"{kind}.attention.key_length", hidden_size // num_heads)
    theta = fields.number(f"{kind}.rope.freq_base", 10_000.0)
    special = {
        f"{name}_token_id": fields.integer(f"tokenizer.ggml.{key}_token_id")
        for name, key in _SPECIAL.items()
        if name != "unk" and fields.find(f"tokenizer.ggml.{key}_token_id") is not None
    }
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer(f"{kind}.feed_forward_length"),
        "num_hidden_layers": fields.integer(f"{kind}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer(f"{kind}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer(f"{kind}.context_length"),
        "rms_norm_eps": fields.number(f"{kind}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": None if rope_factors is None else _llama3_scaling(rope_factors, theta, head_dim),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "vocab_size": fields.integer(f"{kind}.vocab_size", len(fields.texts("tokenizer.ggml.tokens"))),
        **special,
        "torch_dtype": "bfloat16",
    }


def _llama3_scaling(factors: list[float], theta: float, head_dim: int) -> dict[str, object]:
    """Return the scaling of Llama 3.1 and later whose factors these are: the file has them, and not their cause."""
    factor, low, high, original = round(max(factors), 3), 1.0, 4.0, 8192
    for index, found in enumerate(factors):
        turns = original * theta ** (-2 * index / head_dim) / (2 * math.pi)  # over the original context
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - share) / factor + share), rel_tol=1e-3):
            raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def gguf_generation_config(fields: GgufFields, config: Mapping[str, object]) -> dict[str, object]:
    """Return generation_config.json: an answer ends where the model ends it, or its turn."""
    special = {f"{name}_token_id": config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    turn = fields.find("tokenizer.ggml.eot_token_id")
    if isinstance(turn, int) and turn != special["eos_token_id"]:
        special["eos_token_id"] = [special["eos_token_id"], turn]
    return {key: value for key, value in special.items() if value is not None}


def gguf_tokenizer_config(fields: GgufFields, max_model_len: object) -> dict[str, object]:
    tokens = fields.texts("tokenizer.ggml.tokens")
    config: dict[str, object] = {
        f"{name}_token": tokens[fields.integer(f"tokenizer.ggml.{key}_token_id")]
        for name, key in _SPECIAL.items()
        if fields.find(f"tokenizer.ggml.{key}_token_id") is not None
    }
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_model_len,
        "clean_up_tokenization_spaces": False,
    }
    template = fields.find("tokenizer.chat_template")
    return config if template is None else config | {"chat_template": template}


# --- tokenizer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rules:
    """`_Rules` say how a byte-level BPE cuts a text before it merges."""

    pattern: str = ""  # of words; empty: digits stand alone, and GPT-2's words
    normal: bool = False  # the text is brought to Unicode's form NFC
    whole_words: bool = False  # a word that is a token is not merged from parts
    bos: bool = False  # unless the file says otherwise


_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {
    "smollm": _Rules(),
    "llama-bpe": _Rules(_LLAMA3_WORDS, whole_words=True, bos=True),
    "qwen2": _Rules(_LLAMA3_WORDS.replace("{1,3}", ""), normal=True),
}


def write_gguf_tokenizer(path: Path, fields: GgufFields) -> None:
    """Write tokenizer.json: byte-level BPE, no space put before the text. Raises ConfigError for other kinds."""
    from tokenizers import AddedToken

    model = fields.text("tokenizer.ggml.model")
    name = fields.text("tokenizer.ggml.pre") if model == "gpt2" else f"of the kind {model}"
    if name not in _RULES:
        raise ConfigError(f"the GGUF file's pre-tokenizer is {name}; kvferry converts {', '.join(_RULES)}")
    tokens, types = fields.texts("tokenizer.ggml.tokens"), fields.integers("tokenizer.ggml.token_type")
    tokenizer = _bpe(tokens, fields.texts("tokenizer.ggml.merges"), _RULES[name])
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        found = [token for token, own in zip(tokens, types, strict=True) if own == kind]
        add([AddedToken(token, special=kind == _CONTROL, normalized=False) for token in found])
    adds_bos = fields.find("tokenizer.ggml.add_bos_token")
    if adds_bos if adds_bos is not None else _RULES[name].bos:
        _put_first(tokenizer, tokens[fields.integer("tokenizer.ggml.bos_token_id")])
    tokenizer.save(str(path))


def _bpe(tokens: list[str], pairs: list[str], rules: _Rules) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [(left, right) for left, right in (pair.split(" ") for pair in pairs)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rules.whole_words))
    if rules.pattern:
        words = pre_tokenizers.Split(Regex(rules.pattern), "isolated")
        parts = [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if rules.normal:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _put_first(tokenizer: Tokenizer, token: str) -> None:
    """Let every text begin with a token."""
    from tokenizers import processors

    own = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1", special_tokens=[(token, own)]
    )
