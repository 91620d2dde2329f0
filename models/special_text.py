"""Special tokens that users spell in their messages, as ordinary text: nobody but the template ends a turn.

    messages ─> hide: each spelled token becomes one character that nobody uses ─> the template renders
             ─> the template's own tokens become marks, what was hidden comes back ─> encoded by a second tokenizer
                that takes marks for tokens, and special tokens for text ─> marks become the special tokens' ids

A hidden token survives whatever a template does with text: it is one character, neither space nor punctuation. The
second tokenizer knows the marks as added tokens, so a text is cut at the same places as by the first one. Marks hold a
random number: nobody can write one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..common.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_PRIVATE_USE = range(0x100000, 0x10FFFE)
_MARK = "\U000ffffd"


class SpecialText:
    """`SpecialText` belongs to one tokenizer. Safe to use from several threads at once."""

    def __init__(self, backend: Backend) -> None:
        tokens = {token_id: token for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
        by_length = sorted((token.content for token in tokens.values() if token.content), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self._backend = backend
        self._marks: dict[str, str] = {}  # by token
        self._ids: dict[int, int] = {}  # of the marks: the special tokens'
        self._plain = self._marked_twin(tokens)

    def _marked_twin(self, tokens: Mapping[int, object]) -> Backend:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Twin

        twin = Twin.from_str(self._backend.to_str())
        twin.encode_special_tokens = True  # that is: as text
        nonce = secrets.token_hex(16)
        for token_id, token in tokens.items():
            assert isinstance(token, AddedToken)
            mark = f"{_MARK}{nonce}.{token_id}{_MARK}"
            added = AddedToken(
                mark,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=False,
            )
            twin.add_tokens([added])
            mark_id = twin.token_to_id(mark)
            assert mark_id is not None
            self._marks[token.content], self._ids[mark_id] = mark, token_id
        return twin

    def find(self, text: str) -> str | None:
        """Find the first special token that the text spells."""
        found = self._spelled.search(text)
        return found[0] if found else None

    def find_in(self, value: object) -> str | None:
        """Find the first special token that any text in this value of JSON spells."""
        return next((token for text in _texts([value]) if (token := self.find(text)) is not None), None)

    def hide(self, objects: Sequence[Mapping[str, object]]) -> tuple[list[dict[str, object]], dict[str, str]]:
        """Return the objects with every spelled token as one character, and the token that each character stands for.

        Their values are JSON's; the objects' own names stay as they are.
        """
        spelled = {found[0] for text in _texts(objects) for found in self._spelled.finditer(text)}
        used = set().union(*map(set, _texts(objects))) if spelled else set()
        free = [char for char in map(chr, _PRIVATE_USE) if char not in used][: len(spelled)] if spelled else []
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
        is_plain = self._backend.encode_special_tokens  # a model that takes none from a text, the template's neither
        marked = text if is_plain else self._spelled.sub(lambda found: self._marks[found[0]], text)
        (encoding,) = self._plain.encode_batch_fast([self.shown(marked, hidden)], add_special_tokens=add_special_tokens)
        return [self._ids.get(token_id, token_id) for token_id in encoding.ids]


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
