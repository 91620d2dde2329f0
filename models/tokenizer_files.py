"""A model directory's files say what its tokenizer is.

    tokenizer.json                                  the library's own: load_backend
    tokenizer_config.json                           tokens that are found as a whole in any text, besides: add_tokens
    tokenizer_config.json, special_tokens_map.json  which token has which role: read_special_tokens, read_end_tokens

The library is imported where a file is read, so that whoever only checks texts need not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..common.errors import ConfigError
from .stored.json_files import read_json
from .token_bytes import DecoderRules, decoder_rules

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

# Tokenizers of other libraries, of which transformers makes a tokenizer.json.
_OTHER_KINDS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_ENDS = ("bos_token", "eos_token")  # of texts


def load_backend(path: Path) -> tuple[Backend, DecoderRules]:
    """Read tokenizer.json, for the library and for the rules by which its tokens become bytes. Raises ConfigError."""
    from tokenizers import Tokenizer as Backend

    file = path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(_missing_tokenizer(path))
    decoder = read_json(file).get("decoder")
    assert decoder is None or isinstance(decoder, dict)
    try:
        return Backend.from_file(str(file)), decoder_rules(decoder)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:  # the library raises no narrower class for a file that it cannot read
        raise ConfigError(f"{file} is not a tokenizer that the tokenizers library can read: {error}") from error


def _missing_tokenizer(path: Path) -> str:
    """Say what is there in place of tokenizer.json, and how to write one."""
    found = next((name for name in _OTHER_KINDS if (path / name).is_file()), None)
    if found is None:
        return f"{path} has no tokenizer.json"
    form = ", save_format='hf'" if found == "tekken.json" else ""  # else that file is written again
    return (
        f"{path} has {found} but no tokenizer.json; write one with the transformers library: "
        f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r}{form})"
    )


def read_special_tokens(path: Path, config: Mapping[str, object]) -> dict[str, str]:
    """Return each role, such as bos_token, with its token. What tokenizer_config.json (`config`) says goes first.

    A token stands as a string, or as an object with its `content`.
    """
    special_map = read_json(path / "special_tokens_map.json", default={})
    found: dict[str, str] = {}
    for role, value in {**special_map, **config}.items():
        token = value.get("content") if isinstance(value, dict) else value
        if role.endswith("_token") and isinstance(token, str):
            found[role] = token
    return found


def splits_special_tokens(path: Path, config: Mapping[str, object]) -> bool:
    """Tell whether special tokens that a text spells are text, those of a chat template too, as `transformers` has it.

    Raises ConfigError.
    """
    told = config.get("split_special_tokens", False)
    if not isinstance(told, bool):
        raise ConfigError(f"{path / 'tokenizer_config.json'}: split_special_tokens = {told!r} must be true or false")
    return told


def add_tokens(backend: Backend, config: Mapping[str, object], roles: Mapping[str, str]) -> None:
    """Let `backend` find what tokenizer_config.json (`config`) calls added tokens, and those that have `roles`.

    Both go before tokenizer.json, as in `transformers`: whoever gives a model other tokens may edit the one file alone.
    No token gets another id than it is told with, and none that is special in either file is an ordinary one.
    """
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    told = {token.content: token for token in _told_tokens(backend, config, known)}
    for role, content in roles.items():
        token = told.get(content) or known.get(content)
        # Files name pieces of plain text for what is never read, as "!" for padding: no answer is to lack these.
        if token is not None or (role in _ENDS and backend.token_to_id(content) is not None):
            told[content] = _as_special(content, token)
    backend.add_tokens([token for content, token in told.items() if repr(token) != repr(known.get(content))])


def _told_tokens(
    backend: Backend, config: Mapping[str, object], known: Mapping[str, AddedToken]
) -> Iterator[AddedToken]:
    """Yield the tokens of `added_tokens_decoder`; no new one that would get another id than it has there."""
    from tokenizers import AddedToken

    entries = config.get("added_tokens_decoder")
    if not isinstance(entries, dict):
        return
    free = max(
        [backend.get_vocab_size(with_added_tokens=False), *(at + 1 for at in backend.get_added_tokens_decoder())]
    )
    for key, entry in sorted(entries.items(), key=lambda told: int(told[0]) if told[0].isdecimal() else -1):
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content:
            continue
        found = backend.token_to_id(content)
        if key != str(free if found is None else found):
            continue
        free += found is None
        flags = {name: entry.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
        is_special = entry.get("special") is True or (content in known and known[content].special)
        yield AddedToken(content, special=is_special, **flags)


def _as_special(content: str, token: AddedToken | None) -> AddedToken:
    from tokenizers import AddedToken

    if token is None:
        return AddedToken(content, normalized=False, special=True)
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(content, special=True, **flags)


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    """All that is kept of a tokenizer.json: the rest is passed over, which takes some tens of milliseconds."""

    added_tokens: list[_AddedToken] = []


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]] = {}


class _Decoder(msgspec.Struct):
    """`_Decoder` keeps what makes text of tokens."""

    decoder: dict[str, Any] | None = None


class _Model(msgspec.Struct):
    """`_Model` keeps the vocabulary: the token that ends texts may be no added one."""

    model: _Vocabulary


def read_end_tokens(path: Path) -> list[int]:
    """Return the id of a model directory's eos_token; none where there is no such token, or no tokenizer.json."""
    token = read_special_tokens(path, read_json(path / "tokenizer_config.json", default={})).get("eos_token")
    if token is None:
        return []
    try:
        data = (path / "tokenizer.json").read_bytes()
        found = msgspec.json.decode(data, type=_AddedTokens)
        if ids := [added.id for added in found.added_tokens if added.content == token]:
            return ids
        vocab = msgspec.json.decode(data, type=_Model).model.vocab
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return []  # whoever needs the tokenizer says what is wrong with it
    tokens = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    return [tokens[token]] if token in tokens else []


def drops_characters(path: Path) -> bool:
    """Tell whether a model directory's decoder drops characters of tokens, as that of a GGUF file may."""
    try:
        decoder = msgspec.json.decode((path / "tokenizer.json").read_bytes(), type=_Decoder).decoder
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False  # whoever needs the tokenizer says what is wrong with it
    steps = (decoder or {}).get("decoders")
    return isinstance(steps, list) and any(
        isinstance(step, dict) and step.get("type") == "Replace" and step.get("content") == "" for step in steps
    )
