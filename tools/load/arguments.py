"""The parser of a program's command line, and values of its flags, as types for argparse."""

from __future__ import annotations

import argparse
import math
import os
import shlex
from pathlib import Path
from typing import NoReturn

_MOST = 10**9  # of anything that is counted: more is a slip of the finger, and fits into no array
_LEAST_NUMBER, _MOST_NUMBER = 1e-300, 1e300  # beyond these, sums in other units end at 0 or at infinity


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, as all commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")


def positive_int(text: str) -> int:
    """A whole number from 1 on."""
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return natural(text)


def natural(text: str) -> int:
    """A whole number from 0 on."""
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    if value > _MOST:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST}")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def shell_words(text: str) -> tuple[str, ...]:
    """Words as a shell parts them."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be parted into words: {error}") from error


def finite_float(text: str) -> float:
    """Any number but those that JSON has no words for."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def positive_float(text: str) -> float:
    """A number above 0, and not infinite."""
    positive_or_infinite(text)
    value = finite_float(text)
    if not _LEAST_NUMBER <= value <= _MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text} is not from {_LEAST_NUMBER:g} to {_MOST_NUMBER:g}")
    return value


def share_or_none(text: str) -> float:
    """A part of a whole, which may be nothing: 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def positive_or_infinite(text: str) -> float:
    """A number above 0, of something that may be without a bound."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def multiple(text: str) -> float:
    """So many times something that is the least: 1 or more, and not infinite."""
    value = positive_float(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def share(text: str) -> float:
    """A part of a whole: above 0, and 1 at most."""
    value = positive_or_infinite(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is more than 1")
    return value


def named_path(text: str) -> Path:
    """A file or folder, perhaps with `~`: shells leave that of `--json=~/x` as it is."""
    found = os.path.expanduser(text)
    if not text or found.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} is no path on this machine")
    return Path(found)


def output_file(text: str) -> Path:
    """A file that can be written once there is something to write, which may be after an hour."""
    try:
        return _writable(text)
    except OSError as error:  # its folder cannot be looked into, or the name is too long
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error


def _writable(text: str) -> Path:
    path = named_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory")
    nearest = path if path.exists() else next(folder for folder in path.parents if folder.exists())
    if nearest is not path and not nearest.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is no directory")
    if not os.access(nearest, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: {nearest} cannot be written")
    return path
