"""Special tokens that users spell in their messages, as ordinary text: nobody but the template ends a turn.

    messages ─> hide: each spelled token becomes one character that nobody uses ─> the template renders
             ─> the template's own tokens become marks, what was hidden comes back ─> encoded by a second tokenizer,
                in which the special tokens have other names: the marks

A hidden token survives whatever a template does with text: it is one character, neither space nor punctuation. The
second tokenizer knows the marks as added tokens, so a text is cut at the same places as by the first one. Marks hold a
random number: nobody can write one. Nor does the vocabulary make a special token of a text's pieces, as those of
SentencePiece do: there it has no other name either.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..common.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_PRIVATE_USE = range(0x100000, 0x10FFFE)
_MARK = "\U000ffffd"


class SpecialText:
    """`SpecialText` belongs to one tokenizer. Safe to use from several threads at once."""

    def __init__(self, backend: Backend) -> None:
        tokens = {id: token.content for id, token in backend.get_added_tokens_decoder().items() if token.special}
        nonce = secrets.token_hex(16)
        marks = {token: f"{_MARK}{nonce}.{token_id}{_MARK}" for token_id, token in tokens.items() if token}
        self._backend = backend
        self._spelled = _any_of(marks)
        self._twin = _renamed(backend, marks)
        # A tokenizer may take special tokens for text, the template's too.
        taken = backend.encode_batch_fast(list(marks), add_special_tokens=False)
        ids = {token: token_id for token_id, token in tokens.items()}
        self._marks = {token: marks[token] for token, own in zip(marks, taken, strict=True) if ids[token] in own.ids}
        self._taken = _any_of(self._marks)

    def find(self, text: str) -> str | None:
        """Find the first special token that the text spells, as it stands or as the tokenizer reads it."""
        found = self._spelled.search(text) or self._spelled.search(self._as_read(text))
        return found[0] if found else None

    def _as_read(self, text: str) -> str:
        """Return a text in which the tokenizer has replaced some characters by others, as wide ones by narrow ones."""
        normalizer = self._backend.normalizer
        try:
            return text if normalizer is None else str(normalizer.normalize_str(text))
        except UnicodeEncodeError:  # half a surrogate pair: the text has no tokens either
            return text

    def find_in(self, value: object) -> str | None:
        """Find the first special token that any text in this value of JSON spells."""
        return next((token for text in _texts([value]) if (token := self.find(text)) is not None), None)

    def hide(self, objects: Sequence[Mapping[str, object]]) -> tuple[list[dict[str, object]], dict[str, str]]:
        """Return the objects with every spelled token as one character, and the token that each character stands for.

        Their values are JSON's; the objects' own names stay as they are.
        """
        spelled = {found[0] for text in _texts(objects) for found in self._spelled.finditer(text)}
        used = set().union(*map(set, _texts(objects))) if spelled else set()
        free = list(islice((char for char in map(chr, _PRIVATE_USE) if char not in used), len(spelled)))
        if len(free) < len(spelled):
            raise RequestError("the messages use all characters that are for private use", param="messages")
        hiding = dict(zip(sorted(spelled), free, strict=True))

        def hidden(value: object) -> object:
            match value:
                case str():
                    return self._spelled.sub(lambda found: hiding[found[0]], value)
                case list() | tuple():
                    return list(map(hidden, value))
                case Mapping():
                    return {hidden(name): hidden(child) for name, child in value.items()}
            return value

        shown = [{name: hidden(value) for name, value in each.items()} for each in objects]
        return shown, {char: token for token, char in hiding.items()}

    def shown(self, text: str, hidden: Mapping[str, str]) -> str:
        """Return a rendered text with what was hidden."""
        return text.translate({ord(char): token for char, token in hidden.items()})

    def encode(self, text: str, hidden: Mapping[str, str], add_special_tokens: bool) -> list[int]:
        """Return a rendered text's ids: special tokens that stand in it are the template's, hidden ones are text."""
        marked = self._taken.sub(lambda found: self._marks[found[0]], text)
        (encoding,) = self._twin.encode_batch_fast([self.shown(marked, hidden)], add_special_tokens=add_special_tokens)
        return list(encoding.ids)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    by_length = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, by_length)) or r"(?!)")


def _renamed(backend: Backend, names: Mapping[str, str]) -> Backend:
    """Return a tokenizer with the same ids, in which some added tokens have other names."""
    from tokenizers import Tokenizer as Twin

    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        if token["content"] in names:
            # Not special: such ones can be taken for text. As it stands: no other text becomes a name.
            token.update(content=names[token["content"]], special=False, normalized=False)
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    else:  # Unigram's, in the order of the ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if (unknown := model.get("unk_token")) is not None:
        model["unk_token"] = names.get(unknown, unknown)
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [merge for merge in model["merges"] if not _merged(merge, prefix) & names.keys()]
    return Twin.from_str(json.dumps(spec))


def _merged(merge: Any, prefix: int) -> set[str]:
    """Return a merge's pieces, and what becomes of them."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {first, second, first + second[prefix:]}


def _texts(values: Iterable[object]) -> Iterator[str]:
    for value in values:
        match value:
            case str():
                yield value
            case list() | tuple():
                yield from _texts(value)
            case Mapping():
                yield from _texts(value.keys())
                yield from _texts(value.values())
