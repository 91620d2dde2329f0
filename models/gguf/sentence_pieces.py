"""SentencePiece's BPE, as a GGUF file has it: pieces with scores, and no merges.

SentencePiece joins the two neighbours whose joint piece has the best score, until none is a piece (Kudo and Richardson
2018). The `tokenizers` library joins by a list of pairs, the best first; the list follows from pieces and scores. Which
space stands before a text, and whether there is one, a file hardly says: it goes by the architecture, as in
`transformers`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .fields import GgufFields
from .merges import Pairs, byte_pairs, has_merges, read_merges

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"  # what stands for a space in a piece
_GEMMA = ("gemma2", "gemma3")  # no space first, and pieces in the order of their merges
_ALWAYS_A_SPACE = ("phi3",)  # before a text that begins with one, too
_SCORES = "tokenizer.ggml.scores"
_MAX_CUT = 1 << 28  # the sum of pieces' squared lengths, which is the work of cutting each everywhere
_JOINED = {1, 4}  # GGUF's types of pieces that come of a text: normal ones and user-defined ones


def pieces(fields: GgufFields, texts: list[str]) -> list[str]:
    """Return the pieces of a file: a Gemma's of spaces alone stand there as spaces."""
    if fields.architecture not in _GEMMA:
        return texts
    return [text if text.strip(" ") else _SPACE * len(text) for text in texts]


def pieces_tokenizer(fields: GgufFields, tokens: list[str], types: list[int], marks: Sequence[str]) -> Tokenizer:
    """Return the tokenizer without its added tokens. Raises ValueError for fields that do not fit.

    `marks`: what a decoder drops of tokens (`spellings.py`).
    """
    from tokenizers import Tokenizer

    is_gemma = fields.architecture in _GEMMA
    scores = _scores(fields, len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    joined = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind in _JOINED}
    unknown = fields.special.get("unknown")
    tokenizer = Tokenizer(
        byte_pairs(
            vocabulary,
            _merges(fields, joined),
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    puts_space = not is_gemma and fields.flag("tokenizer.ggml.add_space_prefix", default=True)
    _set_spaces(tokenizer, puts_space=puts_space, is_always=fields.architecture in _ALWAYS_A_SPACE)
    _set_decoder(tokenizer, marks, strips_space=puts_space)
    return tokenizer


def _scores(fields: GgufFields, num_tokens: int) -> Sequence[float]:
    """Return the pieces' scores. Where they tell of no order, pieces stand as SentencePiece writes them: best first."""
    in_order = [-float(index) for index in range(num_tokens)]
    if fields.find(_SCORES) is None:
        return in_order
    scores = fields.numbers(_SCORES)
    if len(scores) != num_tokens:
        raise ValueError(f"{_SCORES} has {len(scores)} scores of {num_tokens} tokens")
    return in_order if fields.architecture in _GEMMA else scores


def _merges(fields: GgufFields, scores: Mapping[str, float]) -> Pairs:
    """Return the pairs that are joined, the best first: the file's (Gemma 4's has them), or those that pieces imply."""
    if has_merges(fields):
        return read_merges(fields)
    if sum(len(piece) ** 2 for piece in scores) > _MAX_CUT:
        raise ValueError(f"its pieces are too long, up to {max(map(len, scores))} characters")
    return [(left, right) for _, left, right in sorted(_pairs(scores), key=_rank)]


def _pairs(scores: Mapping[str, float]) -> Iterator[tuple[float, str, str]]:
    """Yield each pair of pieces that is a piece, behind the score of that."""
    for piece, score in scores.items():
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in scores and right in scores:
                yield score, left, right


def _rank(pair: tuple[float, str, str]) -> tuple[float, int, int]:
    score, left, right = pair
    return -score, -len(left), -len(right)


def _set_spaces(tokenizer: Tokenizer, *, puts_space: bool, is_always: bool) -> None:
    from tokenizers import normalizers, pre_tokenizers

    if puts_space and is_always:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    elif puts_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)


def _set_decoder(tokenizer: Tokenizer, marks: Sequence[str], *, strips_space: bool) -> None:
    from tokenizers import decoders

    drops = [decoders.Replace(mark, "") for mark in marks]
    steps: list[decoders.Decoder] = [*drops, decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
