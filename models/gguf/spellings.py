"""Spellings of tokens: a tokenizer.json has an id for each text, and a GGUF file may have several ids of one text.

One id keeps the text. The others are told apart by marks behind it, which no token has and which a decoder drops, so
that every id is decoded as its own text, and only the one is made of a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

# Characters that Unicode leaves to private use, and others than those by which `special_text.py` hides tokens: two of
# them behind a special token must not be another id of it.
_MARKS = range(0xF0000, 0xFFFF0)


def spellings(tokens: Sequence[str], preferred: Iterable[int]) -> tuple[list[str], list[str]]:
    """Return the tokens so that no two are alike, and the two marks behind those that were; none: there were none.

    The last id of a text keeps it, as in llama.cpp's table, or the last one of those that are `preferred`.
    """
    keepers = {token: index for index, token in enumerate(tokens)} | {tokens[index]: index for index in preferred}
    if len(keepers) == len(tokens):
        return list(tokens), []
    used = set().union(*tokens)
    zero, one = marks = list(islice((mark for mark in map(chr, _MARKS) if mark not in used), 2))
    digits = str.maketrans("01", zero + one)
    found: list[str] = []
    copies: Counter[str] = Counter()
    for index, token in enumerate(tokens):
        if keepers[token] == index:
            found.append(token)
        else:
            copies[token] += 1
            number = f"0{copies[token]:b}"  # two marks at least: no character of a text is as long
            found.append(token + number.translate(digits))
    return found, marks
