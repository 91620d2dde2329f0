"""Docstrings say what they are about, and words that were replaced stay away."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .test_layers import product, relative, room_of

# A sentence that begins so leaves its subject to be guessed ("Who was taken longest ago.").
GUESSED = {
    *("And", "Or", "But", "If", "Also", "Then", "Else", "Because"),
    *("It", "Its", "They", "Their", "These", "Those", "This", "That", "Such", "Same", "Ours", "Theirs", "He", "She"),
    *("Who", "Whom", "Whose", "What", "Which", "Where", "When", "Whether", "How", "Why", "While", "Until", "Since"),
    *(
        "Of",
        "For",
        "In",
        "On",
        "With",
        "By",
        "From",
        "To",
        "At",
        "As",
        "Into",
        "Out",
        "Like",
        "Per",
        "Beside",
        "Behind",
    ),
    *(
        "After",
        "Before",
        "Without",
        "Within",
        "Between",
        "Under",
        "Over",
        "Up",
        "Only",
        "Not",
        "Never",
        "Still",
        "Again",
    ),
}
# Comments that lean on the line above them.
LEANING = re.compile(r"#\s(\.\.\. |of these\b|the same\b|and of\b|likewise\b)")
# Today's breaches of a room: a number here may only fall.
LEFT: dict[str, int] = {}
# Replaced words, whole identifiers: what stands for them now is in docs/architecture.md.
RETIRED: set[str] = {
    "BothFollowers",
    "BothRoles",
    "DecodeRunner",
    "DecodeUnit",
    "Exchange",
    "Fence",
    "Fencing",
    "Found",
    "Frame",
    "FrameMiddleware",
    "KNOCK_AFTER_S",
    "Keepers",
    "Ledger",
    "Live",
    "Looks",
    "OfferedLoad",
    "Outlet",
    "PrefillUnit",
    "ProcessLife",
    "SampleBooks",
    "Shelf",
    "Spout",
    "Wishes",
    "WorkerParts",
    "WorkerUnit",
    "call_of",
    "decode_keeps",
    "decode_runner",
    "forget_lives",
    "is_kept_elsewhere",
    "is_wish",
    "knocks",
    "layer_fence",
    "look_s",
    "next_look_s",
    "on_wish",
    "pour_into",
    "told_at",
}


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(product()[path]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def guessed(path: Path) -> Iterator[str]:
    """Yield the docstrings and comments of a file that leave their subject to be guessed."""
    for line, text in docstrings(path):
        first = re.match(r"\W*([A-Za-z']+)", text)
        if first is not None and first[1] in GUESSED:
            yield f"{relative(path)}:{line}: {text.splitlines()[0]}"
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if LEANING.search(text):
            yield f"{relative(path)}:{number}: {text.strip()}"


def test_sentences_name_their_subject() -> None:
    found: dict[str, list[str]] = {}
    for path in product():
        found.setdefault(room_of(path), []).extend(guessed(path))
    counts = {room: len(lines) for room, lines in found.items() if lines}
    more = [line for room, lines in found.items() if len(lines) > LEFT.get(room, 0) for line in lines]
    assert not more, "\n".join(more)
    assert counts == LEFT, "fewer than LEFT says: lower it"


def test_replaced_words_stay_away() -> None:
    found = Counter[str]()
    for path in product():
        words = set(re.findall(r"\b[A-Za-z_]\w*\b", path.read_text(encoding="utf-8")))
        found.update(f"{relative(path)}: {word}" for word in words & RETIRED)
    assert not found
