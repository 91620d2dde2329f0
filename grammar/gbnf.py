r"""GBNF, as llama.cpp reads it, in words that llguidance's converter takes: of others it makes what is no grammar.

[\u0041-\U0001F600]   it drops the zeros of an escape   the characters themselves
([0-9]+)?             it drops the parentheses          ([0-9]+ "")?
start                 it calls `root` so                start-

It makes one expression of a rule that does not come back to itself, but for `root`; an expression takes as many as it
can, whatever follows. So what is in `root` stands in a rule of its own: a grammar without recursion is one expression.
"""

from __future__ import annotations

import re

# An expression takes as many as it can: behind /bx*/ a rule's "xt" never begins, and an x must follow for ever. The
# library takes all bytes that are without a choice before it answers. What stands in our own ends in marks.
_UNFORCED = '\n%llguidance {"no_forcing": true}\n'
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_START_RULE = re.compile(r"^\s*start\s*::=", re.MULTILINE)
# Lark's marks before a rule's name and options behind it say how a tree is built, or how far a rule goes.
_LARK = re.compile(r"^\s*(?:%llguidance\b|[?!]*start\s*(?:\[[^\]\r\n]*\]\s*)?:)", re.MULTILINE)
# A string, a class, a comment; a rule's name; or a repetition that ends a group which is repeated itself.
_PART = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*|'
    r"(?P<start>(?<![\w-])start(?![\w-]))|(?P<root>(?<![\w-])root(?![\w-]))|(?P<last>[*+?}])(?P<end>(?:\s*\))+)(?=\s*[*+?{])",
    re.DOTALL,
)


def has_start_rule(text: str) -> bool:
    """Tell whether a rule of GBNF is named as every grammar of Lark begins."""
    return _START_RULE.search(text) is not None


def is_lark(text: str) -> bool:
    """Tell whether a grammar is in Lark: by its own first line, or by the rule that every grammar of Lark has."""
    return _LARK.search(text) is not None and not has_start_rule(text)


def unforced(lark: str) -> str:
    """Return a client's grammar in Lark such that its matcher looks one token ahead. The last such line counts."""
    return lark + _UNFORCED


def plain_gbnf(text: str) -> str:
    """Return a grammar in words that the converter takes. Raises ValueError for an escape that is no character."""
    has_start = has_start_rule(text)
    return _PART.sub(lambda part: _reworded(part, has_start), text)


def with_whole_root(plain: str) -> str:
    """Return a grammar that the converter takes with all of it as one expression, where no rule calls itself."""
    whole = "root-"
    while re.search(rf"(?<![\w-]){whole.replace('-', '[-_]')}(?![\w-])", plain, re.IGNORECASE):
        whole += "-"
    renamed = _PART.sub(lambda part: whole if part["root"] else part[0], plain)
    return f"{renamed}\nroot ::= {whole}\n"


def _reworded(part: re.Match[str], has_start: bool) -> str:
    if part["start"] and has_start:
        return "start-"
    if part["last"]:
        return f'{part["last"]} ""{part["end"]}'
    return part[0] if part[0].startswith("#") else _ESCAPE.sub(_character, part[0])


def _character(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"{escape[0]} is no character")
    return f"\\x{code:02x}" if code < 0x80 else chr(code)  # one of ASCII might mean something where it stands
