"""llguidance behind our words: a tokenizer's vocabulary, grammars compiled for it, and their matchers.

Nothing here raises what the library raises, and no matcher goes on from an error: the library itself would report an
answer that does not fit as one that has ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..common.errors import ConfigError, RequestError
from ..common.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarBroken
from ..models.tokenizer_files import drops_characters
from .kept import MAY_BE, in_kept_words
from .limits import SchemaFacts, check_size, keyword_refusal, refusal, unkept_refusal
from .rewriting import rewritten
from .simplify import simplified
from .source import SCHEMA_KINDS, source_of
from .thinking import BudgetedThoughts, FirstMatcher
from .tokens import ANY, TOKENS, SameTokens, only_token, tokens_mask

_EMBEDDED = re.compile(r"%json\s*+(?=\{)")  # a schema within a grammar
_DECODER = json.JSONDecoder()
_UNIMPLEMENTED = re.compile(r'Unimplemented keys: \["([^"]*)"')
# What the library's reason says where it is about a keyword: a regular expression of each, tried in this order.
_ABOUT = {
    "oneOf": "oneOf",
    "format": "Unknown format",
    "$ref": "retriev|^Pointer ",
    "type": "Invalid type",
    "multipleOf": "'multipleOf' has too many digits",
}
# Of what the library quotes of a grammar, and of its words about it, clients are shown the beginning.
_MAX_REASON_CHARS = 400
# What may come next, in parts of rules. A schema of MAX_GRAMMAR_BYTES reaches some 20,000, and is slow once (40 ms).
_MAX_ITEMS = 50_000


class Vocabulary:
    """A model's tokens, as grammars are compiled for them. Immutable; may be used from several threads."""

    def __init__(self, tokenizer: LLTokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.size = vocab_size
        self.mask_bytes = -(-vocab_size // 32) * 4
        self.limits = LLParserLimits(verbose_errors=False, max_items_in_row=_MAX_ITEMS)

    @classmethod
    def from_dir(cls, path: Path, *, vocab_size: int, eos_token_ids: frozenset[int]) -> Vocabulary:
        """Read a model directory's tokenizer: some tenths of a second. Raises ConfigError."""
        if not eos_token_ids:
            raise ConfigError("the model has no end token: an answer that follows a grammar could not end")
        ends = sorted(eos_token_ids)
        if drops_characters(path):  # the library does not drop them, and would take such tokens for others
            return cls(_from_own_rules(path, vocab_size, ends), vocab_size)
        try:
            tokenizer = LLTokenizer(str(path / "tokenizer.json"), n_vocab=vocab_size, eos_token=ends)
        except ValueError:  # it cannot tell what bytes the tokens stand for
            tokenizer = _from_own_rules(path, vocab_size, ends)
        return cls(tokenizer, vocab_size)


def _from_own_rules(path: Path, vocab_size: int, ends: list[int]) -> LLTokenizer:
    from ..models.tokenizer import Tokenizer

    own = Tokenizer.from_dir(path)
    if own.decoder.separator:
        raise ConfigError(f"{path}: no grammar can be followed with this tokenizer: it puts spaces between tokens")

    pieces = tuple(own.token_bytes(token_id) for token_id in range(vocab_size))
    marks = own.mark_ids
    # Of several ids of the same bytes the last one: SentencePiece's bytes stand before its pieces.
    ids = {piece: i for i, piece in enumerate(pieces) if piece and i not in marks}

    class Tokens:
        """The library asks this for a tokenizer's parts, and calls it for bytes that a grammar leaves no choice about.

        The model's own tokenizer would put a space before them.
        """

        is_tokenizer_wrapper = True
        eos_token_id = ends[0]
        bos_token_id = own.bos_token_id
        tokens = pieces
        special_token_ids = tuple(marks)

        def __call__(self, text: str) -> list[int]:
            return _longest_first(text.encode(), ids)

    try:
        return LLTokenizer(Tokens(), n_vocab=vocab_size, eos_token=ends)  # type: ignore[arg-type]  # by its attributes
    except ValueError as error:
        raise ConfigError(f"{path}: no grammar can be followed with this tokenizer: {error}") from error


def _longest_first(data: bytes, ids: Mapping[bytes, int]) -> list[int]:
    """Return tokens of these bytes, each as long as can be."""
    found, longest = [], max(map(len, ids))
    while data:
        piece = next((data[:size] for size in range(longest, 0, -1) if data[:size] in ids), None)
        if piece is None:
            break
        found.append(ids[piece])
        data = data[len(piece) :]
    return found


class AnswerMatcher:
    """Implements `FirstMatcher`."""

    __slots__ = ("_mask_bytes", "_matcher")

    def __init__(self, matcher: LLMatcher, mask_bytes: int) -> None:
        self._matcher = matcher
        self._mask_bytes = mask_bytes

    def fork(self) -> AnswerMatcher:
        """Make another one at the same place."""
        return AnswerMatcher(self._matcher.deep_copy(), self._mask_bytes)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        self._matcher.rollback(num_tokens)
        self._check()

    def accept(self, token_ids: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(token_ids))
        self._check()

    def mask(self) -> bytes:
        bits = self._matcher.compute_bitmask()[: self._mask_bytes]
        self._check()
        return bits.ljust(self._mask_bytes, b"\0")

    def forced(self) -> int | None:
        following = self._matcher.compute_ff_tokens()
        if following:
            return following[0]  # those behind it might be cut into other tokens once it has been taken
        if not self._matcher.is_stopped():
            return None
        return only_token(self.mask())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarBroken(_reason(self._matcher))


def compile_grammar(vocabulary: Vocabulary, grammar: Grammar) -> FirstMatcher:
    """Compile a grammar that nobody has checked yet. Raises RequestError, as `compile_checked` and `check_size` do."""
    check_size(grammar)
    return compile_checked(vocabulary, grammar)


def find_first_mask(vocabulary: Vocabulary, grammar: Grammar) -> bytes:
    """Compile a grammar that nobody has checked yet, and return the mask of first tokens. Raises as the above."""
    check_size(grammar)
    return _begun(vocabulary, grammar)[1]


def compile_checked(vocabulary: Vocabulary, grammar: Grammar) -> FirstMatcher:
    """Return a matcher at the start of an answer, its first mask computed: that is the one which may take long.

    The grammar is known to be within its bounds: to check a large one keeps the GIL for milliseconds, which a worker's
    streams would notice. Raises RequestError whose `param` is a path within the grammar (`limits.check_size`).
    """
    return _begun(vocabulary, grammar)[0]


def _begun(vocabulary: Vocabulary, grammar: Grammar) -> tuple[FirstMatcher, bytes]:
    """Return a matcher at the start of an answer, and the mask of its first token."""
    first: FirstMatcher = (
        SameTokens(tokens_mask(grammar, vocabulary.size, vocabulary.mask_bytes))
        if grammar.kind in (ANY, TOKENS)
        else _of_library(vocabulary, grammar)
    )
    if (thoughts := grammar.thoughts) is not None and thoughts.budget is not None:
        first = BudgetedThoughts(first, thoughts, vocabulary.mask_bytes)
    try:
        mask = first.mask()
    except GrammarBroken:
        mask = b""
    if not any(mask):
        raise RequestError("has no answer that could follow it", param="", code="invalid_grammar")
    return first, mask


def _of_library(vocabulary: Vocabulary, grammar: Grammar) -> AnswerMatcher:
    try:
        source = _source(grammar)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"is not of its kind: {_clipped(str(error))}", param="", code="invalid_grammar") from None
    matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=vocabulary.limits)
    if matcher.is_error():
        matcher = _in_other_words(vocabulary, grammar, _reason(matcher))
    return AnswerMatcher(matcher, vocabulary.mask_bytes)


def _in_other_words(vocabulary: Vocabulary, grammar: Grammar, reason: str) -> LLMatcher:
    """Return a matcher of the first schema in other words that can be followed. Raises RequestError: `reason`."""
    facts = check_size(grammar)
    for other in _other_words(grammar, facts):
        try:
            source = _source(other)
        except RequestError:  # for what the given schema has where it is negated
            continue
        matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=vocabulary.limits)
        if not matcher.is_error():
            return matcher
    raise _refusal(reason, facts)


def _other_words(grammar: Grammar, facts: SchemaFacts) -> Iterator[Grammar]:
    """Yield grammars whose schemas have instances of this one's alone, the nearest to it first."""
    texts, given = schemas_in(grammar)
    is_dynamic = "$dynamicRef" in facts.places or grammar.kind == "lark"
    before = grammar.text
    ways: tuple[Callable[[object], object], ...] = (
        lambda schema: simplified(schema, is_dynamic=is_dynamic),
        lambda schema: simplified(rewritten(schema, splits_one_of=False), is_dynamic=True),
        lambda schema: simplified(rewritten(schema, splits_one_of=True), is_dynamic=True),
    )
    for say in ways:
        schemas = [say(schema) for schema in given]
        text = _joined(texts, schemas)
        if False not in schemas and text != before and len(text) <= MAX_GRAMMAR_BYTES:
            yield msgspec.structs.replace(grammar, text=text)
        before = text


def _source(grammar: Grammar) -> str:
    """Return the grammar as the library takes it, in words that it keeps.

    Raises ValueError, as `source_of` does, and RequestError, as `in_kept_words` does.
    """
    if grammar.kind in (*SCHEMA_KINDS, "lark") and MAY_BE.search(grammar.text) is not None:
        texts, schemas = schemas_in(grammar)
        try:
            text = _joined(texts, [in_kept_words(schema) for schema in schemas])
        except RequestError as error:
            if grammar.kind == "lark":  # whose schemas have no paths of their own
                error.param = ""
            raise
        grammar = msgspec.structs.replace(grammar, text=text)
    return source_of(grammar)


def _joined(texts: Sequence[str], schemas: Sequence[object]) -> bytes:
    """Return the text of a grammar: one that stands before, between and behind its schemas, and these."""
    said = [json.dumps(schema, ensure_ascii=False) for schema in schemas]
    return "".join(chain.from_iterable(zip_longest(texts, said, fillvalue=""))).encode()


def schemas_in(grammar: Grammar) -> tuple[list[str], list[object]]:
    """Return the schemas of a grammar, and the texts around them: one more, or none where there is no schema."""
    text = grammar.text.decode()
    if grammar.kind in SCHEMA_KINDS:
        return ["", ""], [json.loads(text)]
    texts, schemas, at = list[str](), list[object](), 0
    for found in _EMBEDDED.finditer(text) if grammar.kind == "lark" else ():
        if found.end() <= at:
            continue  # it stands in a schema
        try:
            schema, end = _DECODER.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            continue
        texts.append(text[at : found.end()])
        schemas.append(schema)
        at = end
    return [*texts, text[at:]], schemas


def _refusal(reason: str, facts: SchemaFacts) -> RequestError:
    """Return the refusal with the keyword that it is about, where the library names one."""
    if (unknown := _UNIMPLEMENTED.search(reason)) is not None:
        return keyword_refusal(unknown[1], facts)
    for place, draft in facts.places.get("$schema", []):
        if isinstance(draft, str) and "retriev" in reason and (draft.removesuffix("#") or "#") in reason:
            text = f"has the keyword '$schema' at '{place[1:]}', which names no draft that is known: {_clipped(draft)}"
            return refusal(text, place)
    for keyword, words in _ABOUT.items():
        if re.search(words, reason) and (path := facts.place_of(keyword, reason)) is not None:
            return unkept_refusal(keyword, path, reason)
    for path, pattern in facts.patterns:
        if "regex" in reason and pattern[:64] in reason:
            return refusal(f"has a pattern at '{path[1:]}' that cannot be kept: {reason}", path)
    return RequestError(f"cannot be followed: {reason}", param="", code="invalid_grammar")


def _reason(matcher: LLMatcher) -> str:
    return _clipped(matcher.get_error().partition("\n<non-verbose/>")[0])


def _clipped(text: str) -> str:
    return text if len(text) <= _MAX_REASON_CHARS else f"{text[:_MAX_REASON_CHARS]}..."
