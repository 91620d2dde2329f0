"""The display of a launcher: a deployment starts, serves, restarts a child, ends.

On a terminal: one bar for each process until all is up; what the children say meanwhile is printed above the bars, and
only if it is a warning; then the greeting, and lines from then on. Elsewhere every step is a log line.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import IO, Protocol, TextIO, cast

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..common.lines import Lines, drain

_STEP = 0.25  # of progress: it is logged again after each quarter
# What a child logs in text form at info or below has no level behind its time (logs.py).
_QUIET_LINE = re.compile(r"^\d\d:\d\d:\d\d (?!(?:warning|error|critical) )")

log = structlog.get_logger(__name__)


class Display(Protocol):
    """Takes what the children report. No method waits long for a reader, or raises because it has gone."""

    @property
    def children_stderr(self) -> int | None:
        """Return where children write until `done`; None: where the launcher itself does."""
        ...

    def on_event(self, name: str, event: dict[str, object]) -> None: ...

    def note(self, text: str) -> None:
        """Show a line of the launcher's own."""
        ...

    def greet(self, greeting: str, facts: Mapping[str, object]) -> None:
        """Say that requests can come. `facts`: the same for programs."""
        ...

    def done(self) -> None:
        """Everything is up, or nothing will be: what comes now are lines. Idempotent."""
        ...


def make_display(stream: TextIO, *, is_text: bool) -> Display:
    """`is_text`: lines are for people; bars need a terminal besides."""
    return BarDisplay(stream) if is_text and stream.isatty() else LogDisplay(is_text=is_text)


def describe(name: str, event: dict[str, object]) -> str | None:
    """A line about an event that matters after the start too."""
    match event["event"]:
        case "restart":
            when = f" in {event['delay_s']:g} s" if event["delay_s"] else ""
            return f"{name}: {event['reason']}; starting again{when}"
        case "failed":
            return f"{name}: {event.get('error', '')}"
        case "ready":
            return f"{name}: ready"
    return None


class LogDisplay:
    """One log line for each thing that happens."""

    def __init__(self, *, is_text: bool) -> None:
        self._is_text = is_text
        self._last: dict[tuple[str, str], float] = {}
        self._is_starting = True

    @property
    def children_stderr(self) -> int | None:
        return None

    def on_event(self, name: str, event: dict[str, object]) -> None:
        if self._is_starting and event["event"] == "progress":
            what, fraction = str(event.get("what", "")), _fraction(event)
            before = self._last.get((name, what))
            if before is None or fraction >= min(1.0, before + _STEP) > before:
                self._last[name, what] = fraction
                self.note(f"{name}: {what} {fraction:.0%}")
        elif (line := describe(name, event)) is not None:
            self.note(line)

    def note(self, text: str) -> None:
        log.info(text)

    def greet(self, greeting: str, facts: Mapping[str, object]) -> None:
        if self._is_text:
            _print(greeting)
        else:
            log.info("serving", **facts)

    def done(self) -> None:
        self._is_starting = False


class BarDisplay:
    """Bars until `done`, lines from then on."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=cast(IO[str], Lines(stream)))
        self._bars = Progress(
            TextColumn("{task.fields[name]:>8}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.description}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._is_starting = True
        read_fd, self._write_fd = os.pipe()
        threading.Thread(target=self._relay, args=(read_fd,), name="children", daemon=True).start()
        self._bars.start()

    @property
    def children_stderr(self) -> int | None:
        return self._write_fd if self._is_starting else None

    def on_event(self, name: str, event: dict[str, object]) -> None:
        if self._is_starting and event["event"] in ("started", "progress", "ready"):
            ready = event["event"] == "ready"
            what = "ready" if ready else str(event.get("what", "starting"))
            task = self._tasks.get(name)
            if task is None:
                task = self._tasks[name] = self._bars.add_task(what, total=1.0, name=name)
            self._bars.update(task, description=what, completed=1.0 if ready else _fraction(event))
        elif (line := describe(name, event)) is not None:
            self.note(line)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def greet(self, greeting: str, facts: Mapping[str, object]) -> None:
        _print(greeting)

    def done(self) -> None:
        if self._is_starting:
            self._is_starting = False
            self._bars.stop()
            drain()  # what others write there from here on would be wiped out with the bars

    def _relay(self, fd: int) -> None:
        """Print what children write, above the bars, but for lines that tell of no trouble. On a thread of its own."""
        with contextlib.suppress(OSError, ValueError), open(fd, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not _QUIET_LINE.match(line):
                    self.note(line.rstrip("\n"))


def _print(greeting: str) -> None:
    stdout = Lines(sys.stdout)
    stdout.write(f"{greeting}\n")
    stdout.flush()


def _fraction(event: dict[str, object]) -> float:
    value = event.get("fraction", 0.0)
    return min(1.0, max(0.0, float(value))) if isinstance(value, int | float) else 0.0
