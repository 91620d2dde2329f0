"""A batch's journal: what each finished line was answered, appended as it comes.

    checksum line ok answer \\n      checksum: of what follows it; ok: 1 for the output file, 0 for the error file

Lines are appended in groups, and a group lasts when `append` returns. A record that is torn or wrong ends the journal:
it and what follows is cut off, and those lines are asked again. So each line has one answer, whatever the router was
doing when it was killed.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .folder import sync
from .usage import BatchUsage


class FinishedLine(NamedTuple):
    """The answer to one line, as it will stand in a file. `answer` has no newline in it."""

    line: int  # from 0
    is_ok: bool
    answer: bytes


class Place(NamedTuple):
    """An answer's bytes in the journal."""

    offset: int
    length: int
    is_ok: bool


class Journal:
    """One batch's, of one router at a time. Methods wait for the disk."""

    def __init__(self, path: Path) -> None:
        """Read what is there, and cut off what is not whole."""
        self._path = path
        self._lock = threading.Lock()  # one thread may still append while another one begins to
        self.places: dict[int, Place] = {}
        self.usage = BatchUsage()  # of all answers
        path.touch()
        self._size = 0
        with path.open("rb") as file:
            for each, place, end in _records(file):
                if each.line not in self.places:
                    self.places[each.line] = place
                    self.usage = self.usage.plus(BatchUsage.of_answer(each.answer))
                self._size = end
        if path.stat().st_size > self._size:
            os.truncate(path, self._size)

    @property
    def num_ok(self) -> int:
        return sum(place.is_ok for place in self.places.values())

    def append(self, finished: Sequence[FinishedLine]) -> None:
        """Add answers to lines that have none. They last."""
        with self._lock:
            self._append([each for each in finished if each.line not in self.places])

    def _append(self, new: Sequence[FinishedLine]) -> None:
        places, usage = {}, self.usage
        with self._path.open("r+b") as file:
            file.seek(self._size)
            file.truncate()  # what an earlier call may have left when it failed
            end = self._size
            for each in new:
                record = _record(each)
                offset = end + len(record) - 1 - len(each.answer)
                places[each.line] = Place(offset, len(each.answer), each.is_ok)
                usage = usage.plus(BatchUsage.of_answer(each.answer))
                file.write(record)
                end += len(record)
            sync(file)
        self._size = end
        self.places |= places
        self.usage = usage

    def answers(self, lines: Sequence[int]) -> Iterator[tuple[int, bytes | None, bool]]:
        """Yield (line, answer, is ok) in this order; None for lines without an answer."""
        with self._path.open("rb") as file:
            for line in lines:
                place = self.places.get(line)
                if place is None:
                    yield line, None, False
                else:
                    file.seek(place.offset)
                    yield line, file.read(place.length), place.is_ok


def _record(finished: FinishedLine) -> bytes:
    text = b"%d %d %b\n" % (finished.line, finished.is_ok, finished.answer)
    return b"%08x %b" % (zlib.crc32(text), text)


def _records(file: BinaryIO) -> Iterator[tuple[FinishedLine, Place, int]]:
    """Yield (line, place of its answer, end of its record) of whole records, up to the first one that is not."""
    start = 0
    for record in file:
        checksum, _, text = record.partition(b" ")
        if len(checksum) != 8 or not record.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
            return
        line, ok, answer = text[:-1].split(b" ", 2)
        end, is_ok = start + len(record), ok == b"1"
        yield FinishedLine(int(line), is_ok, answer), Place(end - 1 - len(answer), len(answer), is_ok), end
        start = end
