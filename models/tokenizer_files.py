"""A model directory's files say what its tokenizer is.

    tokenizer.json                                  the library's own: load_backend
    tokenizer_config.json, special_tokens_map.json  which token has which role: read_special_tokens, read_end_tokens

The library is imported where a file is read, so that whoever only checks texts need not wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..common.errors import ConfigError
from .files import read_json
from .token_bytes import DecoderRules, decoder_rules

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


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
    found = next((name for name in ("tokenizer.model", "spiece.model", "vocab.json") if (path / name).is_file()), None)
    if found is None:
        return f"{path} has no tokenizer.json"
    return (
        f"{path} has {found} but no tokenizer.json; write one with the transformers library: "
        f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
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


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    """All that is kept of a tokenizer.json: the rest is passed over, which takes some tens of milliseconds."""

    added_tokens: list[_AddedToken] = []


def read_end_tokens(path: Path) -> list[int]:
    """Return the id of a model directory's eos_token; none where there is no such token, or no tokenizer.json."""
    token = read_special_tokens(path, read_json(path / "tokenizer_config.json", default={})).get("eos_token")
    if token is None:
        return []
    try:
        found = msgspec.json.decode((path / "tokenizer.json").read_bytes(), type=_AddedTokens)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return []  # whoever needs the tokenizer says what is wrong with it
    return [added.id for added in found.added_tokens if added.content == token]
