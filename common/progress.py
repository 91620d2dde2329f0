"""What an operator sees while a deployment starts and when a child of it restarts.

On a terminal: one bar for each process. Otherwise: a plain line for each step. Both on stderr, as the log is.
"""

from __future__ import annotations

from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_STEP = 0.25  # plain lines: a step is told again after each quarter


class Display(Protocol):
    """Takes what the children report."""

    def on_event(self, name: str, event: dict[str, object]) -> None: ...

    def note(self, text: str) -> None:
        """A line of the launcher's own."""
        ...

    def done(self) -> None:
        """Everything is up: what comes now are lines. Idempotent."""
        ...


def make_display(stream: TextIO) -> Display:
    return BarDisplay(stream) if stream.isatty() else PlainDisplay(stream)


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


class PlainDisplay:
    """One line for each thing that happens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: dict[tuple[str, str], float] = {}
        self._starting = True

    def on_event(self, name: str, event: dict[str, object]) -> None:
        if self._starting and event["event"] == "progress":
            what, fraction = str(event.get("what", "")), _fraction(event)
            before = self._last.get((name, what))
            if before is None or fraction >= min(1.0, before + _STEP) > before:
                self._last[name, what] = fraction
                self.note(f"{name}: {what} {fraction:.0%}")
        elif (line := describe(name, event)) is not None:
            self.note(line)

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def done(self) -> None:
        self._starting = False


class BarDisplay:
    """Bars until `done`, lines from then on."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bars = Progress(
            TextColumn("{task.fields[name]:>8}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.description}"),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._starting = True
        self._bars.start()

    def on_event(self, name: str, event: dict[str, object]) -> None:
        if self._starting and event["event"] in ("started", "progress", "ready"):
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

    def done(self) -> None:
        if self._starting:
            self._starting = False
            self._bars.stop()


def _fraction(event: dict[str, object]) -> float:
    value = event.get("fraction", 0.0)
    return min(1.0, max(0.0, float(value))) if isinstance(value, int | float) else 0.0
