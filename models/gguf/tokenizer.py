"""tokenizer.json of a GGUF file, from the tokens in its fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ConfigError
from ..families.lookup import nearest
from .fields import GgufFields
from .merges import Pairs, byte_pairs, read_merges
from .sentence_pieces import pieces, pieces_tokenizer
from .spellings import spellings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# GGUF's types of tokens: ordinary ones, the one for what has none, special ones, ones that are found as a whole in any
# text, and ones that no text has.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
_WHOLE = (_UNKNOWN, _CONTROL, _USER_DEFINED)  # found as a whole in any text
_TYPES = "tokenizer.ggml.token_type"
_KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece's BPE", "gemma4": "the same with merges"}
# A file says that its texts begin with a token, and the model's own tokenizer does not begin them: its template does.
_UNFRAMED = ("gemma4",)
_OTHER_KINDS = {"t5": "SentencePiece's unigrams", "bert": "WordPiece", "rwkv": "RWKV's tries"}


@dataclass(frozen=True, slots=True)
class _Rules:
    """`_Rules` say how a byte-level BPE cuts a text before it merges."""

    pattern: str = ""  # of words; empty: GPT-2's words
    lone_digits: bool = False  # digits stand alone; with GPT-2's words
    normal: bool = False  # the text is brought to Unicode's form NFC
    whole_words: bool = False  # a word that is a token is not merged from parts
    bos: bool = False  # unless the file says otherwise
    before: tuple[str, ...] = ()  # patterns of parts that are set apart before there are words


# Patterns and what goes with them are those of llama.cpp (`src/llama-vocab.cpp`) and of the models' own tokenizer.json.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}*{_LOWER}+", r"[^\r\n\p{L}\p{N}]?" + f"{_UPPER}+{_LOWER}*"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# Letters that DeepSeek-V2 has words of: those with a case, but for these.
_OTHER_LETTERS = (
    r"\x{0560}-\x{0588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8a}\x{2d00}-\x{2d2d}\x{a790}-\x{a7ff}\x{ab30}-\x{ab68}"
    r"\x{10570}-\x{105bc}\x{10d50}-\x{10d8f}\x{16e40}-\x{16e7f}\x{1d400}-\x{1df1e}"
)
_DEEPSEEK_V2 = _Rules(
    r"\p{N}",
    before=(
        r"[\r\n]",
        rf"\s?(?:(?![{_OTHER_LETTERS}])[\p{{Lu}}\p{{Ll}}\p{{Lt}}])+",
        r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
        r"\s+$",
        r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
    ),
)
_DEEPSEEK_CODER = _Rules(
    r"\p{N}",
    before=(
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
    ),
)
_DEEPSEEK_V3 = _Rules(
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    before=(r"\p{N}{1,3}", r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"),
)
_DIGITS, _GPT2 = _Rules(lone_digits=True), _Rules()
_LLAMA3, _CL100K = _Rules(_LLAMA3_WORDS, whole_words=True, bos=True), _Rules(_LLAMA3_WORDS)
_ONE_DIGIT = _LLAMA3_WORDS.replace("{1,3}", "")
_GPT4O = _Rules("|".join([*(cased + _ENDINGS for cased in _CASED), r"\p{N}{1,3}", _REST]))
_RULES = {
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,  # Granite 3
    "command-r": _DIGITS,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "exaone4": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "falcon-h1": _LLAMA3,
    "lfm2": _LLAMA3,
    "pixtral": _LLAMA3,
    "deepseek-llm": _DEEPSEEK_V2,
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "dbrx": _CL100K,  # Phi-4, OLMo 2, Granite 4
    "smaug-bpe": _CL100K,  # SmolLM3
    "glm4": _CL100K,
    "chatglm-bpe": _CL100K,
    "qwen2": _Rules(_ONE_DIGIT, normal=True),
    "deepseek-r1-qwen": _Rules(_ONE_DIGIT, normal=True),
    "qwen35": _Rules(
        _ONE_DIGIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"), normal=True
    ),
    "hunyuan": _Rules(_ONE_DIGIT),
    "seed-coder": _Rules(_ONE_DIGIT.replace(r"\p{N}]+[\r\n]*", r"\p{N}\r\n]+")),
    "gpt-4o": _GPT4O,  # gpt-oss, Phi-4-mini
    "llama4": _GPT4O,
    "minimax-m2": _GPT4O,
    "tekken": _Rules("|".join([*_CASED, r"\p{N}", _REST]), whole_words=True, bos=True),
}


def write_gguf_tokenizer(path: Path, fields: GgufFields) -> None:
    """Write tokenizer.json. Raises ConfigError for a kind that is not converted, with the nearest that is."""
    from tokenizers import AddedToken

    kind = fields.text("tokenizer.ggml.model")
    texts = fields.texts("tokenizer.ggml.tokens")
    types = _types(fields, len(texts))
    tokens, marks = spellings(texts if kind == "gpt2" else pieces(fields, texts), _preferred(types, fields.special))
    special = {_CONTROL}
    if kind == "gpt2":
        rules = _rules(fields.text("tokenizer.ggml.pre"))
        tokenizer, puts_bos = _bpe(tokens, read_merges(fields), rules, marks), rules.bos
    elif kind in ("llama", "gemma4"):
        tokenizer, puts_bos = pieces_tokenizer(fields, tokens, types, marks), True
        special.add(_UNKNOWN)
    else:
        raise ConfigError(_refusal(kind))
    vocabulary = tokenizer.get_vocab()
    for kinds, add in ((special, tokenizer.add_special_tokens), ({_USER_DEFINED}, tokenizer.add_tokens)):
        # A text is of a kind if one of its ids is. A Gemma's spaces are of none: they are merged.
        ids = [index for index, own in enumerate(types) if own in kinds and texts[index] in vocabulary]
        found = dict.fromkeys(token for index in ids for token in (texts[index], tokens[index]))
        add([AddedToken(token, special=kinds is special, normalized=False) for token in found])
    puts_bos = fields.flag("tokenizer.ggml.add_bos_token", default=puts_bos) and kind not in _UNFRAMED
    first = _token(fields, tokens, "bos") if puts_bos else None
    last = _token(fields, tokens, "eos") if fields.flag("tokenizer.ggml.add_eos_token", default=False) else None
    if first is not None or last is not None:
        _frame(tokenizer, first, last)
    tokenizer.save(str(path))


def _types(fields: GgufFields, num_tokens: int) -> list[int]:
    """Return the tokens' types. Without any, tokens are normal, as in llama.cpp, but for those that fields name."""
    if fields.find(_TYPES) is None:
        special = set(fields.special.values())
        return [_CONTROL if index in special else _NORMAL for index in range(num_tokens)]
    types = fields.integers(_TYPES)
    if len(types) != num_tokens:
        raise ValueError(f"{_TYPES} has {len(types)} types of {num_tokens} tokens")
    return types


def _preferred(types: Sequence[int], special: Mapping[str, int]) -> list[int]:
    """List the ids that keep a text which others have, the best last: as in llama.cpp, those found as a whole do."""
    used = [index for index, own in enumerate(types) if own != _UNUSED]
    return [*used, *(index for index in used if types[index] in _WHOLE), *special.values()]


def _rules(name: str) -> _Rules:
    if (found := _RULES.get(name)) is not None:
        return found
    known = f"{', '.join(_RULES)}{nearest(name, _RULES)}"
    raise ConfigError(f"the GGUF file's pre-tokenizer is {name}; kvferry converts {known}")


def _refusal(kind: str) -> str:
    what = f" ({_OTHER_KINDS[kind]})" if kind in _OTHER_KINDS else ""
    known = ", ".join(f"{name} ({meaning})" for name, meaning in _KINDS.items())
    near = nearest("llama" if kind.startswith(("t5", "gemma", "plamo")) else kind, _KINDS)
    return f"the GGUF file's tokenizer is of the kind {kind}{what}; kvferry converts {known}{near}"


def _bpe(tokens: list[str], pairs: Pairs, rules: _Rules, marks: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE; no space is put before the text. `marks`: what a decoder drops of tokens."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(byte_pairs(vocabulary, pairs, ignore_merges=rules.whole_words))
    parts: list[pre_tokenizers.PreTokenizer] = []
    if rules.pattern:
        parts += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (*rules.before, rules.pattern)]
    elif rules.lone_digits:
        parts.append(pre_tokenizers.Digits(individual_digits=True))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not rules.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if rules.normal:
        tokenizer.normalizer = normalizers.NFC()
    drops = [decoders.Replace(mark, "") for mark in marks]
    tokenizer.decoder = decoders.Sequence([*drops, decoders.ByteLevel()]) if drops else decoders.ByteLevel()
    return tokenizer


def _token(fields: GgufFields, tokens: list[str], name: str) -> str:
    if (found := fields.special.get(name)) is None:
        raise ValueError(f"texts have a token that tokenizer.ggml.{name}_token_id should name, and it names none")
    return tokens[found]


def _frame(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Let every text begin with one token and end with another; None: with none."""
    from tokenizers import processors

    single = [token for token in (first, "$A", last) if token is not None]
    pair = [*single, *(f"{token}:1" for token in (first, "$B", last) if token is not None)]
    own = sorted({token: tokenizer.token_to_id(token) for token in (first, last) if token is not None}.items())
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=own)
