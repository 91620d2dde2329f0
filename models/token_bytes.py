"""Bytes that each token stands for: the decoder of a `tokenizer.json`, reduced to bytes per token.

Every decoder of the supported model families says, for each token by itself, which bytes it adds to the text; what
depends on the place in the text is at most the first token (Metaspace), a space between tokens (no decoder) or
leading spaces that the whole text loses (Strip). Reduced to that, text can be put together token by token, in
constant work each, and ends up exactly the same as when it is decoded at once.

Where bytes are no valid UTF-8, each ill-formed sequence reads as one U+FFFD. For byte-level tokenizers that is what
the tokenizers library does. For byte fallback it differs on purpose: the library turns a whole run of byte tokens into
U+FFFD when any of it is invalid, so that no byte of a run could be shown before the run's end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..common.errors import ConfigError

# A Sequence decoder's steps may come in this order only; each step has one meaning per token then.
_STEP_ORDER = {"Replace": 0, "ByteFallback": 1, "ByteLevel": 1, "Fuse": 2, "Strip": 3}


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """Rules by which tokens become bytes, and bytes text."""

    byte_level: bool = False  # each character of a token is a byte (GPT-2's alphabet)
    byte_fallback: bool = False  # a token `<0xE2>` is that byte
    replacements: tuple[tuple[str, str], ...] = ()  # within a token
    dropped_from_first: str = ""  # character that the first token loses wherever it stands
    separator: str = ""  # between two tokens
    stripped: str = ""  # character that the text's start loses...
    max_stripped: int = 0  # ...at most so many times

    def token_bytes(self, token: str, *, is_first: bool = False) -> bytes:
        if is_first and self.dropped_from_first:
            token = token.replace(self.dropped_from_first, "")
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_level:
            return _from_byte_alphabet(token)
        if self.byte_fallback and (byte := _fallback_byte(token)) is not None:
            return byte
        return token.encode()


def decoder_rules(decoder: Mapping[str, object] | None) -> DecoderRules:
    """Read the rules in the `decoder` of a tokenizer.json. Raises ConfigError for what cannot be followed exactly."""
    if decoder is None:
        return DecoderRules(separator=" ")
    kind = decoder.get("type")
    if kind == "ByteLevel":
        return DecoderRules(byte_level=True)
    if kind == "Metaspace":
        mark = str(decoder.get("replacement", "\u2581"))
        always_first = decoder.get("prepend_scheme", "always") != "never"
        return DecoderRules(replacements=((mark, " "),), dropped_from_first=mark if always_first else "")
    steps = decoder.get("decoders")
    if kind == "Sequence" and isinstance(steps, list):
        return _sequence_rules(steps)
    raise _unsupported(kind)


def _sequence_rules(steps: list[dict[str, object]]) -> DecoderRules:
    kinds = [str(step.get("type")) for step in steps]
    unknown = [kind for kind in kinds if kind not in _STEP_ORDER]
    if unknown or kinds != sorted(kinds, key=_STEP_ORDER.__getitem__) or kinds.count("Strip") > 1:
        raise _unsupported(" + ".join(kinds))
    stripped, max_stripped = "", 0
    if "Strip" in kinds:
        strip = steps[-1]
        # Before Fuse it would apply to each token; at the end it would need the last token before its text is sent.
        if strip.get("stop") or not {"Fuse", "ByteLevel"} & set(kinds):
            raise _unsupported(" + ".join(kinds))
        stripped, max_stripped = str(strip["content"]), int(str(strip["start"]))
    return DecoderRules(
        byte_level="ByteLevel" in kinds,
        byte_fallback="ByteFallback" in kinds,
        replacements=tuple(_replacement(step) for step in steps if step["type"] == "Replace"),
        stripped=stripped,
        max_stripped=max_stripped,
    )


def _replacement(step: dict[str, object]) -> tuple[str, str]:
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or not pattern.get("String"):
        raise _unsupported("Replace by a regular expression")
    return str(pattern["String"]), str(step.get("content", ""))


def _unsupported(what: object) -> ConfigError:
    return ConfigError(
        f"the tokenizer's decoder is {what}; known are ByteLevel, Metaspace and "
        "Sequences of Replace, ByteFallback or ByteLevel, Fuse and a leading Strip"
    )


def _fallback_byte(token: str) -> bytes | None:
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else None


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _from_byte_alphabet(token: str) -> bytes:
    try:
        return bytes([_BYTE_ALPHABET[char] for char in token])
    except KeyError:  # an added token, written as it is
        return token.encode()
