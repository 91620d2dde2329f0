"""Text to token ids and back, from the `tokenizer.json` of a model directory.

`Tokenizer` is immutable after `from_dir` and may be used from several threads at once; encoding releases the GIL.
`Detokenizer` belongs to one choice of one request: new ids go in with `push`, text that can no longer change comes
out, `flush` gives the rest. The pushed texts and the flushed one add up to `Tokenizer.decode` of all the ids.

Rules of a model (does a BOS token come first, which space is dropped) are the files'; this module adds none.
"""

from __future__ import annotations

import re
from codecs import utf_8_decode
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import RequestError
from .chat_template import ChatTemplate, load_chat_template
from .files import check_no_code
from .special_text import SpecialText
from .stored.json_files import read_json
from .token_bytes import DecoderRules
from .tokenizer_files import add_tokens, load_backend, read_special_tokens, splits_special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# More bytes per token than any prompt has on average. A text beyond it is refused before work is spent on it.
MAX_BYTES_PER_TOKEN = 16
_SLACK_BYTES = 4096  # beside them, so that short limits refuse no short text
_UTF8_MAX_BYTES = 4  # of one character
_BRACKETS = re.compile(r"<.*>", re.DOTALL)


class Tokenizer:
    """One model's tokenizer with its special tokens and its chat template."""

    def __init__(
        self,
        backend: Backend,
        decoder: DecoderRules,
        *,
        special_tokens: Mapping[str, str],  # role, such as bos_token -> token
        chat_template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens)
        self._pieces: dict[int, bytes] = {}  # token_bytes of the ids seen so far
        self._added: dict[frozenset[int], _AddedBytes] = {}  # by the ids that are left out
        self.decoder = decoder
        added = backend.get_added_tokens_decoder()
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)  # largest id + 1
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")

    @classmethod
    def from_dir(cls, path: Path, chat_template: Path | str | None = None) -> Tokenizer:
        """Read a model directory. `chat_template`: a file that replaces the model's own template.

        Raises ConfigError for a missing or broken file.
        """
        check_no_code(path)
        backend, decoder = load_backend(path)
        config = read_json(path / "tokenizer_config.json", default={})
        special_tokens = read_special_tokens(path, config)
        add_tokens(backend, config, special_tokens)
        backend.encode_special_tokens = splits_special_tokens(path, config)  # that is: as text
        return cls(
            backend,
            decoder,
            special_tokens=special_tokens,
            chat_template=load_chat_template(path, config, override=Path(chat_template) if chat_template else None),
        )

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Return every token's id, those of the added ones too."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Return the text's ids, as `encode_all` gives them."""
        return self.encode_all([text], add_special_tokens, max_tokens=max_tokens)[0]

    def encode_all(
        self, texts: Sequence[str], add_special_tokens: bool = True, *, max_tokens: int | None = None
    ) -> list[list[int]]:
        """Return the ids of each text, with what the model puts around a text (a BOS token) if `add_special_tokens`.

        A text that cannot fit into `max_tokens` is refused by its size alone, before any is tokenized; the exact
        count is still the caller's to check.
        """
        if max_tokens is not None:
            for text in texts:
                check_text_size(text, max_tokens)
        try:
            # The batch call releases the GIL, `encode` does not: other threads' streams go on meanwhile.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise RequestError("the text has a lone surrogate and is not valid Unicode") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        detokenizer = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    def special_text(self) -> SpecialText:
        """Make what keeps special tokens in users' text apart from the template's; a large vocabulary takes seconds."""
        return SpecialText(self._backend)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what the token adds to a text, after the first token; empty for an id without a token."""
        if (piece := self._pieces.get(token_id)) is not None:
            return piece
        if (token := self.spelling(token_id)) is None:
            return b""
        return self._pieces.setdefault(token_id, self.decoder.token_bytes(token))

    def mark_id(self, text: str) -> int | None:
        """Return the token that is this text and that no text of a grammar has; None: there is none.

        Those are the special ones and, as llguidance has it, any added one in angle brackets: `<think>`, `<tool_call>`.
        """
        found = self.added_id(text)
        return found if found in self.special_ids or _BRACKETS.fullmatch(text) is not None else None

    @property
    def mark_ids(self) -> frozenset[int]:
        """Return all of them."""
        return self.special_ids | {i for text, i in self._added_ids.items() if _BRACKETS.fullmatch(text) is not None}

    def hidden_ids(self, skip_special_tokens: bool, shown: Collection[str] = ()) -> frozenset[int]:
        """Return the ids that stay out of a text: those of the special tokens, but for the `shown` ones."""
        if not skip_special_tokens:
            return frozenset()
        if not shown:
            return self.special_ids
        return frozenset(token_id for token_id in self.special_ids if self.spelling(token_id) not in shown)

    def added_bytes(self, hidden_ids: frozenset[int]) -> Mapping[int, bytes]:
        """Return the bytes that each id adds to a text that has begun, nothing for hidden ones.

        A caller has few sets of them: what was worked out is kept for each.
        """
        if (added := self._added.get(hidden_ids)) is None:
            added = self._added[hidden_ids] = _AddedBytes(self, hidden_ids)
        return added

    def token_text(self, token_id: int) -> str:
        """Return `token_bytes` as text, with U+FFFD for the part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def spelling(self, token_id: int) -> str | None:
        """Return the token as the vocabulary spells it, in which no two are alike; None: there is no such token."""
        if not 0 <= token_id < self.vocab_size:
            return None
        return self._backend.id_to_token(token_id)

    def first_token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds at the start of a text."""
        token = self.spelling(token_id)
        return b"" if token is None else self.decoder.token_bytes(token, is_first=True)

    def has_token(self, token_id: int) -> bool:
        return self.spelling(token_id) is not None

    def added_id(self, token: str) -> int | None:
        """Return the id of a token that stands for itself in any text; None: the model has no such token."""
        return self._added_ids.get(token)

    def _special_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


class _AddedBytes(dict[int, bytes]):
    """Filled as ids are asked for: of those that are in the vocabulary, so that it stays as small as that."""

    def __init__(self, tokenizer: Tokenizer, hidden_ids: frozenset[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._hidden_ids = hidden_ids

    def __missing__(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        if not tokenizer.has_token(token_id):
            return b""
        added = (
            b""
            if token_id in self._hidden_ids
            else tokenizer.decoder.separator.encode() + tokenizer.token_bytes(token_id)
        )
        return self.setdefault(token_id, added)


class Detokenizer:
    """The text of one growing sequence of ids, in constant work per token.

    With `prompt_ids` the text goes on where the prompt's ended: a leading space stays, and a character that the
    prompt began is finished.
    """

    __slots__ = ("_added", "_piece", "_rest", "_skipped", "_to_strip", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown_tokens: Collection[str] = (),
    ) -> None:
        """`shown_tokens`: special ones that are not skipped."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.hidden_ids(skip_special_tokens, shown_tokens)
        self._added = tokenizer.added_bytes(self._skipped).__getitem__
        self._piece: Callable[[int], bytes] = self._first_piece
        self._rest = b""  # the beginning of a character
        self._to_strip = tokenizer.decoder.max_stripped
        self._feed_prompt(prompt_ids)

    def fork(self) -> Detokenizer:
        """Make another one at the same place: for one more answer to the same prompt."""
        twin = Detokenizer.__new__(Detokenizer)
        twin._tokenizer, twin._skipped, twin._added = self._tokenizer, self._skipped, self._added
        twin._rest, twin._to_strip = self._rest, self._to_strip
        twin._piece = self._added if self._piece == self._added else twin._first_piece
        return twin

    def push(self, ids: Iterable[int]) -> str:
        """Take the next ids; return the text that is complete with them and was not returned before."""
        data = self._rest + b"".join(map(self._piece, ids))
        text, num_used = utf_8_decode(data, "replace", False)
        self._rest = data[num_used:]
        return self._strip(text) if self._to_strip else text

    def flush(self) -> str:
        """Return what an unfinished character leaves behind: call once, after the last id."""
        return self._strip(utf_8_decode(self._rest, "replace", True)[0])

    def _first_piece(self, token_id: int) -> bytes:
        """Return an id's bytes until one has some, and then those of the others that were pushed with it."""
        if self._piece == self._added:
            return self._added(token_id)
        if token_id in self._skipped or not self._tokenizer.has_token(token_id):
            return b""
        self._piece = self._added
        return self._tokenizer.first_token_bytes(token_id)

    def _strip(self, text: str) -> str:
        start = 0
        while self._to_strip and start < len(text):
            if text[start] == self._tokenizer.decoder.stripped:
                start += 1
                self._to_strip -= 1
            else:
                self._to_strip = 0
        return text[start:]

    def _feed_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Push the prompt's end, the only part that can matter: one character's bytes, and whether any came before."""
        start, num_bytes = len(prompt_ids), 0
        while start and num_bytes < _UTF8_MAX_BYTES + self._to_strip:
            start -= 1
            if prompt_ids[start] not in self._skipped:
                num_bytes += len(self._tokenizer.token_bytes(prompt_ids[start]))
        if start:
            self._piece = self._added
        self.push(prompt_ids[start:])  # nothing of the prompt is left to strip then


def check_text_size(text: str, max_tokens: int) -> None:
    """Refuse a text with so many bytes that it cannot be a prompt of at most `max_tokens`."""
    check_num_bytes(len(text), max_tokens)  # a character has at least one: an enormous text is not even encoded
    check_num_bytes(len(text.encode("utf-8", "surrogatepass")), max_tokens)


def check_num_bytes(num_bytes: int, max_tokens: int) -> None:
    limit = MAX_BYTES_PER_TOKEN * max_tokens + _SLACK_BYTES
    if num_bytes > limit:
        raise RequestError(
            f"the prompt has at least {num_bytes} bytes; a context of {max_tokens} tokens takes at most {limit}. "
            f"This model's maximum context length is {max_tokens} tokens",
            code="context_length_exceeded",
        )
